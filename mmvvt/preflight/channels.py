"""Checks of the channels of images, and of the bits that are loaded."""

import copy
import itertools
import os
from typing import Any, Iterator, List, Optional

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image

from ..errors import UserError
from .config import pipeline_steps, type_name
from .sources import Source, find_backend

NUM_SAMPLED = 16  # images of a dataset whose headers are read
BITS_PER_SAMPLE = 258  # tag of TIFF files
PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


def _preprocessor(cfg: Config) -> dict:
    found = dict(cfg.get('data_preprocessor') or {})
    found.update((cfg.get('model') or {}).get('data_preprocessor') or {})
    return found


def _backbone(cfg: Config) -> dict:
    """Config of the VVT backbone, also inside of a ``LoRAModel``."""
    backbone = (cfg.get('model') or {}).get('backbone')
    while isinstance(backbone, dict) and type_name(backbone) != 'VVT':
        backbone = backbone.get('module')
    return backbone if isinstance(backbone, dict) else {}


def _loads_color_only(source: Source) -> bool:
    """Whether all images are loaded with three channels."""
    loaders = [
        step
        for step in pipeline_steps(source.config)
        if type_name(step).startswith('Load')
        and 'Annotations' not in type_name(step)
    ]
    return all(
        type_name(step) == 'LoadImageFromFile'
        and step.get('color_type', 'color') == 'color'
        for step in loaders
    )


def _num_channels(source: Source) -> Optional[int]:
    """Channels of the first image after the pipeline, None if unknown."""
    try:
        sample = copy.deepcopy(source.samples()[0])
        sample.update(sample_idx=0)
        packed: Any = Compose(source.config['pipeline'])(sample)
        return int(packed['inputs'].shape[0])  # (C, H, W)
    except Exception:
        return None  # The run itself reports files that cannot be loaded.


def find_channel_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    """Check that images, data preprocessor and backbone agree on channels.

    An image of each dataset is loaded if the backbone or the loader of the
    images does not have the usual three channels.

    Args:
        cfg (Config): The complete config.
        sources (list[Source]): Datasets of the run.

    Yields:
        UserError: If the number of channels of the images, or the numbers of
        values of ``mean`` and ``std``, differ from ``in_channels``.
    """
    backbone = _backbone(cfg)
    if not backbone:
        return
    wanted = backbone.get('in_channels', 3)
    preprocessor = _preprocessor(cfg)
    for name in ('mean', 'std'):
        values = preprocessor.get(name)
        if values is None or not hasattr(values, '__len__'):
            continue
        if wanted > 3 and type_name(preprocessor) == 'DetDataPreprocessor':
            if len(values) not in (1, 3):
                yield UserError(
                    f'{name} of DetDataPreprocessor has {len(values)} values, '
                    'but mmdet takes 1 or 3: leave out mean and std, and add '
                    'Normalize(mean=[...], std=[...], to_rgb=False) to the '
                    'pipelines'
                )
                continue
        if len(values) not in (1, wanted):
            yield UserError(
                f'{name} of the data_preprocessor has {len(values)} values, '
                f'but in_channels of the backbone is {wanted}: give one value '
                'for each channel, or one for all'
            )
    for source in sources:
        if not source.intact or source.dataset is None or source.wrapped:
            continue
        if source.fetches_itself or wanted == 3 and _loads_color_only(source):
            continue
        found = _num_channels(source)
        if found is not None and found != wanted:
            flag = 'grayscale' if wanted == 1 else 'unchanged'
            yield source.problem(
                f'images have {found} channels after the pipeline, but '
                f'in_channels of the backbone is {wanted}; see '
                f'LoadImageFromFile(color_type={flag!r})'
            )


def _bits(content: bytes, path: str) -> int:
    """Bits per channel of a PNG or TIFF file, 8 for other formats."""
    if content.startswith(PNG_SIGNATURE):
        return content[24]
    if content[:4] in (b'II*\0', b'MM\0*'):
        with Image.open(path) as image:
            return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,)))
    if content[:2] in (b'P5', b'P6'):  # PGM and PPM: the maximum follows
        fields = content.split(None, 4)
        return 16 if len(fields) > 3 and int(fields[3]) > 255 else 8
    return 8


def describe_depths(sources: List[Source]) -> List[str]:
    """Find images with more than 8 bits that are loaded with 8 bits.

    OpenCV and Pillow reduce them without a warning: only the upper 8 bits
    are kept.

    Args:
        sources (list[Source]): Datasets of a run.

    Returns:
        list[str]: A line for each dataset with such images.
    """
    notes = []
    for source in sources:
        if not source.intact or source.dataset is None:
            continue
        if source.fetches_itself:
            continue
        step = next(
            (
                step
                for step in pipeline_steps(source.config)
                if type_name(step) == 'LoadImageFromFile'
            ),
            None,
        )
        if step is None or not _loses_bits(step):
            continue
        path = _find_deep_image(source)
        if path is not None:
            notes.append(
                f'{source.where}: {path} has 16 bits per channel, of which '
                'LoadImageFromFile keeps 8; to keep all, use '
                "LoadImageFromFile(color_type='unchanged', to_float32=True), "
                'and mean and std for 16 bits'
            )
    return notes


def _loses_bits(step: dict) -> bool:
    backend = step.get('imdecode_backend', 'cv2')
    if backend == 'tifffile':
        return False
    return backend != 'cv2' or step.get('color_type', 'color') != 'unchanged'


def _some_images(source: Source) -> List[str]:
    """Return the paths of a few images of a dataset."""
    dataset = source.dataset
    if source.inherits('mmdet', 'BaseDetDataset'):
        # Reading a large annotation file once more would take long.
        folder = (dataset.data_prefix or {}).get('img') or ''
        names = find_backend(folder, dataset).list_dir_or_file(
            folder, list_dir=False
        )
        names = itertools.islice(names, NUM_SAMPLED)
        return [os.path.join(folder, name) for name in names]
    samples = source.samples()
    number = min(len(samples), NUM_SAMPLED)
    indices = np.linspace(0, len(samples) - 1, number).astype(int)
    paths = [samples[index].get('img_path') for index in indices]
    return [path for path in paths if isinstance(path, str)]


def _find_deep_image(source: Source) -> Optional[str]:
    try:
        for path in _some_images(source):
            backend = find_backend(path, source.dataset)
            with backend.get_local_path(path) as local:
                with open(local, 'rb') as file:
                    head = file.read(64)
                if _bits(head, local) > 8:
                    return path
    except Exception:  # Other checks and the run report such files.
        pass
    return None
