"""The configs and tools that the package contains, and names for them.

A wheel contains them in ``mmvvt/.mim``, as the packages of OpenMMLab do. In a
develop install, that folder links to the clone.
"""

import difflib
import os
from pathlib import Path, PurePosixPath
from typing import Dict

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from .errors import MissingFileError

PREFIX = 'mmvvt::'


def shipped_folder() -> Path:
    """Return the folder that contains ``configs/`` and ``tools/``.

    Returns:
        Path: ``mmvvt/.mim``. In a clone that is not installed, the clone.

    Raises:
        MissingFileError: If neither of them has the configs, for example
            because only the Python files were copied.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / '.mim', package.parent):
        if (folder / 'configs' / '_base_').is_dir():
            return folder
    raise MissingFileError(
        f'{package} has no configs and tools in .mim: install mmvvt from a '
        'wheel, or from a clone with pip install -e .'
    )


def shipped_configs() -> Dict[str, Path]:
    """Return the configs of the package.

    Returns:
        dict[str, Path]: For each config, in the order of their paths, its
        name without folder and extension, such as 'vvt-tiny_8xb128_in1k', and
        its file. Base configs are not included.
    """
    folder = shipped_folder() / 'configs'
    return {
        path.stem: path
        for path in sorted(folder.rglob('*.py'))
        if '_base_' not in path.relative_to(folder).parts
    }


def find_config(config: str) -> str:
    """Find a config file by its path or name.

    Args:
        config (str): One of

            - the path of a file;
            - ``mmvvt::`` and a path in the folder ``configs`` of the package,
              such as 'mmvvt::classification/vvt-tiny_8xb128_in1k.py';
            - the name of a config of the package, such as
              'vvt-tiny_8xb128_in1k'.

    Returns:
        str: Path of the file.

    Raises:
        MissingFileError: If there is no such file. The message contains
            similar names.
    """
    config = os.fspath(config)
    if os.path.isfile(config):
        return config
    shipped = shipped_configs()
    if config in shipped:
        return str(shipped[config])
    if config.startswith(PREFIX):
        path = shipped_folder() / 'configs' / config[len(PREFIX) :]
        if path.is_file():
            return str(path)
    name = PurePosixPath(config.replace('\\', '/')).stem
    similar = difflib.get_close_matches(name, shipped)
    hint = f'; similar names: {", ".join(similar)}' if similar else ''
    raise MissingFileError(f'no such config file: {config}{hint}')


def register_config_prefix() -> None:
    """Let mmengine find the configs of the package as ``mmvvt::PATH``.

    mmengine has a table of the packages whose configs can be used in
    ``_base_`` and :func:`mmengine.hub.get_config`. This function adds mmvvt to
    it.

    Base configs of other packages are given the scope of their package. The
    modules in the configs of mmvvt belong to mmpretrain, mmseg or mmdet, so
    they keep the default scope of the config that uses them.
    """
    # mmengine looks up the folder of a package by its distribution, which is
    # wrong for develop installs. A name that is no distribution is looked up
    # as a module.
    MODULE2PACKAGE['mmvvt'] = __name__

    get_cfg_path = Config._get_cfg_path

    def find_base_config(cfg_path, filename):
        if cfg_path.startswith(PREFIX):
            return find_config(cfg_path), None
        return get_cfg_path(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_base_config)
