"""Reading configs, and looking things up in them."""

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
    """Read a config, and make its code base's registries the current ones.

    Args:
        config (str | Config): Config file, or a config that was read before.
        options (dict, optional): Settings to override. Defaults to None.

    Returns:
        Config: The config; a copy, where one was given.

    Raises:
        UserError: If the file does not exist, or needs a package that is not
            installed.
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
            f'{INSTALL_HINTS.get(scope, "see README.md")}'
        ) from error
    init_default_scope(scope)
    return cfg


def innermost_datasets(dataset: dict) -> Iterator[dict]:
    """A data set's config, or those inside its wrappers."""
    inner: List[dict] = list(dataset.get('datasets', []))
    if isinstance(dataset.get('dataset'), dict):
        inner.append(dataset['dataset'])
    if not inner:
        yield dataset
    for part in inner:
        yield from innermost_datasets(part)


def dataset_class(dataset: dict) -> Optional[type]:
    """Class of a data set's config, looked up in the current scope.

    Args:
        dataset (dict): With ``type``, a name or a class.

    Returns:
        type | None: None if there is no such name.
    """
    if not isinstance(dataset['type'], str):
        return dataset['type']
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(dataset['type'])
