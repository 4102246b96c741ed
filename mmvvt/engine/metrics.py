"""Metric that writes predictions to a file."""

from typing import Any, Sequence

from mmengine.evaluator import DumpResults
from mmengine.registry import METRICS


def _compact_instances(instances: dict) -> dict:
    """Convert boxes to tensors and masks ``(n, H, W)`` to COCO's RLE."""
    compact = dict(instances)
    if hasattr(compact.get('bboxes'), 'tensor'):
        compact['bboxes'] = compact['bboxes'].tensor
    masks = compact.get('masks')
    if masks is not None:
        from mmdet.structures.mask import encode_mask_results

        compact['masks'] = encode_mask_results(
            masks.cpu().numpy()
            if hasattr(masks, 'cpu')
            else masks.to_ndarray()
        )
    return compact


def _compact(sample: dict) -> dict:
    compact = {k: v for k, v in sample.items() if k != 'seg_logits'}
    for key in ('gt_instances', 'ignored_instances', 'pred_instances'):
        if key in compact:
            compact[key] = _compact_instances(compact[key])
    return compact


@METRICS.register_module()
class DumpPredictions(DumpResults):
    """mmengine's ``DumpResults`` with compact predictions.

    The ``seg_logits`` of a segmentor contain one value per class and pixel,
    about 200 MB for an image of ADE20K. The masks of a detector contain one
    value per object and pixel. All predictions are collected in memory before
    the file is written. This metric therefore drops ``seg_logits`` and
    converts masks to COCO's run-length encoding (RLE). It keeps the ground
    truth.

    The arguments are those of ``DumpResults``, such as ``out_file_path``, the
    output file, whose name ends with ``.pkl``.

    Raises:
        ValueError: If the name of the file does not end with ``.pkl``.
    """

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        """Store the predictions of a batch.

        Args:
            data_batch (Any): Batch of data from the data loader.
            predictions (Sequence[dict]): Predictions of the batch, data
                samples converted to dicts.
        """
        super().process(data_batch, [_compact(s) for s in predictions])
