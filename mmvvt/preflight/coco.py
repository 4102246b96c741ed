"""A check of a COCO annotation file, before mmdet reads it.

mmdet takes a file whose category names are not the classes in silence, and
trains on what is left, or on nothing.
"""

import json
import os
from collections import defaultdict
from typing import Dict, List, Optional, Sequence

from mmengine.fileio import list_from_file
from mmengine.utils import is_abs

from ..errors import AnnotationError

# What mmdet reads of each entry
KEYS = dict(
    images=('id', 'file_name', 'height', 'width'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
REMEDY = 'name the classes with dataset.metainfo=dict(classes=(...))'


def reads_coco(cls: Optional[type]) -> bool:
    """Whether a data set class reads its files as mmdet's CocoDataset does.

    Args:
        cls (type, optional): The class.

    Returns:
        bool: False for classes that read another layout with methods of their
        own, such as those of LVIS and of panoptic segmentation.
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
    """The lists of a COCO file, each entry with what mmdet reads of it."""
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
    # mmdet numbers the classes in the order of the file's categories.
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
    """Lists each folder once: quick on a network's disks, too."""
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


def check_coco_dataset(dataset: dict, cls: type, annotated: bool) -> None:
    """Check a data set's annotation file and that its images are there.

    Args:
        dataset (dict): Config of a data set of a class that
            :func:`reads_coco`. Files behind a URL are passed over.
        cls (type): That class.
        annotated (bool): Whether the file must have annotations. Test images
            that only get predictions have none.

    Raises:
        AnnotationError: With one line that names the file and the fault: it is
            not JSON or not COCO's, lacks a class's category, has the classes
            in another order, or lists an image that does not exist.
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
