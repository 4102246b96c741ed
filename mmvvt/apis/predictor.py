"""Inference on images with a trained model, with visualization."""

import os
import warnings
from abc import ABC, abstractmethod
from typing import Callable, Dict, Iterator, List, Optional, Tuple, Union

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
TOP = 5  # number of classes in a classification result
# Exceptions that a pipeline or a model may raise for an image that is too
# small, has an extreme aspect ratio or does not fit into memory.
FAULTS = (AssertionError, MemoryError, RuntimeError, ValueError, cv2.error)


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
    """Base class of tasks: inferencer and format of the results."""

    name = ''

    @abstractmethod
    def build_inferencer(self, cfg: Config, device: str):
        """Build the OpenMMLab inferencer of the task with random weights."""

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
    """Semantic segmentation: a class for each pixel."""

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
    """Object detection and instance segmentation."""

    name = 'detection'

    def build_inferencer(self, cfg, device):
        from mmdet.apis import DetInferencer

        cfg.visualizer = dict(type='DetLocalVisualizer')
        # With a palette, the inferencer does not need the dataset.
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


TASKS: Dict[str, Callable[[], _Task]] = dict(
    mmpretrain=_Classification, mmseg=_Segmentation, mmdet=_Detection
)


class Predictor:
    """Run inference with a trained classifier, segmentor or detector.

    The task is determined by the ``default_scope`` of the config. Class
    names are read from the checkpoint. If it has none, those of the test
    dataset of the config are used, and otherwise ``class 0``, ``class 1``
    and so on.

    Example:
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
                # Inferencers warn about random weights; we load them below.
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
        """Task: 'classification', 'segmentation' or 'detection'."""
        return self._task.name

    def name(self, label: int) -> str:
        """Return the name of a class."""
        if label < len(self.classes):
            return str(self.classes[label])
        return f'class {label}'

    def colour(self, label: int) -> Colour:
        """Return the RGB colour of a class."""
        if label < len(self.palette):
            return tuple(self.palette[label])
        return distinct_colour(label)

    def read(self, path: str) -> np.ndarray:
        """Read an image in the format of the model: BGR or grayscale.

        Args:
            path (str): Path of the image.

        Returns:
            np.ndarray: Image of shape ``(H, W, 3)`` or ``(H, W)``, uint8.

        Raises:
            UserError: If the file cannot be read as an image.
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
        """Predict one image and return the data sample.

        Images are not batched: mmseg does not support batches of different
        sizes, and mmdet pads the images of a batch to the same size, which
        would make predictions depend on the other images.

        Args:
            image (np.ndarray): Image of shape ``(H, W, 3)`` or ``(H, W)``,
                uint8, as returned by :meth:`read`.

        Returns:
            BaseDataElement: Prediction on the CPU.
        """
        (data,) = self.inferencer.preprocess([image], batch_size=1)
        if not isinstance(data, dict):
            _, data = data  # mmdet returns (images, data)
        (sample,) = self.inferencer.forward(data)
        return sample.cpu()

    def __call__(self, image: Union[str, np.ndarray]) -> dict:
        """Predict one image.

        Args:
            image (str | np.ndarray): Path of an image, or BGR array of shape
                ``(H, W, 3)``, uint8. Models with one input channel take
                arrays of shape ``(H, W)``.

        Returns:
            dict: Results that can be serialized as JSON: ``labels``,
            ``classes`` and, depending on the task, ``scores``, ``shares``
            (fractions of the pixels), ``boxes`` and ``masks``.

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
            except FAULTS as error:
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                yield dict(entry, reason=reason)
                continue
            for kind, picture in pictures.items():
                entry[kind] = os.path.join(f'{kind}s', f'{file}.png')
                _write_png(os.path.join(out_dir, entry[kind]), picture)
            yield dict(entry, **numbers)
