"""Models by name: all configs of the package, for the three tasks."""

import difflib
import fnmatch
import logging
import os
import warnings
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Union

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import MMLogger
from mmengine.model.utils import revert_sync_batchnorm
from torch import nn

from ..errors import UserError
from ..preflight import build_model, class_names, read_config, type_name
from ..shipped import shipped_folder
from ..visualization.predictions import distinct_colour
from .loading import load_fitting_parts, read_checkpoint

# Tasks by the names in the metafiles, which are those of OpenMMLab
TASKS = {
    'Image Classification': 'classification',
    'Semantic Segmentation': 'segmentation',
    'Object Detection': 'detection',
    'Instance Segmentation': 'detection',
}


class ModelInfo(NamedTuple):
    """What a metafile says about a model.

    Attributes:
        name (str): Name of the model and of its config file.
        config (Path): Path of the config file.
        task (str): 'classification', 'segmentation' or 'detection'.
        weights (str | None): Address of published weights.
    """

    name: str
    config: Path
    task: str
    weights: Optional[str]


@lru_cache(maxsize=None)
def _read_models() -> Dict[str, ModelInfo]:
    """Read the models of the package from its metafiles."""
    root = shipped_folder()
    return {
        model['Name']: ModelInfo(
            model['Name'],
            root / model['Config'],
            TASKS[model['Results'][0]['Task']],
            model.get('Weights'),
        )
        for metafile in load(root / 'model-index.yml')['Import']
        for model in load(root / metafile)['Models']
    }


def list_models(
    pattern: Optional[str] = None, task: Optional[str] = None
) -> List[str]:
    """List the names of the models that :func:`get_model` can build.

    Examples:
        >>> from mmvvt.apis import list_models
        >>> list_models('vvt-tiny', task='segmentation')
        ['vvt-tiny_fpn_8xb4-40k_ade20k-512x512',
         'vvt-tiny_upernet_8xb2-160k_ade20k-512x512']

    Args:
        pattern (str, optional): Wildcard pattern for the start of the names,
            as in mmpretrain; start it with ``*`` to find it anywhere in a
            name. Defaults to None, which matches all names.
        task (str, optional): 'classification', 'segmentation' or
            'detection'. Defaults to None, which selects all tasks.

    Returns:
        list[str]: Sorted names; empty if none matches.

    Raises:
        UserError: If the task is unknown.
    """
    allowed = list(dict.fromkeys(TASKS.values()))
    if task is not None and task not in allowed:
        raise UserError(
            f'unknown task {task!r}; allowed are {", ".join(allowed)}'
        )
    return sorted(
        model.name
        for model in _read_models().values()
        if task in (None, model.task)
        and fnmatch.fnmatchcase(model.name, f'{pattern or ""}*')
    )


def get_model(
    name: str,
    pretrained: Union[str, Path, bool, None] = None,
    num_classes: Optional[int] = None,
    **backbone: Any,
) -> nn.Module:
    """Build a classifier, segmentor or detector by its name.

    The model is initialised as for training and is in evaluation mode.
    Synchronised batch norm is replaced by batch norm, so that the model also
    runs on a CPU. Calling a classifier or segmentor with normalised images
    ``(B, C, H, W)`` computes class scores. The models can be passed to the
    inference functions of mmpretrain, mmseg and mmdet, and to
    ``mmengine.runner.Runner``, which keeps the weights. The inference
    functions of mmseg and mmdet use mmengine's default scope, which is that of
    the model built last.

    Examples:
        >>> from mmvvt.apis import get_model
        >>> model = get_model(
        ...     'vvt-tiny_8xb128_in1k', pretrained='vvt-tiny_in1k.pth',
        ...     num_classes=3, drop_path_rate=0.2)

    Args:
        name (str): Name of a model, see :func:`list_models`.
        pretrained (str | Path | bool, optional): Path or URL of a checkpoint,
            or True for the published weights, which must have been converted,
            see :func:`mmvvt.checkpoint.find_weights`. The checkpoint must
            contain the backbone. Other parts that it does not contain, and
            layers of another number of classes, are newly initialised, and
            the log names them. Defaults to None, random weights.
        num_classes (int, optional): Number of classes of all heads. Defaults
            to None, the number in the config.
        **backbone: Settings of the backbone that override those of the
            config, see :class:`mmvvt.models.VVT`, for example
            ``drop_path_rate``, ``frozen_stages`` and ``out_indices``.

    Returns:
        nn.Module: The model on the CPU. Its config is ``model.cfg``, and the
        names and colours of its classes are ``model.dataset_meta``.

    Raises:
        UserError: If the name is unknown, a package is missing, an argument
            is invalid, or the checkpoint does not fit the model.
    """
    info = _find_model(name)
    if num_classes is not None and (
        type(num_classes) is not int or num_classes < 1
    ):
        raise UserError(
            'num_classes must be an integer of at least 1, got '
            f'{num_classes!r}'
        )
    path = _find_checkpoint(info, pretrained)
    # Read first: a missing file is found before a large model is built.
    checkpoint = {} if path is None else read_checkpoint(path)
    with _quiet():
        cfg = read_config(str(info.config))
    if type_name(cfg.model.backbone.get('init_cfg')) == 'Pretrained':
        # Only the argument of this function decides what is loaded.
        cfg.model.backbone.pop('init_cfg')
    cfg.model.backbone.update(backbone)
    if num_classes is not None:
        for head in _find_heads(cfg):
            head['num_classes'] = num_classes
    with _quiet():
        model: Any = build_model(cfg)
        model.init_weights()
    if path is not None:
        load_fitting_parts(model, checkpoint, path)
    model = revert_sync_batchnorm(model).eval()
    names = _class_names(cfg, checkpoint.get('meta') or {}, num_classes)
    _describe(model, cfg, info, names)
    return model


def _find_checkpoint(info: ModelInfo, pretrained: Any) -> Optional[str]:
    """Return the path or URL that the argument ``pretrained`` stands for."""
    if pretrained is None or pretrained is False:
        return None
    if pretrained is True and info.weights is None:
        raise UserError(
            f'there are no published weights of {info.name}: train it with '
            f'python -m mmvvt train {info.name}, and give the path of the '
            'checkpoint as pretrained'
        )
    if pretrained is True:
        return info.weights
    if not isinstance(pretrained, (str, Path)):
        raise UserError(
            'pretrained must be a path, a URL, True or None, got '
            f'{pretrained!r}'
        )
    return str(pretrained)


def _find_model(name: str) -> ModelInfo:
    models = _read_models()
    found = models.get(str(name).lower())
    if found is None:
        stem = PurePath(str(name)).stem.lower()
        similar = difflib.get_close_matches(stem, models, n=5, cutoff=0.5)
        if stem and not similar:
            similar = [model for model in models if stem in model][:5]
        hint = f'similar names are {", ".join(similar)}' if similar else ''
        raise UserError(
            f'unknown model {name!r}; '
            f'{hint or "mmvvt.apis.list_models() returns all names"}'
        )
    return found


def _find_heads(node: Any) -> Iterator[dict]:
    """Find the settings of heads and of the data preprocessor.

    Args:
        node (Any): The complete config, or a part of it.

    Yields:
        dict: Each dict with ``num_classes`` in the model, or in the data
        preprocessor outside of it.
    """
    if isinstance(node, Config):
        yield from _find_heads(node.model)
        yield from _find_heads(node.get('data_preprocessor'))
    elif isinstance(node, dict):
        if 'num_classes' in node:
            yield node
        for child in node.values():
            yield from _find_heads(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _find_heads(child)


@contextmanager
def _quiet() -> Iterator[None]:
    """Build and initialise a model without messages about training.

    Losses warn about their settings, the data preprocessor logs how it encodes
    labels, and mmengine logs a line for each parameter. mmengine also warns if
    the default scope is set to that of another package.
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _class_names(
    cfg: Config, meta: dict, num_classes: Optional[int]
) -> Dict[str, list]:
    """Return the class names and colours for a number of classes."""
    names = class_names(cfg, meta)
    if num_classes not in (None, len(names['classes'])):
        numbers = range(num_classes or 0)
        return dict(
            classes=[f'class {i}' for i in numbers],
            palette=[distinct_colour(i) for i in numbers],
        )
    return names


def _describe(model: Any, cfg: Config, info: ModelInfo, names: dict) -> None:
    """Set the attributes that inference functions read.

    They are called ``cfg`` and ``dataset_meta`` in mmseg and mmdet, and
    ``_config``, ``_dataset_meta`` and ``_metainfo`` in mmpretrain.
    """
    model.cfg = model._config = cfg
    model.dataset_meta = model._dataset_meta = names
    if info.task == 'classification':
        hub = import_module('mmpretrain.apis').ModelHub
        if hub.has(info.name):
            model._metainfo = hub.get(info.name)


def register_with_mmpretrain() -> None:
    """Add the classifiers to the models of mmpretrain.

    After that, ``mmpretrain.list_models``, ``mmpretrain.get_model`` and the
    inferencers of mmpretrain find them by name. Calling this function again
    has no effect, and neither has calling it if mmpretrain cannot be
    imported, or if the configs are missing: functions that need them say so.
    """
    try:
        hub: Any = import_module('mmpretrain.apis').ModelHub
        root = shipped_folder()
    except (ImportError, AssertionError, UserError):
        # mmpretrain raises AssertionError for unsupported versions of mmcv.
        return
    metafile = os.path.join(root, 'configs', 'classification', 'metafile.yml')
    names = [model['Name'] for model in load(metafile)['Models']]
    if not any(hub.has(name) for name in names):
        hub.register_model_index(metafile, config_prefix=root)
