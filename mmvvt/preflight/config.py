"""Reading of configs and of the datasets in them."""

import copy
import os
import re
from importlib import import_module
from typing import Any, Iterator, List, Optional, Union

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from ..errors import UserError
from ..shipped import find_config

INSTALL_HINTS = {
    'mmpretrain': 'pip install mmpretrain==1.2.0',
    'mmseg': "pip install 'mmvvt[segmentation]'",
    'mmdet': "pip install 'mmvvt[detection]', and mmcv with its compiled ops",
}
"""How to install each package of OpenMMLab."""

# The newest versions that the original builds of OpenMMLab accept
NEWEST_VERSIONS = {'mmcv': '2.1.0', 'mmengine': '0.10.7'}


def read_config(
    config: Union[str, Config], options: Optional[dict] = None
) -> Config:
    """Read a config and initialise its default scope.

    Args:
        config (str | Config): A config, or the path of a config file, or the
            name of a config of the package, see
            :func:`mmvvt.shipped.find_config`.
        options (dict, optional): Settings that override those of the config.
            Defaults to None.

    Returns:
        Config: The config. If a config was given, a copy of it.

    Raises:
        UserError: If the file does not exist, or requires a package that is
            not installed or does not accept the version of another one, or
            if an option does not fit the config.
    """
    if isinstance(config, Config):
        path, cfg = config.filename, copy.deepcopy(config)
    else:
        path, cfg = find_config(config), None
    scope: Optional[str] = None
    try:
        if cfg is None:
            cfg = Config.fromfile(path)
        if options:
            _override(cfg, options)
        scope = cfg.get('default_scope', 'mmengine') or _package_of(cfg)
        import_module(scope)
    except ImportError as error:
        missing = _missing_module(error)
        if missing is None:
            raise
        package = scope or missing.partition('.')[0]
        raise UserError(
            f'{path} needs the package {missing}, which is not installed: '
            f'{INSTALL_HINTS.get(package, "see README.md")}'
        ) from error
    except AssertionError as error:
        explained = _explain_version_check(error, path, scope)
        if explained is None:
            raise
        raise explained from error
    init_default_scope(scope)
    return cfg


def _override(cfg: Config, options: dict) -> None:
    try:
        cfg.merge_from_dict(options)
    except (AssertionError, IndexError, KeyError, TypeError) as error:
        # mmengine's messages have several lines.
        reason = ' '.join(str(error.args[0] if error.args else error).split())
        raise UserError(
            f'{", ".join(map(str, options))} cannot be set in '
            f'{cfg.filename or "the config"}: {reason}'
        ) from error


def _missing_module(error: BaseException) -> Optional[str]:
    """Return the name of the module that is not installed, if any.

    mmengine raises other errors for ``custom_imports`` that fail.
    """
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError):
            return cause.name
        cause = cause.__cause__ or cause.__context__
    return None


def _explain_version_check(
    error: AssertionError, path: str, scope: Optional[str]
) -> Optional[UserError]:
    """Explain the error if it is the version check of an OpenMMLab package."""
    found = re.match(r'(\w+)==(\S+) is used but incompatible', str(error))
    if found is None:
        return None
    package, version = found[1].lower(), found[2]
    return UserError(
        f'{path} needs {scope or "a package"}, which does not support '
        f'{package} {version}: install {package}=={NEWEST_VERSIONS[package]}'
    )


def _package_of(cfg: Config) -> str:
    """Return the scope of a pure Python config without a default scope.

    The types of such a config are classes. The classes have default
    arguments with names that must be found in the package of the model.
    """
    model = cfg.get('model')
    kind = model.get('type') if isinstance(model, dict) else None
    package = getattr(kind, '__module__', '').partition('.')[0]
    return package if package in INSTALL_HINTS else 'mmengine'


def type_name(cfg: Any) -> str:
    """Return the class name of a config without its scope.

    Args:
        cfg (dict | None): Config whose ``type`` is a class, or a name with or
            without a scope, such as 'mmdet.CocoMetric'.

    Returns:
        str: Name such as 'CocoMetric'; '' without a type.
    """
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    if kind is None:
        return ''
    name = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition('.')[2]


def num_processes(cfg: Config) -> int:
    """Return the number of processes of a run, as its launcher sets it.

    Args:
        cfg (Config): Config with ``launcher``.

    Returns:
        int: The number of processes, 1 if it is not known.
    """
    if cfg.get('launcher', 'none') == 'none':
        return 1
    names = ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
    return next((int(os.environ[n]) for n in names if n in os.environ), 1)


def innermost_datasets(dataset: dict) -> Iterator[dict]:
    """Iterate over the dataset configs inside dataset wrappers."""
    inner: List[dict] = list(dataset.get('datasets') or [])
    if isinstance(dataset.get('dataset'), dict):
        inner.append(dataset['dataset'])
    if not inner:
        yield dataset
    for part in inner:
        yield from innermost_datasets(part)


def pipeline_steps(dataset: dict) -> Iterator[dict]:
    """Iterate over the transforms of a dataset config.

    Transforms inside of other transforms, such as those of ``TestTimeAug``,
    are included.

    Args:
        dataset (dict): Dataset config.

    Yields:
        dict: Config of a transform.
    """
    steps = list(dataset.get('pipeline') or [])
    while steps:
        step = steps.pop(0)
        if isinstance(step, dict):
            yield step
            steps = list(step.get('transforms') or []) + steps
        elif isinstance(step, (list, tuple)):
            steps = list(step) + steps


def annotation_steps(dataset: dict) -> List[dict]:
    """Return the transforms of a dataset config that load annotations.

    Args:
        dataset (dict): Dataset config.

    Returns:
        list[dict]: Configs of transforms. Empty for images to predict on.
    """
    return [
        step
        for step in pipeline_steps(dataset)
        if 'Annotations' in type_name(step)
    ]


def guard_pipelines(
    cfg: Config,
    loaders: List[str],
    skip: bool = False,
    log_file: Optional[str] = None,
) -> None:
    """Let the datasets of a config name files that they cannot load.

    Args:
        cfg (Config): The complete config; the pipelines are modified.
        loaders (list[str]): Names of the data loaders that will be used.
        skip (bool): Whether training skips such files, see
            :class:`mmvvt.datasets.GuardedPipeline`. Defaults to False.
        log_file (str, optional): File for the paths of skipped files.
            Defaults to None.
    """
    for loader in loaders:
        if not cfg.get(loader):
            continue
        options = {}
        if skip and loader == 'train_dataloader':
            options = dict(skip=True, log_file=log_file)
        owners = [
            (dataset, 'pipeline')
            for dataset in innermost_datasets(cfg[loader]['dataset'])
        ]
        if loader == 'train_dataloader':
            # mmdet's PipelineSwitchHook replaces the pipeline in an epoch.
            owners += [
                (hook, 'switch_pipeline')
                for hook in cfg.get('custom_hooks') or []
                if isinstance(hook, dict)
            ]
        for owner, key in owners:
            steps = owner.get(key)
            if steps and type_name(steps[0]) != 'GuardedPipeline':
                owner[key] = [
                    dict(type='GuardedPipeline', transforms=steps, **options)
                ]


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


def dataset_meta(dataset: dict) -> dict:
    """Return the meta information of a dataset config without its data.

    Args:
        dataset (dict): Dataset config, may be a dataset wrapper.

    Returns:
        dict: ``classes`` and ``palette``, if the config names the classes.
        Otherwise, those of the dataset class. Keys are missing if neither
        has them.
    """
    dataset = next(innermost_datasets(dataset))
    own = {k.lower(): v for k, v in (dataset.get('metainfo') or {}).items()}
    classes = own.get('classes') or dataset.get('classes')
    if classes is not None:
        if isinstance(classes, str):
            classes = (
                list_from_file(classes)
                if os.path.isfile(os.path.expanduser(classes))
                else [classes]
            )
        # The palette of the dataset class belongs to its own classes.
        return dict(classes=list(classes), palette=own.get('palette') or [])
    meta = getattr(dataset_class(dataset), 'METAINFO', None) or {}
    meta = {key.lower(): value for key, value in meta.items()}
    return {**meta, **own}


def class_names(cfg: Config, meta: Optional[dict] = None) -> dict:
    """Return the names and colours of the classes of a model.

    Args:
        cfg (Config): Config with a ``test_dataloader``.
        meta (dict, optional): ``meta`` of a checkpoint, which has the names
            that the model was trained with. Defaults to None.

    Returns:
        dict: ``classes`` (list[str]) and ``palette`` (list of RGB colours):
        those of the checkpoint, otherwise those that the config gives the
        test dataset, otherwise those of the dataset class. Both are empty if
        none of them names the classes.
    """
    found = (meta or {}).get('dataset_meta') or {}
    found = {key.lower(): value for key, value in found.items()}
    if not found.get('classes') and cfg.get('test_dataloader'):
        found = dataset_meta(cfg.test_dataloader.dataset)
    classes = found.get('classes')
    palette = found.get('palette')
    return dict(
        classes=[str(name) for name in ([] if classes is None else classes)],
        palette=[tuple(colour) for colour in palette]
        if isinstance(palette, (list, tuple))
        else [],
    )


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config as the runner does, with random weights.

    Args:
        cfg (Config): The complete config.

    Returns:
        nn.Module: The model.

    Raises:
        UserError: If the config has no model, or if the model refers to a
            class, an argument or a package that does not exist.
    """
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f'{cfg.filename or "the config"} has no model')
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault(
            'data_preprocessor', copy.deepcopy(cfg.data_preprocessor)
        )
    try:
        return MODELS.build(model)
    except ModuleNotFoundError as error:
        package = cfg.get('default_scope') or str(error.name).split('.')[0]
        raise UserError(
            f'{cfg.filename or "the model"} needs the package {error.name}, '
            'which is not installed: '
            f'{INSTALL_HINTS.get(package, "see README.md")}'
        ) from error
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError) as error:
        reason = _config_fault(error)
        if reason is None:
            raise  # an error inside a module
        raise UserError(f'the model of {cfg.filename}: {reason}') from error


def _config_fault(error: Exception) -> Optional[str]:
    """Explain an unknown class or a wrong argument; None for other errors."""
    text = str(error.args[0] if error.args else error)
    if isinstance(error, AssertionError):
        return text or None  # OpenMMLab checks arguments with assertions.
    unknown = re.search(r'(\S+) is not in the (\S+) registry', text)
    if unknown:
        return (
            f'{unknown[1]} is not registered in {unknown[2]}; check its name, '
            'and that custom_imports imports its module'
        )
    wrong = re.search(
        r'(\w+)\.__init__\(\) (?:got an unexpected keyword|missing \d+ '
        r'required \S+) arguments?:? (.*)',
        text,
    )
    if wrong is None:
        return None
    kind = 'needs' if 'missing' in wrong[0] else 'has no'
    return f'{wrong[1]} {kind} argument {wrong[2]}'
