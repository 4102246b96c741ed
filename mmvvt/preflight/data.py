"""Checks of the files that the datasets of a config read."""

import inspect
import os
from typing import Dict, List, Set

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..errors import AnnotationError, UserError
from .coco import check_coco_dataset, reads_coco
from .config import dataset_class, innermost_datasets


def _fetches_itself(dataset: dict) -> bool:
    """Whether the dataset creates or downloads its files if missing."""
    cls = dataset_class(dataset)
    if cls is None:
        return False  # The runner will report the unknown class.
    parameter = inspect.signature(cls).parameters.get('download')
    return parameter is not None and dataset.get('download', parameter.default)


def _check_folder(path: str, where: str) -> None:
    if '://' in path:
        return  # Remote storage is not checked.
    if not os.path.isdir(path):
        raise UserError(f'{where}: the data folder does not exist: {path}')
    if not any(os.scandir(path)):
        raise UserError(f'{where}: the data folder is empty: {path}')


def _check_annotations(path: str, where: str) -> None:
    if '://' not in path and not os.path.isfile(path):
        raise UserError(f'{where}: the annotation file does not exist: {path}')


def check_data(cfg: Config, loaders: List[str]) -> None:
    """Check that the files of all datasets exist.

    The annotation files of COCO datasets must also be in COCO format and have
    the categories of the classes, and the images that they list must exist.

    Args:
        cfg (Config): The complete config.
        loaders (list[str]): Names of the data loaders that will be used.
            Datasets that create or download their files are skipped.

    Raises:
        UserError: If a file or folder is missing, or a folder is empty. The
            message is one line.
        AnnotationError: If a COCO annotation file is invalid.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        evaluator = cfg.get(loader.replace('dataloader', 'evaluator'))
        if not isinstance(evaluator, dict):
            evaluator = {}
        datasets = [
            dataset
            for dataset in innermost_datasets(cfg[loader]['dataset'])
            if not _fetches_itself(dataset)
        ]
        for dataset in datasets:
            where = f'{loader} ({dataset["type"]})'
            root = dataset.get('data_root') or ''
            prefix = dataset.get('data_prefix') or ''
            folders = prefix.values() if isinstance(prefix, dict) else [prefix]
            if root:
                _check_folder(root, where)
            for folder in folders:
                if isinstance(folder, str) and folder:
                    _check_folder(os.path.join(root, folder), where)
            annotations = dataset.get('ann_file')
            if isinstance(annotations, str) and annotations:
                _check_annotations(os.path.join(root, annotations), where)
            cls = dataset_class(dataset)
            if cls is not None and reads_coco(cls):
                try:
                    check_coco_dataset(
                        dataset,
                        cls,
                        annotated=not evaluator.get('format_only', False),
                    )
                except AnnotationError as error:
                    raise AnnotationError(f'{where}: {error}') from error
        # Annotation file of the metric. It may not exist yet if the dataset
        # creates its own files.
        annotations = evaluator.get('ann_file')
        if datasets and isinstance(annotations, str):
            where = f'{loader.replace("dataloader", "evaluator")} '
            _check_annotations(
                annotations, f'{where}({evaluator.get("type")})'
            )


def check_label_maps(cfg: Config, loaders: List[str]) -> None:
    """Check that each image of a segmentation dataset has a label map.

    Without this check, mmseg fails only when it loads the image, possibly
    hours after the start of the run.

    Args:
        cfg (Config): The complete config; configs with a default scope other
            than mmseg are skipped.
        loaders (list[str]): Names of the data loaders that will be used.

    Raises:
        UserError: If a label map is missing. The message is one line.
    """
    if cfg.get('default_scope') != 'mmseg':
        return
    listed: Dict[str, Set[str]] = {}  # File names by folder, each read once
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for config in innermost_datasets(cfg[loader]['dataset']):
            dataset = DATASETS.build(dict(config, pipeline=[]))
            for index in range(len(dataset)):
                path = dataset.get_data_info(index).get('seg_map_path')
                if path is None or '://' in path:
                    continue
                folder, name = os.path.split(path)
                if folder not in listed:
                    listed[folder] = (
                        set(os.listdir(folder))
                        if os.path.isdir(folder)
                        else set()
                    )
                if name not in listed[folder]:
                    raise UserError(
                        f'{loader} ({config["type"]}): the annotation file '
                        f'does not exist: {path}'
                    )
