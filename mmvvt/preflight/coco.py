"""Validation of COCO annotation files before mmdet reads them.

If the category names of a file differ from the classes of the dataset, mmdet
silently drops the other categories and trains on the remaining annotations,
or on none.
"""

import json
import os
import reprlib
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Optional, Sequence

from ..errors import AnnotationError, UserError
from .config import annotation_steps, type_name
from .masks import find_mask_fault
from .sources import Source, find_backend, is_local

MAX_RUN_LENGTHS = 20000  # that are checked, about two seconds
LARGEST = 1e9  # pixels, or square pixels


def _is_number(value: Any) -> bool:
    # False for NaN and infinity, which JSON files may contain
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _is_text(value: Any) -> bool:
    return type(value) is str and '\0' not in value


def _is_box(value: Any) -> bool:
    return (
        type(value) is list and len(value) == 4 and all(map(_is_number, value))
    )


# Keys that mmdet reads from each entry, and what they must be
IDENTIFIER, NUMBER = (_is_id, 'a number or a string'), (_is_number, 'a number')
TEXT, BOX = (_is_text, 'a string'), (_is_box, 'a list of four numbers')
KEYS = dict(
    images=dict(id=IDENTIFIER, file_name=TEXT, height=NUMBER, width=NUMBER),
    annotations=dict(
        id=IDENTIFIER,
        image_id=IDENTIFIER,
        category_id=IDENTIFIER,
        bbox=BOX,
        area=NUMBER,
    ),
    categories=dict(id=IDENTIFIER, name=TEXT),
)
REMEDY = 'name the classes with dataset.metainfo=dict(classes=(...))'


def reads_coco(cls: Optional[type]) -> bool:
    """Whether a dataset class reads its files like mmdet's CocoDataset.

    Args:
        cls (type, optional): Dataset class.

    Returns:
        bool: False for None and for classes that override the methods that
        read the file, such as the datasets for LVIS and panoptic
        segmentation.
    """
    for base in getattr(cls, '__mro__', ()):
        if base.__name__ == 'CocoDataset':
            return all(
                getattr(cls, name, None) is getattr(base, name, None)
                for name in ('load_data_list', 'parse_data_info')
            )
    return False


def _some(names: Sequence[str]) -> str:
    shown = ', '.join(repr(name) for name in names[:3])
    return shown + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _read(
    local: str, path: str, parts: Sequence[str]
) -> Dict[str, List[dict]]:
    """Read a COCO file and check that it has the keys that mmdet reads."""
    try:
        with open(local, encoding='utf-8') as file:
            # NaN and infinity are not JSON, and refused where numbers must be.
            content = json.load(file, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f'{path} is not JSON: {error}') from error
    for part in parts:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise AnnotationError(
                f"{path} is not in COCO format: it has no list '{part}'"
            )
        for index, entry in enumerate(entries):
            for key, (is_valid, kind) in KEYS[part].items():
                if not isinstance(entry, dict) or key not in entry:
                    raise AnnotationError(
                        f'{path} is not in COCO format: '
                        f"{part}[{index}] has no '{key}'"
                    )
                if not is_valid(entry[key]):
                    raise AnnotationError(
                        f'{path} is not in COCO format: {part}[{index}].{key} '
                        f'must be {kind}, got {reprlib.repr(entry[key])}'
                    )
    return content


def _find_category_fault(
    path: str, names: Sequence[str], classes: Sequence[str]
) -> Optional[str]:
    if isinstance(classes, str):
        return (
            f'the classes are the string {classes!r}, of which each character '
            f'would be a class; a tuple of one name needs a comma: '
            f'dataset.metainfo=dict(classes=({classes!r},))'
        )
    missing = [name for name in classes if name not in names]
    if missing:
        return (
            f'{path} is missing the categories {_some(missing)} of '
            f'{len(classes)} classes; it has {_some(names) or "none"}; '
            f'{REMEDY}'
        )
    # mmdet numbers the classes in the order of the categories in the file.
    found = [name for name in names if name in classes]
    if found == list(classes):
        return None
    index = next(
        i
        for i, name in enumerate(found)
        if i == len(classes) or name != classes[i]
    )
    return (
        f'{path} does not list the categories in the order of the classes, '
        f'or lists one more than once: {found[index]!r} has index {index} '
        f'among the categories that are classes; {REMEDY}'
    )


def _find_repeated_id(path: str, content: Dict[str, Any]) -> Optional[str]:
    """Check that annotations have different ids, as mmdet requires."""
    seen = set()
    for index, entry in enumerate(content['annotations']):
        if entry['id'] in seen:
            return (
                f'{path} uses an id more than once: annotations[{index}] has '
                f'the id {reprlib.repr(entry["id"])} of an earlier annotation'
            )
        seen.add(entry['id'])
    return None


def _find_no_image(
    path: str, content: Dict[str, Any], dataset: Any
) -> Optional[str]:
    """Check that mmdet keeps an image after it has applied ``filter_cfg``."""
    settings = getattr(dataset, 'filter_cfg', None) or {}
    if getattr(dataset, 'test_mode', True):
        settings = {}
    images = [
        entry
        for entry in content['images']
        if min(entry['width'], entry['height']) >= settings.get('min_size', 0)
    ]
    if settings.get('filter_empty_gt'):
        classes = dataset.metainfo['classes']
        wanted = {
            entry['id']
            for entry in content['categories']
            if entry['name'] in classes
        }
        annotated = {
            entry['image_id']
            for entry in content['annotations']
            if entry['category_id'] in wanted
        }
        images = [entry for entry in images if entry['id'] in annotated]
    if images:
        return None
    if settings:
        return f'{path} has no images that filter_cfg={settings} keeps'
    return f'{path} lists no images'


def _find_missing_images(
    path: str, folder: str, names: Sequence[str]
) -> Optional[str]:
    """Check that images exist; each folder is listed only once for speed."""
    wanted = defaultdict(list)
    for name in names:
        parent, base = os.path.split(os.path.join(folder, name))
        wanted[parent].append(base)
    missing = []
    for parent, bases in wanted.items():
        there = set()
        if os.path.isdir(parent or '.'):
            with os.scandir(parent or '.') as entries:
                there = {entry.name for entry in entries}
        missing += [
            os.path.join(parent, base) for base in bases if base not in there
        ]
    if not missing:
        return None
    return (
        f'{path} lists {len(names)} images, of which '
        f'{len(missing)} do not exist: {_some(missing)}'
    )


def _find_missing_masks(path: str, content: Dict[str, Any]) -> Optional[str]:
    """Check that objects have masks that mmdet can read."""
    # Decoding run lengths is slow: of many, a part is checked.
    every = max(1, len(content['annotations']) // MAX_RUN_LENGTHS)
    for index, entry in enumerate(content['annotations']):
        mask = entry.get('segmentation')
        if entry.get('ignore'):
            continue
        if mask and (isinstance(mask, list) or index % every == 0):
            fault = find_mask_fault(mask)
            if fault is not None:
                return (
                    f'{path} has an invalid mask in '
                    f'annotations[{index}].segmentation: {fault}'
                )
        if entry.get('iscrowd'):
            continue
        if not (isinstance(mask, (dict, list)) and mask):
            return (
                f'{path} lacks masks, which the pipeline or the metric '
                f"needs: annotations[{index}] has no 'segmentation'; add "
                'polygons or run lengths, or use boxes only, with '
                "with_mask=False and metric='bbox'"
            )
    return None


def _needs_masks(source: Source, metrics: List[dict]) -> bool:
    """Whether the pipeline loads masks or a metric compares them."""
    loads = any(
        step.get('with_mask') for step in annotation_steps(source.config)
    )
    wanted = [metric.get('metric', 'bbox') for metric in metrics]
    return loads or any(
        'segm' in (w if isinstance(w, (list, tuple)) else [w]) for w in wanted
    )


def _only_writes(metric: dict) -> bool:
    """Whether a metric writes predictions and does not read annotations."""
    return bool(metric.get('format_only')) or type_name(metric) in (
        'DumpDetResults',
        'DumpPredictions',
        'DumpResults',
    )


def find_coco_problems(
    source: Source, metrics: List[dict]
) -> Iterator[UserError]:
    """Check the annotation file of a dataset, and that its images exist.

    Args:
        source (Source): Dataset for whose class :func:`reads_coco` is true.
        metrics (list[dict]): Configs of the metrics. If they compute scores,
            the file must contain annotations; if all of them only write
            predictions, it need not.

    Yields:
        AnnotationError: If the file is not JSON or not in COCO format, lacks
        the category of a class, has the classes in a different order, lists
        an image that does not exist, or has no masks although the model
        learns them. The message is one line that names the file and the
        problem.
    """
    dataset = source.dataset
    path = dataset.ann_file
    if not isinstance(path, str) or not path:
        return
    annotated = source.loader == 'train_dataloader' or not (
        metrics and all(_only_writes(metric) for metric in metrics)
    )
    parts = [part for part in KEYS if annotated or part != 'annotations']
    backend = find_backend(path, dataset)
    try:
        with backend.get_local_path(path) as local:
            content = _read(local, path, parts)
    except AnnotationError as error:
        yield source.problem(str(error), AnnotationError)
        return
    except (AttributeError, OSError, RuntimeError):
        return  # The file backend cannot provide a local file.

    names = [entry['name'] for entry in content['categories']]
    faults = [_find_category_fault(path, names, dataset.metainfo['classes'])]
    folder = (dataset.data_prefix or {}).get('img') or ''
    if is_local(find_backend(folder, dataset)):
        files = [entry['file_name'] for entry in content['images']]
        faults.append(_find_missing_images(path, folder, files))
    if 'annotations' in parts and getattr(dataset, 'ANN_ID_UNIQUE', True):
        faults.append(_find_repeated_id(path, content))
    if 'annotations' in parts:
        faults.append(_find_no_image(path, content, dataset))
    if 'annotations' in parts and _needs_masks(source, metrics):
        faults.append(_find_missing_masks(path, content))
    for fault in faults:
        if fault is not None:
            yield source.problem(fault, AnnotationError)
