"""Validation of the label maps in a segmentation pipeline."""

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ..errors import LabelError, UserError


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Raise an error if a label map contains an invalid value.

    Without this check, an invalid value causes a CUDA error that names neither
    the file nor the value, and mmseg's metric ignores it silently. Place this
    transform after ``LoadAnnotations``.

    Args:
        num_classes (int): Number of classes; the values 0 to
            ``num_classes - 1`` are valid.
        ignore_index (int): Additional valid value. Defaults to 255.

    Raises:
        UserError: If ``num_classes`` is not a positive integer.
        LabelError: Raised by :meth:`transform` if a label map contains any
            other value, or does not have the shape of the image.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        if not isinstance(num_classes, int) or num_classes < 1:
            raise UserError(
                f'num_classes must be a positive number, got {num_classes!r}'
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check ``results['gt_seg_map']``, ``(H, W)``, if it exists."""
        labels = results.get('gt_seg_map')
        if labels is None:
            return results  # mmseg's inferencer does not load labels.
        # Before and after resizing; test pipelines resize only the image.
        shapes = {
            tuple(results[key][:2])
            for key in ('img_shape', 'ori_shape')
            if results.get(key) is not None
        }
        if labels.ndim != 2 or (shapes and labels.shape not in shapes):
            raise LabelError(
                f'{results["seg_map_path"]}: the label map has shape '
                f'{labels.shape}, but must have the shape (height, width) of '
                f'the image, {" or ".join(map(str, sorted(shapes)))}'
            )
        wrong = (labels >= self.num_classes) & (labels != self.ignore_index)
        if wrong.any():
            values = np.unique(labels[wrong]).tolist()
            raise LabelError(
                f'{results["seg_map_path"]}: label values {values} are '
                f'out of range: allowed are 0 to '
                f'{self.num_classes - 1} and {self.ignore_index} (ignored)'
                + (
                    ', after reduce_zero_label has subtracted 1'
                    if results.get('reduce_zero_label')
                    else ''
                )
            )
        return results

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(num_classes={self.num_classes}, '
            f'ignore_index={self.ignore_index})'
        )
