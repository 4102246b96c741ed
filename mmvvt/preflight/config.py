"""Reading of configs and of the datasets in them."""

import copy
import os
from importlib import import_module
from typing import Iterator, List, Optional, Union

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..errors import UserError

INSTALL_HINTS = {
    'mmpretrain': 'pip install mmpretrain==1.2.0',
    'mmseg': "pip install 'mmvvt[segmentation]'",
    'mmdet': "pip install 'mmvvt[detection]', and mmcv with its compiled ops",
}


def read_config(
    config: Union[str, Config], options: Optional[dict] = None
) -> Config:
    """Read a config and initialise its default scope.

    Args:
        config (str | Config): Path of a config file, or a config.
        options (dict, optional): Settings that override those of the config.
            Defaults to None.

    Returns:
        Config: The config. If a config was given, a copy of it.

    Raises:
        UserError: If the file does not exist or requires a package that is
            not installed.
    """
    if isinstance(config, Config):
        path, cfg = config.filename, copy.deepcopy(config)
    else:
        path, cfg = config, None
        if not os.path.isfile(path):
            raise UserError(f'no such config file: {path}')
    scope = None
    try:
        if cfg is None:
            cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(options)
        scope = cfg.get('default_scope', 'mmengine')
        import_module(scope)
    except ModuleNotFoundError as error:
        raise UserError(
            f'{path} needs the package {error.name}, which is not installed: '
            f'{INSTALL_HINTS.get(scope or "", "see README.md")}'
        ) from error
    init_default_scope(scope)
    return cfg


def innermost_datasets(dataset: dict) -> Iterator[dict]:
    """Iterate over the dataset configs inside dataset wrappers."""
    inner: List[dict] = list(dataset.get('datasets', []))
    if isinstance(dataset.get('dataset'), dict):
        inner.append(dataset['dataset'])
    if not inner:
        yield dataset
    for part in inner:
        yield from innermost_datasets(part)


def dataset_class(dataset: dict) -> Optional[type]:
    """Return the class of a dataset config, found in the current scope.

    Args:
        dataset (dict): Dataset config; ``type`` is a name or a class.

    Returns:
        type | None: The class, or None if the name is not registered.
    """
    if not isinstance(dataset['type'], str):
        return dataset['type']
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(dataset['type'])
