"""Inference on images with a trained model, with visualization."""

import os
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type, Union

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.structures import BaseDataElement
from mmengine.utils import scandir

from ..errors import UserError
from ..fileio import atomic_write
from ..preflight import class_names, read_config
from ..visualization.predictions import (
    Colour,
    distinct_colour,
    draw_classification,
    draw_detection,
    draw_segmentation,
)
from .loading import load_model
from .pipeline import TestPipeline

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
TOP = 5  # number of classes in a classification result
# Exceptions that a model may raise for an image that is too small, has an
# extreme aspect ratio or does not fit into memory.
FAULTS = (AssertionError, MemoryError, RuntimeError, ValueError, cv2.error)


@contextmanager
def faults_as_user_errors() -> Iterator[None]:
    """Raise what a model raises for an unsuitable image as a UserError.

    Raises:
        UserError: With the first line of the message, if the block raises one
            of :data:`FAULTS`.
    """
    try:
        yield
    except UserError:
        raise
    except FAULTS as error:
        lines = str(error).strip().splitlines()
        raise UserError(lines[0] if lines else type(error).__name__) from error


def find_images(source: str, out_dir: str) -> Tuple[str, List[str]]:
    """Find the images of a file or of a folder and its subfolders.

    Args:
        source (str): Path of a file with any suffix, or of a folder.
        out_dir (str): Output folder. Files in it are excluded.

    Returns:
        tuple[str, list[str]]: A folder, and sorted paths relative to it.

    Raises:
        UserError: If the source does not exist, cannot be read, contains no
            images or is inside the output folder.
    """
    if os.path.isfile(source):
        folder, name = os.path.split(source)
        return folder, [name]
    if not os.path.isdir(source):
        raise UserError(f'no such image or folder: {source}')
    folder, out = os.path.realpath(source), os.path.realpath(out_dir)
    if os.path.commonpath([folder, out]) == out:
        raise UserError(
            f'--out-dir {out_dir} contains the input images; use a different '
            'folder'
        )
    try:
        files = [
            file
            for file in scandir(
                source, SUFFIXES, recursive=True, case_sensitive=False
            )
            if not os.path.join(folder, file).startswith(os.path.join(out, ''))
        ]
    except OSError as error:  # a subfolder without read permission
        raise UserError(
            f'cannot read {error.filename}: {error.strerror}'
        ) from error
    if not files:
        raise UserError(
            f'no images in {source}: looked for {", ".join(SUFFIXES)}'
        )
    return source, sorted(files)


def choose_device(name: Optional[str] = None) -> str:
    """Select the device to run on and check that it is available.

    Args:
        name (str, optional): Name of a device, such as 'cpu' or 'cuda:1'.
            Defaults to None, which selects 'cuda' if there is a GPU and
            'cpu' otherwise.

    Returns:
        str: Name of the device.

    Raises:
        UserError: If PyTorch cannot use the device.
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
    """Write an RGB image ``(H, W, 3)`` or a label map ``(H, W)``."""
    if picture.ndim == 3:
        picture = mmcv.rgb2bgr(picture)
    data = cv2.imencode('.png', picture)[1].tobytes()
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        file.write(data)


def _rounded(values, digits: int) -> list:
    """Convert an array to a list of numbers, rounded to some digits."""
    return np.asarray(values, np.float64).round(digits).tolist()


def _run_lengths(mask: np.ndarray) -> dict:
    """Encode a boolean mask ``(H, W)`` as compressed COCO RLE."""
    from pycocotools.mask import encode

    code = encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(code['size']), counts=code['counts'].decode())


# -- one class for each task --------------------------------------------------


class _Task(ABC):
    """Base class of tasks: name and format of the results."""

    name = ''

    @abstractmethod
    def describe(
        self,
        predictor: 'Predictor',
        image: np.ndarray,
        sample: BaseDataElement,
    ) -> tuple:
        """Convert a prediction to serializable results and pictures.

        Args:
            predictor (Predictor): Provides class names and colours.
            image (np.ndarray): RGB image of shape ``(H, W, 3)``, uint8.
            sample (BaseDataElement): Prediction on the CPU.

        Returns:
            tuple[dict, dict[str, np.ndarray]]: Results that can be
            serialized as JSON, and pictures by kind.
        """


class _Classification(_Task):
    """Image classification: top-5 classes with scores."""

    name = 'classification'

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
    """Semantic segmentation: a class for each pixel."""

    name = 'segmentation'

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
    """Object detection and instance segmentation."""

    name = 'detection'

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


# The base classes of the models of mmpretrain, mmseg and mmdet.
TASKS: Dict[Tuple[str, str], Type[_Task]] = {
    ('mmpretrain', 'BaseClassifier'): _Classification,
    ('mmseg', 'BaseSegmentor'): _Segmentation,
    ('mmdet', 'BaseDetector'): _Detection,
}


def _find_task(model: torch.nn.Module, cfg: Config) -> _Task:
    for cls in type(model).__mro__:
        key = (cls.__module__.partition('.')[0], cls.__name__)
        if key in TASKS:
            return TASKS[key]()
    raise UserError(
        f'the model of {cfg.filename} must be a classifier of mmpretrain, a '
        'segmentor of mmseg or a detector of mmdet, got '
        f'{type(model).__name__}'
    )


class Predictor:
    """Run inference with a trained classifier, segmentor or detector.

    Images are loaded and transformed by the pipeline of the config's test
    dataset, as ``tools/test.py`` does, so predictions are the same. Class
    names are read from the checkpoint. If it has none, those of the test
    dataset of the config are used, and otherwise ``class 0``, ``class 1``
    and so on.

    Examples:
        >>> from mmvvt.apis import Predictor
        >>> predictor = Predictor(
        ...     'configs/demo/vvt-nano_digits.py',
        ...     'work_dirs/vvt-nano_digits/epoch_30.pth')
        >>> predictor('digit.png')['classes']

    Args:
        config (str | Config): Config, or path of a config file.
        checkpoint (str): Path or URL of a checkpoint.
        device (str, optional): Device to run on, such as 'cpu' or 'cuda:0'.
            Defaults to None, which selects the GPU if there is one and the
            CPU otherwise.
        score_thr (float): Minimum score of detections, from 0 to 1.
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
        model, meta = load_model(cfg, checkpoint)
        self._task = _find_task(model, cfg)
        self.pipeline = TestPipeline(cfg)
        # Synchronised batch norm needs a GPU, even in evaluation mode.
        self.model: Any = revert_sync_batchnorm(model)
        self.model.to(self.device).eval()
        names = class_names(cfg, meta)
        self.classes: List[str] = names['classes']
        self.palette: List[Colour] = names['palette']

    @property
    def task(self) -> str:
        """Task: 'classification', 'segmentation' or 'detection'."""
        return self._task.name

    def name(self, label: int) -> str:
        """Return the name of a class."""
        if label < len(self.classes):
            return self.classes[label]
        return f'class {label}'

    def colour(self, label: int) -> Colour:
        """Return the RGB colour of a class."""
        if label < len(self.palette):
            return self.palette[label]
        return distinct_colour(label)

    def predict(self, batch: dict) -> BaseDataElement:
        """Predict one image and return the data sample.

        Images are not batched: mmseg does not support batches of different
        sizes, and mmdet pads the images of a batch to the same size, which
        would make predictions depend on the other images.

        Args:
            batch (dict): Batch of one image, as returned by
                :class:`~mmvvt.apis.pipeline.TestPipeline`.

        Returns:
            BaseDataElement: Prediction on the CPU.

        Raises:
            UserError: If the model cannot process the image; for example, if
                the image is too small or has a wrong number of channels.
        """
        self.check_channels(batch)
        with faults_as_user_errors(), torch.no_grad():
            (sample,) = self.model.test_step(batch)
        return sample.cpu()

    def check_channels(self, batch: dict) -> None:
        """Check that an image has the channels that the model takes.

        Args:
            batch (dict): Batch of one image, as returned by
                :class:`~mmvvt.apis.pipeline.TestPipeline`.

        Raises:
            UserError: If the number of channels is wrong.
        """
        wanted = getattr(
            getattr(self.model, 'backbone', None), 'in_channels', None
        )
        inputs = batch['inputs'][0] if isinstance(batch, dict) else None
        if not isinstance(inputs, torch.Tensor) or wanted is None:
            return
        # (C, H, W), before the data preprocessor
        if inputs.dim() == 3 and inputs.shape[0] != wanted:
            raise UserError(
                f'the image has {inputs.shape[0]} channels after the test '
                f'pipeline of the config, the model takes {wanted}'
            )

    def __call__(self, image: Union[str, np.ndarray]) -> dict:
        """Predict one image.

        Args:
            image (str | np.ndarray): Path of an image, or an array as
                ``mmcv.imread`` returns it: BGR of shape ``(H, W, 3)``, uint8.
                If the pipeline of the config loads images in another format,
                such as grayscale or 16 bits, an array of that format.

        Returns:
            dict: Results that can be serialized as JSON: ``labels``,
            ``classes`` and, depending on the task, ``scores``, ``shares``
            (fractions of the pixels), ``boxes`` and ``masks``.

        Raises:
            UserError: If the file cannot be read as an image, does not fit
                the pipeline, or cannot be processed by the model.
        """
        return self._describe(image)[0]

    def _describe(self, image: Union[str, np.ndarray]) -> tuple:
        batch, shown = self.pipeline(image)
        return self._task.describe(self, shown, self.predict(batch))

    def run(
        self, folder: str, files: List[str], out_dir: str
    ) -> Iterator[Dict]:
        """Predict images and write the visualizations.

        Args:
            folder (str): Folder that contains the images.
            files (list[str]): Paths of the images, relative to ``folder``.
            out_dir (str): Output folder. The visualization of an image is
                written to ``pictures/FILE.png`` in this folder.

        Yields:
            dict: For each image, ``file`` and the results, including the
            paths of its pictures relative to ``out_dir``. For a skipped
            image, ``file`` and ``reason``.
        """
        for file in files:
            entry = dict(file=os.path.join(folder, file))
            try:
                numbers, pictures = self._describe(entry['file'])
            except UserError as error:
                yield dict(entry, reason=str(error))
                continue
            for kind, picture in pictures.items():
                entry[kind] = os.path.join(f'{kind}s', f'{file}.png')
                _write_png(os.path.join(out_dir, entry[kind]), picture)
            yield dict(entry, **numbers)
