"""Predictions of a trained model for image files: results and pictures."""

import os
import warnings
from abc import ABC, abstractmethod
from typing import Dict, Iterator, List, Optional, Tuple, Union

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement
from mmengine.utils import scandir

from ..errors import UserError
from ..fileio import atomic_write
from ..preflight import (
    INSTALL_HINTS,
    check_checkpoint,
    dataset_class,
    read_config,
)
from ..visualization.predictions import (
    Colour,
    distinct_colour,
    draw_classification,
    draw_detection,
    draw_segmentation,
)

SUFFIXES = (
    '.bmp',
    '.jpeg',
    '.jpg',
    '.pgm',
    '.png',
    '.ppm',
    '.tif',
    '.tiff',
    '.webp',
)
TOP = 5  # classes that a classifier's result names
# What an image can raise in a pipeline or a network: it may be too small, of
# an extreme shape, or too large for the memory.
FAULTS = (AssertionError, MemoryError, RuntimeError, ValueError, cv2.error)


def find_images(source: str, out_dir: str) -> Tuple[str, List[str]]:
    """List an image, or those in a folder and its subfolders.

    Args:
        source (str): A file, taken whatever its suffix, or a folder.
        out_dir (str): Folder of the results; what it holds is left out.

    Returns:
        tuple[str, list[str]]: A folder, and sorted paths relative to it.
    """
    if os.path.isfile(source):
        folder, name = os.path.split(source)
        return folder, [name]
    if not os.path.isdir(source):
        raise UserError(f'no such image or folder: {source}')
    folder, out = os.path.realpath(source), os.path.realpath(out_dir)
    if os.path.commonpath([folder, out]) == out:
        raise UserError(
            f'--out-dir {out_dir} holds the images: give a folder of its own'
        )
    try:
        files = [
            file
            for file in scandir(
                source, SUFFIXES, recursive=True, case_sensitive=False
            )
            if not os.path.join(folder, file).startswith(os.path.join(out, ''))
        ]
    except OSError as error:  # a subfolder of someone else
        raise UserError(
            f'cannot read {error.filename}: {error.strerror}'
        ) from error
    if not files:
        raise UserError(
            f'no images in {source}: looked for {", ".join(SUFFIXES)}'
        )
    return source, sorted(files)


def choose_device(name: Optional[str] = None) -> str:
    """Name of the device to run on, checked.

    Args:
        name (str, optional): Such as 'cpu' or 'cuda:1'. Defaults to None:
            'cuda' if there is a GPU, otherwise 'cpu'.

    Returns:
        str: The name.

    Raises:
        UserError: If PyTorch cannot use the device, with the reason.
    """
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f'device {name} cannot be used: {str(error).splitlines()[0]}'
        ) from error
    return name


def _write_png(path: str, picture: np.ndarray) -> None:
    """Write RGB ``(H, W, 3)``, or labels ``(H, W)``."""
    if picture.ndim == 3:
        picture = mmcv.rgb2bgr(picture)
    data = cv2.imencode('.png', picture)[1].tobytes()
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        file.write(data)


def _rounded(values, digits: int) -> list:
    """Plain numbers of an array, with no more digits than mean something."""
    return np.asarray(values, np.float64).round(digits).tolist()


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's compressed code of a boolean ``(H, W)``."""
    from pycocotools.mask import encode

    code = encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(code['size']), counts=code['counts'].decode())


# -- one class for each task --------------------------------------------------


class _Task(ABC):
    """How one task builds its inferencer and describes a prediction."""

    name = ''

    @abstractmethod
    def build_inferencer(self, cfg: Config, device: str):
        """Build the code base's inferencer, with random weights."""

    @abstractmethod
    def describe(
        self,
        predictor: 'Predictor',
        image: np.ndarray,
        sample: BaseDataElement,
    ) -> tuple:
        """Turn a prediction into numbers and pictures.

        Args:
            predictor (Predictor): Gives names and colours of classes.
            image (np.ndarray): ``(H, W, 3)``, uint8, RGB.
            sample (BaseDataElement): The prediction, on the CPU.

        Returns:
            tuple[dict, dict[str, np.ndarray]]: Plain numbers and strings for
            JSON, and the pictures by kind.
        """


class _Classification(_Task):
    """Names the likeliest classes of an image."""

    name = 'classification'

    def build_inferencer(self, cfg, device):
        from mmpretrain import ImageClassificationInferencer

        return ImageClassificationInferencer(
            cfg, pretrained=False, device=device
        )

    def describe(self, predictor, image, sample):
        scores, labels = sample.pred_score.float().sort(descending=True)
        if not scores.isfinite().all():
            raise UserError('the scores are not finite')
        labels = labels[:TOP].tolist()
        numbers = dict(
            labels=labels,
            classes=[predictor.name(label) for label in labels],
            scores=_rounded(scores[:TOP], 6),
        )
        picture = draw_classification(
            image, numbers['classes'], numbers['scores']
        )
        return numbers, dict(picture=picture)


class _Segmentation(_Task):
    """Gives each pixel of an image a class."""

    name = 'segmentation'

    def build_inferencer(self, cfg, device):
        from mmseg.apis import MMSegInferencer

        cfg.visualizer = dict(type='SegLocalVisualizer')
        return MMSegInferencer(cfg, device=device)

    def describe(self, predictor, image, sample):
        labels = sample.pred_sem_seg.data.squeeze(0).numpy()  # (H, W)
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        counts = np.bincount(labels.ravel())
        present = [i for i in np.argsort(-counts, kind='stable') if counts[i]]
        numbers = dict(
            labels=[int(label) for label in present],
            classes=[predictor.name(label) for label in present],
            shares=_rounded(counts[present] / labels.size, 6),
        )
        picture = draw_segmentation(
            image,
            labels,
            [predictor.colour(i) for i in range(len(counts))],
            list(zip(*numbers.values())),
        )
        return numbers, dict(picture=picture, label_map=labels)


class _Detection(_Task):
    """Finds objects in an image: boxes, and masks if the model has them."""

    name = 'detection'

    def build_inferencer(self, cfg, device):
        from mmdet.apis import DetInferencer

        cfg.visualizer = dict(type='DetLocalVisualizer')
        # Given a palette, it does without the data set.
        return DetInferencer(cfg, device=device, palette='random')

    def describe(self, predictor, image, sample):
        found = sample.pred_instances
        found = found[found.scores >= predictor.score_thr]
        found = found[found.scores.argsort(descending=True)]
        labels = found.labels.tolist()
        numbers = dict(
            labels=labels,
            classes=[predictor.name(label) for label in labels],
            scores=_rounded(found.scores, 6),
            boxes=_rounded(found.bboxes, 2),
        )
        masks = None
        if 'masks' in found:
            masks = np.asarray(found.masks)
            numbers['masks'] = [_run_lengths(mask) for mask in masks]
        picture = draw_detection(
            image,
            found.bboxes.numpy(),
            numbers['classes'],
            numbers['scores'],
            [predictor.colour(i) for i in labels],
            masks,
        )
        return numbers, dict(picture=picture)


TASKS = dict(mmpretrain=_Classification, mmseg=_Segmentation, mmdet=_Detection)


class Predictor:
    """A trained classifier, segmentor or detector, applied to images.

    The config's ``default_scope`` decides the task. Class names are those
    that the checkpoint stores, otherwise those of the config's test data
    set, otherwise ``class 0``, ``class 1`` and so on.

    Example:
        >>> from mmvvt.apis import Predictor
        >>> predictor = Predictor(
        ...     'configs/demo/vvt-nano_digits.py',
        ...     'work_dirs/vvt-nano_digits/epoch_30.pth')
        >>> predictor('digit.png')['classes']

    Args:
        config (str | Config): A config, or the path of one.
        checkpoint (str): File with the weights.
        device (str, optional): Where to run, such as 'cpu' or 'cuda:0'.
            Defaults to None: the GPU if there is one, otherwise the CPU.
        score_thr (float): Minimum score of a detection, from 0 to 1.
            Defaults to 0.3.

    Raises:
        UserError: If the config or the checkpoint cannot be used, a package
            is missing, or an argument is out of range.
    """

    def __init__(
        self,
        config: Union[str, Config],
        checkpoint: str,
        device: Optional[str] = None,
        score_thr: float = 0.3,
    ):
        if not 0 <= score_thr <= 1:
            raise UserError(f'score_thr must be from 0 to 1, got {score_thr}')
        self.score_thr = score_thr
        self.device = choose_device(device)
        cfg = read_config(config)
        scope = cfg.get('default_scope')
        if scope not in TASKS:
            raise UserError(
                f'default_scope of {cfg.filename} must be one of '
                f'{", ".join(TASKS)}, got {scope}'
            )
        if not os.path.isfile(checkpoint) and '://' not in checkpoint:
            raise UserError(f'no such checkpoint file: {checkpoint}')
        if cfg.get('test_dataloader') is None:
            raise UserError(
                f'{cfg.filename} has no test_dataloader, whose '
                'pipeline prepares the images'
            )
        self._task = TASKS[scope]()
        try:
            with warnings.catch_warnings():
                # The inferencers warn of random weights; ours follow.
                warnings.simplefilter('ignore')
                self.inferencer = self._task.build_inferencer(cfg, self.device)
        except ModuleNotFoundError as error:  # mmcv's compiled ops
            raise UserError(
                f'{cfg.filename} needs the package {error.name}, which is '
                f'not installed: {INSTALL_HINTS[scope]}'
            ) from error
        model = self.inferencer.model
        check_checkpoint(checkpoint, model)
        meta = (
            load_checkpoint(
                model, checkpoint, map_location='cpu', logger='silent'
            )
            .get('meta', {})
            .get('dataset_meta')
            or {}
        )
        meta = {key.lower(): value for key, value in meta.items()}
        if not meta.get('classes'):
            dataset = cfg.test_dataloader.dataset
            meta = {
                **getattr(dataset_class(dataset), 'METAINFO', {}),
                **(dataset.get('metainfo') or {}),
            }
        self.classes = list(meta.get('classes') or [])
        self.palette = list(meta.get('palette') or [])
        mean = getattr(model.data_preprocessor, 'mean', None)
        grey = mean is not None and mean.numel() == 1
        self.flag = 'grayscale' if grey else 'color'

    @property
    def task(self) -> str:
        """'classification', 'segmentation' or 'detection'."""
        return self._task.name

    def name(self, label: int) -> str:
        """Name of a class."""
        if label < len(self.classes):
            return str(self.classes[label])
        return f'class {label}'

    def colour(self, label: int) -> Colour:
        """Colour of a class, RGB."""
        if label < len(self.palette):
            return tuple(self.palette[label])
        return distinct_colour(label)

    def read(self, path: str) -> np.ndarray:
        """Read an image as the network takes it: BGR, or grey.

        Raises:
            UserError: If that cannot be done, with the reason.
        """
        try:
            image = mmcv.imread(path, flag=self.flag)
        except OSError as error:
            raise UserError(error.strerror) from error
        except cv2.error:  # an empty file
            image = None
        if image is None:
            raise UserError('cannot be read as an image')
        return image

    def predict(self, image: np.ndarray) -> BaseDataElement:
        """Say what an image shows.

        One image at a time: mmseg takes no batch of several sizes, and in
        mmdet's an image is padded to the size of its neighbours, on which the
        answer would then depend.
        """
        (data,) = self.inferencer.preprocess([image], batch_size=1)
        if not isinstance(data, dict):
            _, data = data  # mmdet has the image stand before it
        (sample,) = self.inferencer.forward(data)
        return sample.cpu()

    def __call__(self, image: Union[str, np.ndarray]) -> dict:
        """Predict one image.

        Args:
            image (str | np.ndarray): A file, or ``(H, W, 3)``, uint8, BGR
                (``(H, W)`` for a model of one channel).

        Returns:
            dict: ``labels``, ``classes`` and, by task, ``scores``,
            ``shares`` of the pixels, ``boxes`` and ``masks``, as plain
            numbers and strings.

        Raises:
            UserError: If the file cannot be read as an image.
        """
        return self._describe(image)[0]

    def _describe(self, image: Union[str, np.ndarray]) -> tuple:
        if isinstance(image, str):
            image = self.read(image)
        shown = (
            mmcv.gray2rgb(image) if image.ndim == 2 else mmcv.bgr2rgb(image)
        )
        return self._task.describe(self, shown, self.predict(image))

    def run(
        self, folder: str, files: List[str], out_dir: str
    ) -> Iterator[Dict]:
        """Predict images, and write the pictures of each.

        Args:
            folder (str): Where the images are.
            files (list[str]): Their paths below it.
            out_dir (str): A picture becomes ``pictures/FILE.png`` here.

        Yields:
            dict: For each image ``file`` and its results, paths relative to
            ``out_dir`` among them; or ``file`` and ``reason``, where it had
            to be skipped.
        """
        for file in files:
            entry = dict(file=os.path.join(folder, file))
            try:
                numbers, pictures = self._describe(entry['file'])
            except FAULTS as error:
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                yield dict(entry, reason=reason)
                continue
            for kind, picture in pictures.items():
                entry[kind] = os.path.join(f'{kind}s', f'{file}.png')
                _write_png(os.path.join(out_dir, entry[kind]), picture)
            yield dict(entry, **numbers)
