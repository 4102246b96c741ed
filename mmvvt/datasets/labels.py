"""A check of the labels that a segmentation pipeline has read."""

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ..errors import LabelError, UserError


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Refuse a label map with a value that is no class.

    Such a value stops a GPU with a message that names neither file nor
    value, and is passed over in silence by mmseg's metric. Stands behind
    ``LoadAnnotations``.

    Args:
        num_classes (int): Values from 0 up to here, exclusive, are allowed.
        ignore_index (int): Another allowed value. Defaults to 255.

    Raises:
        UserError: If ``num_classes`` is no positive number.
        LabelError: From :meth:`transform`, if a map holds another value.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        if not isinstance(num_classes, int) or num_classes < 1:
            raise UserError(
                f'num_classes must be a positive number, got {num_classes!r}'
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check ``results['gt_seg_map']``, ``(H, W)``, where there is one."""
        labels = results.get('gt_seg_map')
        if labels is None:
            return results  # mmseg's inferencer reads no labels
        wrong = (labels >= self.num_classes) & (labels != self.ignore_index)
        if wrong.any():
            values = np.unique(labels[wrong]).tolist()
            raise LabelError(
                f'{results["seg_map_path"]}: label values {values} are '
                f'outside the classes: allowed are 0 to '
                f'{self.num_classes - 1} and {self.ignore_index} (ignored)'
                + (
                    ", after the file's values have been reduced by 1"
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
