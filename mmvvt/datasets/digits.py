"""scikit-learn's handwritten digits as image files."""

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
    """The scans, and which of them are held out.

    Returns:
        tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]: Images
        ``(1797, 8, 8)`` with values 0 to 16, labels ``(1797,)``, and the
        numbers of the scans of 'train' and 'val': fixed, stratified,
        80 / 20.
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

    The scans (8 x 8 pixels, 17 grey levels; UCI's *Optical Recognition of
    Handwritten Digits*) ship inside the scikit-learn wheel. The split is
    fixed and stratified, 80 / 20; NNNN is the scan's number in scikit-learn's
    order. The folder appears whole or not at all, so several processes may
    call this at once.

    Args:
        data_root (str): Folder to make.
    """
    images, labels, members = split_digits()
    with atomic_write(data_root, is_dir=True) as folder:
        for split in SPLITS:
            for number in members[split]:
                # 17 grey levels, 0 to 16, to 8 bits
                image = np.rint(images[number] * (255 / 16))
                mmcv.imwrite(
                    image.astype(np.uint8),
                    os.path.join(
                        folder, split, str(labels[number]), f'{number:04d}.png'
                    ),
                )


@DATASETS.register_module()
class Digits(BaseDataset):
    """scikit-learn's handwritten digits, for classification.

    Reads the layout that :func:`write_digits` makes, one folder a class.

    Args:
        data_root (str): Folder with the images.
        split (str): 'train' (1 437 scans) or 'val' (360 scans).
        download (bool): Write the images where ``data_root`` is not there, or
            empty. (The word is torchvision's; nothing is fetched from a
            network.) Defaults to True.
        **kwargs: Arguments of mmengine's ``BaseDataset``.

    Raises:
        UserError: If ``split`` is another word.
        MissingFileError: If the images are not there and not to be written.
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
                    f'{self.data_root} to have it written anew'
                )
            data_list += [
                dict(img_path=os.path.join(class_folder, file), gt_label=label)
                for file in sorted(os.listdir(class_folder))
            ]
        return data_list
