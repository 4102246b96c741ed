"""Predictions into a file."""

from typing import Any, Sequence

from mmengine.evaluator import DumpResults
from mmengine.registry import METRICS


def _compact_instances(instances: dict) -> dict:
    """Boxes as plain tensors and masks, (n, H, W), as COCO's run lengths."""
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
    for key in ('gt_instances', 'pred_instances'):
        if key in compact:
            compact[key] = _compact_instances(compact[key])
    return compact


@METRICS.register_module()
class DumpPredictions(DumpResults):
    """mmengine's ``DumpResults`` without a number for each pixel.

    A segmentor's ``seg_logits`` have one for each class and pixel, 200 MB
    for an image of ADE20K, and a detector's masks one for each object and
    pixel; the images are gathered before the file is written. The scores
    are left out, the masks become COCO's run lengths. Ground truth stays.

    Args:
        out_file_path (str): The file, ``.pkl``.
        **kwargs: Arguments of mmengine's ``DumpResults``.

    Raises:
        ValueError: If the file is no ``.pkl``.
    """

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        """Keep the predictions of a batch, dicts of a data sample's fields."""
        super().process(data_batch, [_compact(s) for s in predictions])
