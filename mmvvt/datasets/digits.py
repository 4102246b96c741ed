"""Handwritten digits of scikit-learn as image files."""

import os
from typing import Dict, Tuple

import mmcv
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from ..errors import MissingFileError, UserError
from ..fileio import atomic_write

SPLITS = ('train', 'val')
HELD_OUT = 0.2


def split_digits() -> Tuple[np.ndarray, np.ndarray, Dict[str, np.ndarray]]:
    """Load the scans and split them into training and validation sets.

    Returns:
        tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]: Images
        ``(1797, 8, 8)`` with values 0 to 16, labels ``(1797,)``, and the
        indices of the scans of 'train' and 'val'. The split is fixed and
        stratified, 80 % / 20 %.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    members = train_test_split(
        np.arange(len(digits.target)),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=0,
    )
    return digits.images, digits.target, dict(zip(SPLITS, members))


def write_digits(data_root: str) -> None:
    """Write the 1 797 scans as ``data_root/{train,val}/{0..9}/NNNN.png``.

    The scans (8 x 8 pixels, 17 grey levels) are the test set of UCI's
    *Optical Recognition of Handwritten Digits* and are included in
    scikit-learn. The split is fixed and stratified, 80 % / 20 %; NNNN is the
    index of the scan in scikit-learn. The folder is written atomically, so
    several processes may call this function at the same time.

    Args:
        data_root (str): Folder to create.

    Raises:
        WriteError: If the folder cannot be written.
    """
    images, labels, members = split_digits()
    with atomic_write(data_root, is_dir=True) as folder:
        for split in SPLITS:
            for number in members[split]:
                # Map the grey levels 0 to 16 to 8 bits.
                image = np.rint(images[number] * (255 / 16))
                mmcv.imwrite(
                    image.astype(np.uint8),
                    os.path.join(
                        folder, split, str(labels[number]), f'{number:04d}.png'
                    ),
                )


@DATASETS.register_module()
class Digits(BaseDataset):
    """Handwritten digits of scikit-learn, for image classification.

    It reads the layout written by :func:`write_digits`, one folder per class.

    Args:
        data_root (str): Folder with the images.
        split (str): 'train' (1 437 scans) or 'val' (360 scans).
        download (bool): Whether to write the images if ``data_root`` is
            missing or empty. The argument is named as in torchvision, but
            nothing is downloaded from a network. Defaults to True.
        **kwargs: Arguments of mmengine's ``BaseDataset``.

    Raises:
        UserError: If ``split`` is unknown.
        MissingFileError: If images are missing, and ``download`` is False or
            ``data_root`` is not empty.
    """

    METAINFO = dict(classes=tuple('0123456789'))

    def __init__(
        self, data_root: str, split: str, download: bool = True, **kwargs
    ):
        if split not in SPLITS:
            raise UserError(f'split must be one of {SPLITS}, got {split!r}')
        self.split = split
        self.download = download
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self):
        """List ``img_path`` and ``gt_label`` of each image."""
        there = os.path.isdir(self.data_root) and os.listdir(self.data_root)
        if self.download and not there:
            write_digits(self.data_root)
        folder = os.path.join(self.data_root, self.split)
        data_list = []
        for label, name in enumerate(self.metainfo['classes']):
            class_folder = os.path.join(folder, name)
            if not os.path.isdir(class_folder):
                raise MissingFileError(
                    f'no images of class {name} in {folder}; remove '
                    f'{self.data_root} to write it again'
                )
            data_list += [
                dict(img_path=os.path.join(class_folder, file), gt_label=label)
                for file in sorted(os.listdir(class_folder))
            ]
        return data_list
