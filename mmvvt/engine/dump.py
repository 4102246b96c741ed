"""Predictions into a file."""

from typing import Any, Sequence

from mmengine.evaluator import DumpResults


class DumpPredictions(DumpResults):
    """mmengine's ``DumpResults`` without the scores of each pixel.

    A segmentor's ``seg_logits`` have a number for each class and pixel: 200
    MB for one image of ADE20K, and the images are gathered before the file
    is written.

    Args:
        out_file_path (str): The file, ``.pkl``.
        **kwargs: Arguments of mmengine's ``DumpResults``.

    Raises:
        ValueError: If the file is no ``.pkl``.
    """

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        """Keep the predictions of a batch, dicts of a data sample's fields.
        """
        super().process(
            data_batch,
            [{k: v
              for k, v in sample.items() if k != 'seg_logits'}
             for sample in predictions])
