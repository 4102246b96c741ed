"""Digit scenes as a COCO dataset of mmdet.

This module requires mmdet, so ``import mmvvt`` does not import it. Configs
import it with ``custom_imports``.
"""

import os
from typing import List

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from .digit_scenes import PALETTE, write_digit_scenes

CLASSES = tuple('0123456789')


@DATASETS.register_module()
class DigitScenesCoco(CocoDataset):
    """Scenes of handwritten digits, for detection.

    It reads the boxes and masks written by :func:`write_digit_scenes`.

    Args:
        data_root (str): Folder with the scenes.
        download (bool): Whether to write the scenes if ``data_root`` is
            missing or empty. The argument is named as in torchvision, but
            nothing is downloaded from a network. Defaults to True.
        **kwargs: Arguments of mmdet's ``CocoDataset``.
    """

    METAINFO = dict(
        classes=CLASSES, palette=[tuple(rgb) for rgb in PALETTE[:10]]
    )

    def __init__(self, data_root: str, download: bool = True, **kwargs):
        self.download = download
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> List[dict]:
        """List each scene with its ``instances``."""
        there = os.path.isdir(self.data_root) and os.listdir(self.data_root)
        if self.download and not there:
            write_digit_scenes(self.data_root)
        return super().load_data_list()
