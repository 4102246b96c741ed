"""Validation of COCO annotation files before mmdet reads them.

If the category names of a file differ from the classes of the dataset, mmdet
silently drops the other categories and trains on the remaining annotations,
or on none.
"""

import json
import os
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence

from mmengine.fileio import list_from_file
from mmengine.utils import is_abs

from ..errors import AnnotationError

# Keys that mmdet reads from each entry
KEYS = dict(
    images=('id', 'file_name', 'height', 'width'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
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


def _read(path: str, parts: Sequence[str]) -> Dict[str, List[dict]]:
    """Read a COCO file and check that it has the keys that mmdet reads."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:
        raise AnnotationError(f'{path} is not JSON: {error}') from error
    for part in parts:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise AnnotationError(
                f"{path} is not in COCO format: it has no list '{part}'"
            )
        for index, entry in enumerate(entries):
            for key in KEYS[part]:
                if not isinstance(entry, dict) or key not in entry:
                    raise AnnotationError(
                        f'{path} is not in COCO format: '
                        f"{part}[{index}] has no '{key}'"
                    )
    return content


def _check_categories(
    path: str, names: Sequence[str], classes: Sequence[str]
) -> None:
    missing = [name for name in classes if name not in names]
    if missing:
        raise AnnotationError(
            f'{path} has no category {_some(missing)}, of {len(classes)} '
            f'classes; it has {_some(names) or "none"}; {REMEDY}'
        )
    # mmdet numbers the classes in the order of the categories in the file.
    found = [name for name in names if name in classes]
    if found != list(classes):
        index = next(
            i
            for i, name in enumerate(found)
            if i == len(classes) or name != classes[i]
        )
        raise AnnotationError(
            f'{path} has its categories in another order than the classes, '
            f'or one twice: {found[index]!r} is number {index} of those that '
            f'are classes; {REMEDY}'
        )


def _check_images(path: str, folder: str, names: Sequence[str]) -> None:
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
    if missing:
        raise AnnotationError(
            f'{path} lists {len(names)} images, of which '
            f'{len(missing)} do not exist: {_some(missing)}'
        )


def check_coco_dataset(dataset: dict, cls: Any, annotated: bool) -> None:
    """Check the annotation file of a dataset, and that its images exist.

    Args:
        dataset (dict): Config of a dataset for whose class :func:`reads_coco`
            is true. Files with a URL are skipped.
        cls (type): Class of the dataset.
        annotated (bool): Whether the file must contain annotations. Test
            images for which only predictions are computed have none.

    Raises:
        AnnotationError: If the file is not JSON or not in COCO format, lacks
            the category of a class, has the classes in a different order, or
            lists an image that does not exist. The message is one line that
            names the file and the problem.
    """
    root = dataset.get('data_root') or ''
    path = dataset.get('ann_file')
    if not isinstance(path, str) or not path:
        return
    if not is_abs(path):
        path = os.path.join(root, path)
    if '://' in path:
        return
    content = _read(
        path, [part for part in KEYS if annotated or part != 'annotations']
    )

    metainfo = {**cls.METAINFO, **(dataset.get('metainfo') or {})}
    classes = metainfo.get('classes', ())
    if isinstance(classes, str):
        classes = list_from_file(classes) if os.path.isfile(classes) else ()
    _check_categories(
        path, [entry['name'] for entry in content['categories']], classes
    )

    folder = (dataset.get('data_prefix') or {}).get('img', '')
    if not is_abs(folder):
        folder = os.path.join(root, folder)
    if '://' not in folder:
        _check_images(
            path, folder, [entry['file_name'] for entry in content['images']]
        )
