"""Checks of the files and folders that datasets read."""

import inspect
import os
from typing import Iterator, List, Set

from mmengine.config import Config

from ..errors import UserError
from .coco import find_coco_problems, reads_coco
from .config import annotation_steps, dataset_class, type_name
from .sources import Source, exists, find_backend, is_empty


def _fetches_itself(dataset: dict) -> bool:
    """Whether the dataset creates or downloads its files if missing."""
    cls = dataset_class(dataset)
    if cls is None:
        return False  # The runner will report the unknown class.
    parameter = inspect.signature(cls).parameters.get('download')
    return parameter is not None and dataset.get('download', parameter.default)


def evaluators_of(cfg: Config, loader: str) -> List[dict]:
    """Return the configs of the metrics that evaluate a data loader."""
    evaluator = cfg.get(loader.replace('dataloader', 'evaluator'))
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        evaluator = evaluator['metrics']  # mmengine's Evaluator
    if not isinstance(evaluator, (list, tuple)):
        evaluator = [evaluator]
    return [metric for metric in evaluator if isinstance(metric, dict)]


def _find_path_problems(
    source: Source, reported: Set[str]
) -> Iterator[UserError]:
    """Check the root, the folders and the annotation file of a dataset.

    Each path is reported once, also if several datasets use it.
    """
    dataset, config = source.dataset, source.config
    root = getattr(dataset, 'data_root', None) or ''
    prefix = getattr(dataset, 'data_prefix', None) or {}
    folders = [root, *(prefix.values() if isinstance(prefix, dict) else [])]
    needs_labels = bool(annotation_steps(config))
    for folder in dict.fromkeys(folders):
        if not isinstance(folder, str) or not folder:
            continue
        if not needs_labels and folder == prefix.get('seg_map_path'):
            continue
        backend = find_backend(folder, dataset)
        fault = None
        if not exists(backend, folder, folder=True):
            fault = 'does not exist'
        elif is_empty(backend, folder):
            fault = 'is empty'
        if fault is not None:
            problem = source.problem(f'the data folder {fault}: {folder}')
            if folder not in reported:
                yield problem
            reported.add(folder)
            return
    path = getattr(dataset, 'ann_file', None)
    # mmseg also accepts a folder, which it then ignores.
    if isinstance(path, str) and path and not os.path.isdir(path):
        if not exists(find_backend(path, dataset), path, folder=False):
            yield source.problem(f'the annotation file does not exist: {path}')


def find_data_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    """Check that the files of all datasets exist.

    Files are looked up with mmengine's file backends, as during the run.
    Files of a backend that cannot tell whether they exist are not checked.
    The annotation files of COCO datasets must also be in COCO format and have
    the categories of the classes, and the images that they list must exist.

    Args:
        cfg (Config): The complete config.
        sources (list[Source]): Datasets. Those that create or download their
            files are skipped.

    Yields:
        UserError: If a file or folder is missing, or a folder is empty.
        AnnotationError: If a COCO annotation file is invalid.
    """
    checked = set()
    reported: Set[str] = set()
    for source in sources:
        if _fetches_itself(source.config):
            source.fetches_itself = True  # Its files may not exist yet.
            continue
        checked.add(source.loader)
        if source.fault is not None:
            yield source.problem(source.fault)
            continue
        yield from _find_path_problems(source, reported)
        if source.intact and reads_coco(dataset_class(source.config)):
            yield from find_coco_problems(
                source, evaluators_of(cfg, source.loader)
            )
    # The metric may read a separate file. If the dataset creates its files,
    # it may not exist yet.
    for loader in dict.fromkeys(source.loader for source in sources):
        for metric in evaluators_of(cfg, loader):
            path = metric.get('ann_file')
            if loader not in checked or not isinstance(path, str):
                continue
            name = loader.replace('dataloader', 'evaluator')
            if not exists(find_backend(path), path, folder=False):
                yield UserError(
                    f'{name} ({type_name(metric)}): the annotation file does '
                    f'not exist: {path}'
                )
