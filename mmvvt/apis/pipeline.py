"""The test pipeline of a config, applied to single images."""

from functools import partial
from typing import Any, Callable, Tuple, Union

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import FUNCTIONS

from ..datasets.loading import loads_annotations, loads_files
from ..errors import UserError
from ..preflight import innermost_datasets

# What a dataset gives its pipeline besides the path. mmseg's transforms need
# ``seg_fields``; mmdet's PackDetInputs needs ``img_id``.
SAMPLE = dict(img_id=0, sample_idx=0)


def _flatten(transforms: list) -> list:
    """Replace nested pipelines by their transforms."""
    flat = []
    for transform in transforms:
        if type(transform).__name__ in ('Compose', 'GuardedPipeline'):
            flat += _flatten(transform.transforms)
        else:
            flat.append(transform)
    return flat


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _displayable(image: np.ndarray, rgb: bool) -> np.ndarray:
    """Convert a loaded image to RGB ``(H, W, 3)``, uint8, for display.

    Images with more than 8 bits are stretched from their minimum to their
    maximum. Of images with more than three channels, the first three are
    shown.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]  # (H, W) -> (H, W, 1)
    if image.dtype != np.uint8:
        image = np.nan_to_num(image.astype(np.float64))
        low, high = image.min(), image.max()
        if low < 0 or high > 255:
            image = (image - low) * (255 / max(high - low, 1e-12))
        image = image.round().astype(np.uint8)
    if image.shape[2] < 3:
        return np.repeat(image[..., :1], 3, axis=2)
    image = image[..., :3]
    return np.ascontiguousarray(image if rgb else image[..., ::-1])


class TestPipeline:
    """Load and transform single images as the test dataset of a config does.

    Transforms that load annotations are left out. If the pipeline does not
    load images because the dataset yields arrays, as mmpretrain's CIFAR
    does, images are read in the format that the model expects of the
    dataset: grayscale if it normalises one channel, BGR if its data
    preprocessor converts BGR to RGB, and RGB otherwise.

    Args:
        cfg (Config): Config with a ``test_dataloader`` and a model.

    Raises:
        UserError: If the config has no ``test_dataloader``, or its dataset
            has no pipeline.
    """

    __test__ = False  # not a test, in spite of its name

    def __init__(self, cfg: Config):
        loader = cfg.get('test_dataloader')
        if loader is None:
            raise UserError(
                f'{cfg.filename} has no test_dataloader, whose '
                'pipeline prepares the images'
            )
        dataset = next(innermost_datasets(loader.dataset))
        if not isinstance(dataset.get('pipeline'), (list, tuple)):
            raise UserError(
                f'the dataset of test_dataloader in {cfg.filename} has no '
                'pipeline, which prepares the images'
            )
        transforms = _flatten(Compose(dataset['pipeline']).transforms)
        self.transforms = [t for t in transforms if not loads_annotations(t)]
        self.collate = _collate_function(loader)

        preprocessor = dict(cfg.get('data_preprocessor') or {})
        preprocessor.update(cfg.model.get('data_preprocessor') or {})
        to_rgb = preprocessor.get('to_rgb') or preprocessor.get('bgr_to_rgb')
        self.grayscale = len(preprocessor.get('mean') or ()) == 1
        loaders = [t for t in self.transforms if loads_files(t)]
        self.has_loader = bool(loaders)
        # mmcv loads BGR. Other loaders and datasets without a loader yield
        # what the data preprocessor expects.
        self.rgb = not to_rgb and not any(
            isinstance(t, LoadImageFromFile) for t in loaders
        )
        self.network_sees_rgb = bool(to_rgb) or self.rgb
        self.to_float32 = any(getattr(t, 'to_float32', False) for t in loaders)

    def __call__(
        self, image: Union[str, np.ndarray]
    ) -> Tuple[dict, np.ndarray]:
        """Prepare one image.

        Args:
            image (str | np.ndarray): Path of an image, or an array as
                ``mmcv.imread`` returns it.

        Returns:
            tuple[dict, np.ndarray]: A batch of one image for the model, and
            the loaded image for display, RGB ``(H, W, 3)``, uint8.

        Raises:
            UserError: If the file cannot be read as an image, or a transform
                cannot process it.
        """
        sample: Any = dict(SAMPLE, seg_fields=[])
        transforms = self.transforms
        if isinstance(image, str):
            sample['img_path'] = image
        if isinstance(image, np.ndarray) or not self.has_loader:
            array = self._read(image) if isinstance(image, str) else image
            if self.rgb and array.ndim == 3 and array.shape[2] == 3:
                array = array[..., ::-1].copy()
            if self.to_float32:
                array = array.astype(np.float32)
            shape = array.shape[:2]
            sample.update(img=array, img_shape=shape, ori_shape=shape)
            transforms = [t for t in transforms if not loads_files(t)]
        shown = sample.get('img')
        for transform in transforms:
            sample = self._apply(transform, sample)
            if shown is None and isinstance(sample.get('img'), np.ndarray):
                shown = sample['img'].copy()
        if shown is None:  # a pipeline of other keys
            shown = self._read(sample['img_path'])
            return self.collate([sample]), _displayable(shown, rgb=False)
        return self.collate([sample]), _displayable(shown, self.rgb)

    def _read(self, path: str) -> np.ndarray:
        """Read BGR ``(H, W, 3)`` or grayscale ``(H, W)``, uint8."""
        flag = 'grayscale' if self.grayscale else 'color'
        try:
            image = mmcv.imread(path, flag=flag)
        except OSError as error:
            raise UserError(error.strerror) from error
        except cv2.error:  # an empty file
            image = None
        if image is None:
            raise UserError('cannot be read as an image')
        return image

    @staticmethod
    def _apply(transform: Callable, sample: dict) -> dict:
        name = type(transform).__name__
        try:
            result = transform(sample)
        except UserError:
            raise
        except OSError as error:
            raise UserError(error.strerror or _first_line(error)) from error
        except Exception as error:
            # Custom transforms may raise anything for an unsuitable image.
            if loads_files(transform):
                raise UserError('cannot be read as an image') from error
            raise UserError(
                f'{name} of the test pipeline cannot process the image: '
                f'{_first_line(error)}'
            ) from error
        if result is None:
            raise UserError(f'{name} of the test pipeline rejects the image')
        return result


def _collate_function(loader: dict) -> Callable:
    """Build the ``collate_fn`` of a data loader config as the runner does."""
    config = dict(loader.get('collate_fn') or dict(type='pseudo_collate'))
    function = config.pop('type')
    if isinstance(function, str):
        function = FUNCTIONS.get(function)
    return partial(function, **config)
