"""Images through a trained model: pictures, label maps, plain numbers."""

import json
import os
import warnings
from abc import ABC, abstractmethod
from typing import Dict, Iterator, List, Tuple

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement
from mmengine.utils import scandir

from ..engine.cli import (INSTALL_HINTS, check_checkpoint, dataset_class,
                          fail)
from .inference_pictures import (Colour, distinct_colour, draw_classification,
                                 draw_detection, draw_segmentation)

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
            '.webp')
TOP = 5  # classes that a classifier's result names
# What an image can bring about in a pipeline or a network: too small, of
# extreme shape, too large for the memory.
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
        fail(f'no such image or folder: {source}')
    folder, out = os.path.realpath(source), os.path.realpath(out_dir)
    if os.path.commonpath([folder, out]) == out:
        fail(f'--out-dir {out_dir} holds the images: give a folder of its own')
    try:
        files = [
            file for file in scandir(
                source, SUFFIXES, recursive=True, case_sensitive=False)
            if not os.path.join(folder, file).startswith(os.path.join(out, ''))
        ]
    except OSError as error:  # a subfolder of someone else
        fail(f'cannot read {error.filename}: {error.strerror}')
    if not files:
        fail(f'no images in {source}: looked for {", ".join(SUFFIXES)}')
    return source, sorted(files)


def write_whole(path: str, data: bytes) -> None:
    """Write a file whole or not at all, its folder too where absent.

    Args:
        path (str): File to write.
        data (bytes): What to write.
    """
    temporary = f'{path}.tmp'
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.isfile(temporary):
            os.unlink(temporary)
        fail(f'cannot write {path}: {error.strerror}')


def write_json(path: str, content: dict) -> None:
    """Write plain numbers and words as JSON, whole or not at all.

    Args:
        path (str): File to write.
        content (dict): What to write.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, text.encode())


def _write_png(path: str, picture: np.ndarray) -> None:
    """Write RGB ``(H, W, 3)``, or labels ``(H, W)``."""
    if picture.ndim == 3:
        picture = mmcv.rgb2bgr(picture)
    write_whole(path, cv2.imencode('.png', picture)[1].tobytes())


def _rounded(values, digits: int) -> list:
    """Plain numbers of an array, with no more digits than mean something."""
    return np.asarray(values, np.float64).round(digits).tolist()


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's compressed code of a boolean ``(H, W)``."""
    from pycocotools.mask import encode
    code = encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(code['size']), counts=code['counts'].decode())


# -- a model and what it says -------------------------------------------------


class Predictor(ABC):
    """A trained model that says something of images; one class a task.

    Names of classes are the checkpoint's, else those of the config's test
    data set, else ``class 0``, ``class 1`` and so on.

    Args:
        cfg (Config): Of :func:`mmvvt.engine.cli.read_config`.
        checkpoint (str): Its weights.
        device (str): Where to run, such as 'cpu' or 'cuda:0'.
        score_thr (float): Least score of a detection. Defaults to 0.3.
    """

    task = ''

    def __init__(self,
                 cfg: Config,
                 checkpoint: str,
                 device: str,
                 score_thr: float = 0.3):
        if cfg.get('test_dataloader') is None:
            fail(f'{cfg.filename} has no test_dataloader, whose pipeline '
                 'prepares the images')
        self.score_thr = score_thr
        with warnings.catch_warnings():
            # The inferencers warn of random weights; ours follow.
            warnings.simplefilter('ignore')
            self.inferencer = self.build_inferencer(cfg, device)
        model = self.inferencer.model
        check_checkpoint(checkpoint, model)
        meta = load_checkpoint(
            model, checkpoint, map_location='cpu',
            logger='silent').get('meta', {}).get('dataset_meta') or {}
        meta = {key.lower(): value for key, value in meta.items()}
        if not meta.get('classes'):
            dataset = cfg.test_dataloader.dataset
            meta = {
                **getattr(dataset_class(dataset), 'METAINFO', {}),
                **(dataset.get('metainfo') or {})
            }
        self.classes = list(meta.get('classes') or [])
        self.palette = list(meta.get('palette') or [])
        mean = getattr(model.data_preprocessor, 'mean', None)
        grey = mean is not None and mean.numel() == 1
        self.flag = 'grayscale' if grey else 'color'

    @abstractmethod
    def build_inferencer(self, cfg: Config, device: str):
        """Build the code base's inferencer, with random weights."""

    @abstractmethod
    def describe(self, image: np.ndarray, sample: BaseDataElement) -> tuple:
        """Put a prediction into numbers and pictures.

        Args:
            image (np.ndarray): ``(H, W, 3)``, uint8, RGB.
            sample (BaseDataElement): The prediction, on the CPU.

        Returns:
            tuple[dict, dict[str, np.ndarray]]: What JSON takes, and pictures
            by what they are.
        """

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
            ValueError: If that cannot be done, with the reason.
        """
        try:
            image = mmcv.imread(path, flag=self.flag)
        except OSError as error:
            raise ValueError(error.strerror) from error
        except cv2.error:  # an empty file
            image = None
        if image is None:
            raise ValueError('cannot be read as an image')
        return image

    def predict(self, image: np.ndarray) -> BaseDataElement:
        """Say what an image shows.

        One image at a time: mmseg takes no batch of several sizes, and in
        mmdet's an image is padded to the size of its neighbours, on which the
        answer would then depend.
        """
        data, = self.inferencer.preprocess([image], batch_size=1)
        if not isinstance(data, dict):
            _, data = data  # mmdet has the image stand before it
        sample, = self.inferencer.forward(data)
        return sample.cpu()

    def run(self, folder: str, files: List[str],
            out_dir: str) -> Iterator[Dict]:
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
                image = self.read(entry['file'])
                shown = mmcv.gray2rgb(image) if image.ndim == 2 \
                    else mmcv.bgr2rgb(image)
                numbers, pictures = self.describe(shown, self.predict(image))
            except FAULTS as error:
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                yield dict(entry, reason=reason)
                continue
            for kind, picture in pictures.items():
                entry[kind] = os.path.join(f'{kind}s', f'{file}.png')
                _write_png(os.path.join(out_dir, entry[kind]), picture)
            yield dict(entry, **numbers)


class Classifier(Predictor):
    """Names the likeliest classes of an image."""

    task = 'classification'

    def build_inferencer(self, cfg, device):
        from mmpretrain import ImageClassificationInferencer
        return ImageClassificationInferencer(
            cfg, pretrained=False, device=device)

    def describe(self, image, sample):
        scores, labels = sample.pred_score.float().sort(descending=True)
        if not scores.isfinite().all():
            raise ValueError('the scores are not finite')
        labels = labels[:TOP].tolist()
        numbers = dict(
            labels=labels,
            classes=[self.name(label) for label in labels],
            scores=_rounded(scores[:TOP], 6))
        picture = draw_classification(image, numbers['classes'],
                                      numbers['scores'])
        return numbers, dict(picture=picture)


class Segmenter(Predictor):
    """Gives each pixel of an image a class."""

    task = 'segmentation'

    def build_inferencer(self, cfg, device):
        from mmseg.apis import MMSegInferencer
        cfg.visualizer = dict(type='SegLocalVisualizer')
        return MMSegInferencer(cfg, device=device)

    def describe(self, image, sample):
        labels = sample.pred_sem_seg.data.squeeze(0).numpy()  # (H, W)
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        counts = np.bincount(labels.ravel())
        present = [i for i in np.argsort(-counts, kind='stable') if counts[i]]
        numbers = dict(
            labels=[int(label) for label in present],
            classes=[self.name(label) for label in present],
            shares=_rounded(counts[present] / labels.size, 6))
        picture = draw_segmentation(
            image, labels, [self.colour(i) for i in range(len(counts))],
            list(zip(*numbers.values())))
        return numbers, dict(picture=picture, label_map=labels)


class Detector(Predictor):
    """Finds objects in an image: boxes, and masks if the model has them."""

    task = 'detection'

    def build_inferencer(self, cfg, device):
        from mmdet.apis import DetInferencer
        cfg.visualizer = dict(type='DetLocalVisualizer')
        # Given a palette, it does without the data set.
        return DetInferencer(cfg, device=device, palette='random')

    def describe(self, image, sample):
        found = sample.pred_instances
        found = found[found.scores >= self.score_thr]
        found = found[found.scores.argsort(descending=True)]
        labels = found.labels.tolist()
        numbers = dict(
            labels=labels,
            classes=[self.name(label) for label in labels],
            scores=_rounded(found.scores, 6),
            boxes=_rounded(found.bboxes, 2))
        masks = None
        if 'masks' in found:
            masks = np.asarray(found.masks)
            numbers['masks'] = [_run_lengths(mask) for mask in masks]
        picture = draw_detection(image, found.bboxes.numpy(),
                                 numbers['classes'], numbers['scores'],
                                 [self.colour(i) for i in labels], masks)
        return numbers, dict(picture=picture)


PREDICTORS = dict(mmpretrain=Classifier, mmseg=Segmenter, mmdet=Detector)


def build_predictor(cfg: Config, checkpoint: str, device: str,
                    score_thr: float) -> Predictor:
    """Build what the config's ``default_scope`` asks for.

    Args:
        cfg (Config): Of :func:`mmvvt.engine.cli.read_config`.
        checkpoint (str): Its weights.
        device (str): Where to run, such as 'cpu' or 'cuda:0'.
        score_thr (float): Least score of a detection.

    Returns:
        Predictor: Ready to run.
    """
    scope = cfg.get('default_scope')
    if scope not in PREDICTORS:
        fail(f'default_scope of {cfg.filename} must be one of '
             f'{", ".join(PREDICTORS)}, got {scope}')
    if not os.path.isfile(checkpoint) and '://' not in checkpoint:
        fail(f'no such checkpoint file: {checkpoint}')
    try:
        return PREDICTORS[scope](cfg, checkpoint, device, score_thr)
    except ModuleNotFoundError as error:  # mmcv's compiled ops
        fail(f'{cfg.filename} needs the package {error.name}, which is not '
             f'installed: {INSTALL_HINTS[scope]}')
