"""The digit scenes as mmdet's COCO data set; needs mmdet, unlike the rest.

``import mmvvt`` leaves it out: a config names it under ``custom_imports``.
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

    Reads boxes and masks that :func:`write_digit_scenes` makes.

    Args:
        data_root (str): Folder with the scenes.
        download (bool): Write the scenes where ``data_root`` is not there, or
            empty. (The word is torchvision's; nothing is fetched from a
            network.) Defaults to True.
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
