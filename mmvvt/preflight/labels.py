"""Checks of class indices: of images, and in label maps."""

import os
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..errors import LabelError, UserError
from .config import annotation_steps, type_name
from .sources import Source, find_backend, first_line, is_local

# Number of label maps of a dataset whose values are checked.
NUM_SAMPLED = 64


def find_label_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    """Check the class indices of classification and segmentation datasets.

    Datasets in whose files a problem was found before are skipped.

    Args:
        cfg (Config): The complete config.
        sources (list[Source]): Datasets of the run.

    Yields:
        LabelError: If a class index is outside the classes of the head, or a
        label map is not as the loader and the loss require.
        UserError: If a label map is missing, or the list of samples cannot
        be read.
    """
    for source in sources:
        if not source.intact or source.dataset is None:
            continue
        if source.inherits('mmpretrain', 'BaseDataset'):
            if not source.fetches_itself:  # Do not start a download here.
                yield from _find_image_label_problems(cfg, source)
        elif not source.inherits('mmdet', 'BaseDetDataset'):
            yield from _find_label_map_problems(cfg, source)


def _read_samples(source: Source) -> Tuple[List[dict], Optional[UserError]]:
    try:
        return source.samples(), None
    except Exception as error:  # Datasets raise anything for invalid files.
        return [], source.problem(first_line(error))


# -- classification -----------------------------------------------------------


def _find_image_label_problems(
    cfg: Config, source: Source
) -> Iterator[UserError]:
    samples, problem = _read_samples(source)
    if problem:
        yield problem
        return
    head = (cfg.get('model') or {}).get('head')
    num_classes = head.get('num_classes') if isinstance(head, dict) else None
    if not isinstance(num_classes, int):
        return
    for sample in samples:
        labels = np.atleast_1d(sample.get('gt_label', []))
        if labels.dtype.kind not in 'iu':
            continue
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if wrong.size:
            highest = max(
                int(np.max(s['gt_label'], initial=0)) for s in samples
            )
            yield source.problem(
                f'{sample.get("img_path", "a sample")} has label '
                f'{wrong[0]}, but model.head.num_classes is {num_classes}: '
                f'allowed are 0 to {num_classes - 1}; the highest label of '
                f'the dataset is {highest}',
                LabelError,
            )
            return


# -- segmentation -------------------------------------------------------------


def _find_label_map_problems(
    cfg: Config, source: Source
) -> Iterator[UserError]:
    loaders = annotation_steps(source.config)
    if not loaders:
        return  # Images to predict on have no label maps.
    samples, problem = _read_samples(source)
    if problem:
        yield problem
        return
    if not samples:
        suffix = getattr(source.dataset, 'img_suffix', '')
        folder = (source.dataset.data_prefix or {}).get('img_path') or ''
        yield source.problem(
            f'no images were found in {folder}: the names of images must end '
            f'in img_suffix={suffix!r}'
        )
        return
    samples = [s for s in samples if s.get('seg_map_path') is not None]
    missing = _find_missing(source, [s['seg_map_path'] for s in samples])
    if missing:
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        yield source.problem(
            f'the annotation file does not exist: {missing[0]}{more}'
        )
        return
    yield from _find_value_problems(cfg, source, loaders[0], samples)


def _find_missing(source: Source, paths: List[str]) -> List[str]:
    """Find paths that do not exist; each folder is listed only once."""
    listed: Dict[str, Set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            if not is_local(find_backend(folder, source.dataset)):
                return []  # Remote files are not checked one by one.
            listed[folder] = (
                set(os.listdir(folder)) if os.path.isdir(folder) else set()
            )
        if name not in listed[folder]:
            missing.append(path)
    return missing


def _read_label_map(
    path: str, loader: dict, dataset: Any
) -> Tuple[Optional[np.ndarray], Optional[str]]:
    """Read a label map as it is stored.

    Returns:
        tuple[np.ndarray | None, str | None]: Label map, and what is wrong
        with it if mmseg's loader would fail or change its values.
    """
    try:
        labels = mmcv.imfrombytes(
            find_backend(path, dataset).get(path),
            flag='unchanged',
            backend=loader.get('imdecode_backend', 'pillow'),
        )
    except Exception:  # Decoders raise anything for damaged files.
        labels = None
    if labels is None:
        return None, 'cannot be read as an image'
    labels = np.squeeze(labels)
    if labels.ndim != 2:
        return None, (
            f'has shape {labels.shape}, but a label map has one class index '
            'per pixel, (height, width)'
        )
    if labels.dtype.kind == 'f' or labels.max() > 255 or labels.min() < 0:
        values = np.unique(labels)
        values = values[(values > 255) | (values < 0)][:3].tolist()
        return None, (
            f'contains values such as {values or labels.dtype}, but mmseg '
            'converts label maps to 8 bits: allowed are integers from 0 to 255'
        )
    return labels.astype(np.uint8), None


def _convert(labels: np.ndarray, loader: dict, sample: dict) -> np.ndarray:
    """Apply ``reduce_zero_label`` and ``label_map`` as mmseg's loader does."""
    if loader.get('reduce_zero_label') or sample.get('reduce_zero_label'):
        # 0 becomes 255 (ignored), and other classes are numbered from 0.
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    converted = labels.copy()
    for old, new in (sample.get('label_map') or {}).items():
        converted[labels == old] = new
    return converted


def _load(loader: dict, sample: dict, dataset: Any):
    """Return the classes in a label map, or what is wrong with it."""
    path = sample['seg_map_path']
    if type_name(loader) == 'LoadAnnotations':
        labels, fault = _read_label_map(path, loader, dataset)
        if labels is None:
            return None, fault
        return np.unique(_convert(labels, loader, sample)), None
    try:  # A custom loader has its own rules.
        labels = TRANSFORMS.build(dict(loader))(dict(sample))['gt_seg_map']
    except Exception as error:
        return None, f'cannot be loaded: {first_line(error)}'
    return np.unique(labels), None


def _find_value_problems(
    cfg: Config, source: Source, loader: dict, samples: List[dict]
) -> Iterator[UserError]:
    """Check the values of label maps spread evenly over the dataset."""
    dataset = source.dataset
    head = (cfg.get('model') or {}).get('decode_head')
    head = head[-1] if isinstance(head, (list, tuple)) else head or {}
    classes = dataset.metainfo.get('classes') or ()
    num_classes = head.get('num_classes') or len(classes)
    ignored = getattr(dataset, 'ignore_index', 255)
    if not samples or not num_classes:
        return
    indices = np.linspace(0, len(samples) - 1, min(len(samples), NUM_SAMPLED))
    seen: Set[int] = set()
    faults: Dict[str, str] = {}
    for index in indices.astype(int):
        sample = dict(samples[index], seg_fields=[])
        values, fault = _load(loader, sample, dataset)
        if fault is None:
            wrong = values[(values >= num_classes) & (values != ignored)]
            seen.update(values.tolist())
            if wrong.size:
                fault = (
                    f'has label values {wrong.tolist()[:8]} that are out of '
                    f'range: allowed are 0 to {num_classes - 1} and '
                    f'{ignored} (ignored)'
                )
        if fault is not None:
            faults[sample['seg_map_path']] = fault
    checked = f'{len(indices)} label maps were checked'
    if faults:
        path, fault = next(iter(faults.items()))
        more = (
            f' ({len(faults) - 1} more are invalid)' if len(faults) > 1 else ''
        )
        yield source.problem(f'{path} {fault}{more}; {checked}', LabelError)
        return
    present = seen - {ignored}
    if source.loader == 'train_dataloader' and num_classes > 1:
        if len(present) < 2:
            yield source.problem(
                f'label maps such as {samples[0]["seg_map_path"]} have only '
                f'the values {sorted(seen)}, of which {ignored} is ignored: '
                f'at least two of the {num_classes} classes must occur; '
                f'{checked}',
                LabelError,
            )
