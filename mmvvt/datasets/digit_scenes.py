"""Scenes of handwritten digits on photographs, with a label for each pixel.

The scans and photographs are real and are included in scikit-learn and
scikit-image. The scenes are composed from them with seeded random numbers.
"""

import json
import math
import os
from dataclasses import dataclass
from importlib import resources
from typing import Dict, List, Tuple

import cv2
import mmcv
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from numpy.random import Generator

from ..errors import MissingFileError, UserError
from ..fileio import atomic_write
from .digits import SPLITS, split_digits

CLASSES = (*'0123456789', 'background')
BACKGROUND = CLASSES.index('background')
# RGB; the background is almost white, so that visualisations stay light.
PALETTE = [
    [228, 26, 28],
    [55, 126, 184],
    [77, 175, 74],
    [152, 78, 163],
    [255, 127, 0],
    [240, 220, 40],
    [166, 86, 40],
    [247, 129, 191],
    [0, 190, 190],
    [60, 60, 60],
    [240, 240, 240],
]

# Files included in the packages, so that nothing is downloaded. The splits do
# not share photographs.
PHOTOGRAPHS = {
    'train': (
        'sklearn/datasets/images/china.jpg',
        'skimage/data/astronaut.png',
        'skimage/data/coffee.png',
        'skimage/data/motorcycle_left.png',
        'skimage/data/rocket.jpg',
        'skimage/data/hubble_deep_field.jpg',
        'skimage/data/grass.png',
        'skimage/data/brick.png',
    ),
    'val': (
        'sklearn/datasets/images/flower.jpg',
        'skimage/data/chelsea.png',
        'skimage/data/coins.png',
        'skimage/data/camera.png',
    ),
}
FOLDERS = {'train': 'training', 'val': 'validation'}
NUM_SCENES = {'train': 3000, 'val': 200}

SIZE = 128  # Height and width of a scene, in pixels
DIGITS_PER_SCENE = (3, 5)
DIGIT_HEIGHT = (36, 72)  # Of a scan with its margin, in pixels
MAX_ANGLE = 12.0  # In degrees
MIN_CONTRAST = 90  # Between ink and background, of 255
MIN_VISIBLE = 0.8  # Minimum visible fraction of the pixels of a digit
PLACEMENTS = 40  # Attempts to place a digit before it is omitted


@dataclass
class Instance:
    """One digit of a scene.

    Attributes:
        label (int): Class, 0 to 9.
        scan (int): Index of the scan in scikit-learn.
        mask (np.ndarray): Visible pixels, boolean ``(SIZE, SIZE)``.
    """

    label: int
    scan: int
    mask: np.ndarray


@dataclass
class Scene:
    """A composed image.

    Attributes:
        image (np.ndarray): RGB image ``(SIZE, SIZE, 3)``, uint8.
        photograph (str): Name of the photograph in the background.
        instances (list[Instance]): Digits from back to front.
    """

    image: np.ndarray
    photograph: str
    instances: List[Instance]

    @property
    def labels(self) -> np.ndarray:
        """Class of each pixel, ``(SIZE, SIZE)``, uint8."""
        labels = np.full(self.image.shape[:2], BACKGROUND, np.uint8)
        for instance in self.instances:
            labels[instance.mask] = instance.label
        return labels


def load_photographs(split: str) -> Dict[str, np.ndarray]:
    """Read the photographs of a split.

    Args:
        split (str): 'train' or 'val'.

    Returns:
        dict[str, np.ndarray]: RGB images ``(H, W, 3)``, uint8, by name.

    Raises:
        ModuleNotFoundError: If scikit-learn or scikit-image is missing.
    """
    photographs = {}
    for path in PHOTOGRAPHS[split]:
        package, *parts = path.split('/')
        try:
            file = resources.files(package).joinpath(*parts)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'the digit scenes need scikit-learn and scikit-image: pip '
                "install 'mmvvt[development]'"
            ) from error
        photographs[path] = mmcv.imread(str(file), channel_order='rgb')
    return photographs


def _crop(photograph: np.ndarray, rng: Generator) -> np.ndarray:
    """Random square crop, flipped with probability 0.5, (SIZE, SIZE, 3)."""
    height, width = photograph.shape[:2]
    side = int(rng.uniform(0.4, 1.0) * min(height, width))
    top = rng.integers(height - side + 1)
    left = rng.integers(width - side + 1)
    crop = photograph[top : top + side, left : left + side]
    crop = cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _draw(scan: np.ndarray, rng: Generator) -> np.ndarray:
    """Scale and rotate a scan; return its coverage (h, w) from 0 to 1."""
    # Zero padding makes strokes at the border of the scan end smoothly.
    source = np.pad(scan.astype(np.float32) / 16, 1)
    height = rng.uniform(*DIGIT_HEIGHT)
    # Size of the canvas that a scan rotated by MAX_ANGLE needs.
    room = math.ceil(1.2 * height)
    middle = (source.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D(
        (middle, middle),
        rng.uniform(-MAX_ANGLE, MAX_ANGLE),
        height / source.shape[0],
    )
    matrix[:, 2] += (room - 1) / 2 - middle
    coverage = cv2.warpAffine(
        source, matrix, (room, room), flags=cv2.INTER_CUBIC
    )
    # Strokes have soft grey edges in the scans: sharpen them.
    coverage = np.clip(2.5 * coverage - 0.75, 0, 1)
    rows, columns = (np.flatnonzero(coverage.any(axis=i)) for i in (1, 0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _choose_ink(
    brightness: np.ndarray, tint: np.ndarray
) -> Tuple[np.ndarray, float]:
    """Choose a light or dark ink that contrasts with the background.

    Args:
        brightness (np.ndarray): Brightness ``(n,)`` of the background pixels
            that the digit covers, 0 to 255.
        tint (np.ndarray): RGB difference ``(3,)`` of a dark ink from black,
            or of a light ink from white.

    Returns:
        tuple[np.ndarray, float]: Colour of the ink, RGB, and the difference
        of its brightness from the 90th percentile of the background (light
        ink) or from the 10th percentile (dark ink).
    """
    # Sorting is ten times as fast as np.percentile here.
    brightness = np.sort(brightness)
    low, median, high = (
        brightness[int(part * len(brightness))] for part in (0.1, 0.5, 0.9)
    )
    if median < 128:
        ink = 255 - tint
        return ink, ink.mean() - high
    return tint, low - tint.mean()


def compose_scene(
    photographs: Dict[str, np.ndarray],
    scans: np.ndarray,
    labels: np.ndarray,
    members: np.ndarray,
    rng: Generator,
) -> Scene:
    """Compose a scene of several digits on a crop of a photograph.

    Digits may overlap, but at least :data:`MIN_VISIBLE` of the pixels of each
    digit remain visible. The contrast between ink and background is at least
    :data:`MIN_CONTRAST`.

    Args:
        photographs (dict[str, np.ndarray]): Photographs by name, from
            :func:`load_photographs`.
        scans (np.ndarray): All scans ``(n, 8, 8)``, with values 0 to 16.
        labels (np.ndarray): Labels ``(n,)`` of the scans.
        members (np.ndarray): Indices of the scans that may be used.
        rng (Generator): Random number generator.

    Returns:
        Scene: The image and its instances.
    """
    name = sorted(photographs)[rng.integers(len(photographs))]
    image = _crop(photographs[name], rng).astype(np.float32)
    instances: List[Instance] = []
    # Number of pixels of each digit, in total and currently visible
    whole: List[int] = []
    visible: List[int] = []
    wanted = rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)
    for number in rng.choice(members, wanted, replace=False):
        coverage = _draw(scans[number], rng)
        inked = coverage > 0.5
        height, width = coverage.shape
        tint = rng.uniform(0, 90, size=3)
        tint -= tint.min()
        # (SIZE, SIZE, 3) -> (SIZE, SIZE)
        brightness = image @ np.full(3, 1 / 3, np.float32)
        for _ in range(PLACEMENTS):
            top = rng.integers(SIZE - height + 1)
            left = rng.integers(SIZE - width + 1)
            place = np.s_[top : top + height, left : left + width]
            covered = [
                np.count_nonzero(other.mask[place] & inked)
                for other in instances
            ]
            if any(
                before - lost < MIN_VISIBLE * pixels
                for before, lost, pixels in zip(visible, covered, whole)
            ):
                continue
            ink, contrast = _choose_ink(brightness[place][inked], tint)
            if contrast >= MIN_CONTRAST:
                break
        else:
            continue
        for index, other in enumerate(instances):
            other.mask[place] &= ~inked
            visible[index] -= covered[index]
        mask = np.zeros((SIZE, SIZE), bool)
        mask[place] = inked
        instances.append(Instance(int(labels[number]), int(number), mask))
        whole.append(np.count_nonzero(inked))
        visible.append(whole[-1])
        # (h, w) -> (h, w, 1), broadcast over the channels
        image[place] += coverage[..., None] * (ink - image[place])
    return Scene(np.rint(image).astype(np.uint8), name, instances)


def run_lengths(mask: np.ndarray) -> List[int]:
    """Encode a mask in COCO's uncompressed run-length encoding (RLE).

    Args:
        mask (np.ndarray): Boolean mask ``(H, W)``.

    Returns:
        list[int]: Lengths of the runs in column-major order, starting with a
        run of zeros. They sum to H * W.
    """
    flat = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


def _coco_annotation(instance: Instance) -> dict:
    rows, columns = np.nonzero(instance.mask)
    left, top = int(columns.min()), int(rows.min())
    return dict(
        category_id=instance.label,
        scan=instance.scan,
        bbox=[
            left,
            top,
            int(columns.max()) + 1 - left,
            int(rows.max()) + 1 - top,
        ],
        area=int(instance.mask.sum()),
        iscrowd=0,
        segmentation=dict(
            size=list(instance.mask.shape), counts=run_lengths(instance.mask)
        ),
    )


def _write_split(root: str, split: str, count: int, seed: int) -> None:
    scans, labels, members = split_digits()
    photographs = load_photographs(split)
    coco = dict(
        images=[],
        annotations=[],
        categories=[dict(id=i, name=str(i)) for i in range(10)],
    )
    for number in range(count):
        # Each scene has its own generator, so that scenes do not depend on
        # the total number of scenes.
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        scene = compose_scene(photographs, scans, labels, members[split], rng)
        name = f'{number:05d}'
        folder = FOLDERS[split]
        mmcv.imwrite(
            mmcv.rgb2bgr(scene.image),
            os.path.join(root, 'images', folder, f'{name}.png'),
        )
        mmcv.imwrite(
            scene.labels,
            os.path.join(root, 'annotations', folder, f'{name}.png'),
        )
        coco['images'].append(
            dict(
                id=number,
                file_name=f'{name}.png',
                height=SIZE,
                width=SIZE,
                photograph=scene.photograph,
            )
        )
        for instance in scene.instances:
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,
                    image_id=number,
                    **_coco_annotation(instance),
                )
            )
    with open(
        os.path.join(root, f'instances_{FOLDERS[split]}.json'),
        'w',
        encoding='utf-8',
    ) as file:
        # json.dumps uses the C encoder; json.dump does not.
        file.write(json.dumps(coco))


def write_digit_scenes(
    data_root: str,
    num_train: int = NUM_SCENES['train'],
    num_val: int = NUM_SCENES['val'],
    seed: int = 0,
) -> None:
    """Write scenes in ADE20K's layout, and their instances in COCO's format.

    The files are ``images/{training,validation}/NNNNN.png``,
    ``annotations/{training,validation}/NNNNN.png`` (the value of a pixel is
    its class: 0 to 9, or 10 for background) and
    ``instances_{training,validation}.json`` (boxes and visible masks). The
    same arguments give the same scenes. The folder is written atomically, so
    several processes may call this function at the same time.

    Args:
        data_root (str): Folder to create.
        num_train (int): Number of training scenes. Defaults to 3000.
        num_val (int): Number of validation scenes. They share neither scans
            nor photographs with the training scenes. Defaults to 200.
        seed (int): Random seed. Defaults to 0.

    Raises:
        ModuleNotFoundError: If scikit-learn or scikit-image is missing.
        WriteError: If the folder cannot be written.
    """
    with atomic_write(data_root, is_dir=True) as folder:
        for split, count in (('train', num_train), ('val', num_val)):
            _write_split(folder, split, count, seed)


@DATASETS.register_module()
class DigitScenes(BaseDataset):
    """Scenes of handwritten digits, for semantic segmentation.

    It reads the layout written by :func:`write_digit_scenes` and returns
    samples for mmseg's pipelines. It does not require mmseg itself.

    Args:
        data_root (str): Folder with the scenes.
        split (str): 'train' or 'val'.
        download (bool): Whether to write the scenes if ``data_root`` is
            missing or empty. The argument is named as in torchvision, but
            nothing is downloaded from a network. Defaults to True.
        **kwargs: Arguments of mmengine's ``BaseDataset``.

    Raises:
        UserError: If ``split`` is unknown.
        MissingFileError: If images or annotations are missing, and
            ``download`` is False or ``data_root`` is not empty.
    """

    METAINFO = dict(classes=CLASSES, palette=PALETTE)
    # Attributes of mmseg's datasets, which its confusion_matrix.py reads
    ignore_index = 255
    reduce_zero_label = False

    def __init__(
        self, data_root: str, split: str, download: bool = True, **kwargs
    ):
        if split not in SPLITS:
            raise UserError(f'split must be one of {SPLITS}, got {split!r}')
        self.split = split
        self.download = download
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> List[dict]:
        """List ``img_path`` and ``seg_map_path`` of each scene."""
        there = os.path.isdir(self.data_root) and os.listdir(self.data_root)
        if self.download and not there:
            write_digit_scenes(self.data_root)
        images, annotations = (
            os.path.join(self.data_root, kind, FOLDERS[self.split])
            for kind in ('images', 'annotations')
        )
        for folder in (images, annotations):
            if not os.path.isdir(folder):
                raise MissingFileError(
                    f'no scenes in {folder}; remove {self.data_root} to '
                    'write it again'
                )
        return [
            dict(
                img_path=os.path.join(images, name),
                seg_map_path=os.path.join(annotations, name),
                label_map=None,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[],
            )
            for name in sorted(os.listdir(images))
        ]
