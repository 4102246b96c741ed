"""What tools/train.py and tools/test.py share: from a command line to a
config that mmengine's runner takes, with one clear line where it cannot."""

import inspect
import os
import sys
from argparse import Namespace
from contextlib import contextmanager
from importlib import import_module
from typing import Dict, Iterator, List, Optional, Set

import torch
import torch.distributed
import torch.nn as nn
from mmengine.config import Config, DictAction
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from mmvvt.checkpoint import (READS_RUNNER_CHECKPOINTS, CheckpointError,
                              load_checkpoint_file)
from mmvvt.datasets.labels import LabelError
from mmvvt.engine.coco_check import check_coco_dataset, reads_coco

INSTALL_HINTS = {
    'mmpretrain': 'pip install mmpretrain==1.2.0',
    'mmseg': "pip install 'mmvvt[segmentation]'",
    'mmdet': "pip install 'mmvvt[detection]', and mmcv with its compiled ops",
}


def fail(message: str) -> None:
    """Print one line to stderr and exit with code 1."""
    sys.exit(f'error: {message}')


def add_common_arguments(parser) -> None:
    """Arguments that training and testing share."""
    parser.add_argument('--work-dir', help='folder for logs and results '
                        '(default: work_dirs/CONFIG_NAME)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of the config to override: key=value, nested keys '
        'with dots, lists as key="[a,b]"')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job were started')
    # torch.distributed.launch passes it, torchrun sets the variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config, and make its code base's registries the current ones.

    Args:
        path (str): Config file.
        options (dict, optional): Settings to override. Defaults to None.

    Returns:
        Config: The config.
    """
    if not os.path.isfile(path):
        fail(f'no such config file: {path}')
    scope = None
    try:
        cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(options)
        scope = cfg.get('default_scope', 'mmengine')
        import_module(scope)
    except ModuleNotFoundError as error:
        fail(f'{path} needs the package {error.name}, which is not '
             f'installed: {INSTALL_HINTS.get(scope, "see README.md")}')
    init_default_scope(scope)
    return cfg


def load_config(args: Namespace) -> Config:
    """Read the config and merge the common arguments into it.

    Args:
        args (Namespace): With what :func:`add_common_arguments` adds, and
            ``config``.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.
    """
    cfg = read_config(args.config, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = os.path.splitext(os.path.basename(args.config))[0]
        cfg.work_dir = os.path.join('work_dirs', name)
    cfg.launcher = args.launcher
    return cfg


def init_processes(cfg: Config, args: Namespace) -> None:
    """Join the process group where there is no GPU to bind to.

    mmengine binds each process to a CUDA device, first when it joins the
    group and again when it wraps the model. It leaves a group that is there
    already alone, and takes the wrapper's arguments from the config.

    Args:
        cfg (Config): ``model_wrapper_cfg`` is set in it where needed.
        args (Namespace): With ``launcher`` and ``local_rank``.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher != 'pytorch' or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper.update(cfg.get('model_wrapper_cfg') or {})
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


# -- data that is not there ---------------------------------------------------


def _datasets(dataset: dict) -> Iterator[dict]:
    """A data set's config, or those inside its wrappers."""
    inner: List[dict] = list(dataset.get('datasets', []))
    if isinstance(dataset.get('dataset'), dict):
        inner.append(dataset['dataset'])
    if not inner:
        yield dataset
    for part in inner:
        yield from _datasets(part)


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


def _fetches_itself(dataset: dict) -> bool:
    """Whether the class makes or downloads its files where absent."""
    cls = dataset_class(dataset)
    if cls is None:
        return False  # the runner will say that there is none
    parameter = inspect.signature(cls.__init__).parameters.get('download')
    return parameter is not None and dataset.get('download',
                                                 parameter.default)


def _check_folder(path: str, where: str) -> None:
    if '://' in path:
        return  # in a store that the runner will ask
    if not os.path.isdir(path):
        fail(f'{where}: the data folder does not exist: {path}')
    if not any(os.scandir(path)):
        fail(f'{where}: the data folder is empty: {path}')


def _check_annotations(path: str, where: str) -> None:
    if '://' not in path and not os.path.isfile(path):
        fail(f'{where}: the annotation file does not exist: {path}')


def check_data(cfg: Config, loaders: List[str]) -> None:
    """Stop with one line where a data set's files are not there.

    Of a COCO data set, that also means a file in another format, with other
    categories than the classes, or with images that are not there.

    Args:
        cfg (Config): The whole config.
        loaders (list[str]): Names of the data loaders that will be used.
            Data sets that fetch themselves are passed over.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        evaluator = cfg.get(loader.replace('dataloader', 'evaluator'))
        if not isinstance(evaluator, dict):
            evaluator = {}
        datasets = [
            dataset for dataset in _datasets(cfg[loader]['dataset'])
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
            if reads_coco(cls):
                try:
                    check_coco_dataset(
                        dataset,
                        cls,
                        annotated=not evaluator.get('format_only', False))
                except ValueError as error:
                    fail(f'{where}: {error}')
        # The metric's own file; a data set that fetches itself may write it.
        annotations = evaluator.get('ann_file')
        if datasets and isinstance(annotations, str):
            where = f'{loader.replace("dataloader", "evaluator")} '
            _check_annotations(annotations,
                               f'{where}({evaluator.get("type")})')


def check_label_maps(cfg: Config, loaders: List[str]) -> None:
    """Stop with one line where an image of a segmentor's data has no labels.

    mmseg would find out when it comes to that image, hours later perhaps.

    Args:
        cfg (Config): The whole config; others than mmseg's are passed over.
        loaders (list[str]): Names of the data loaders that will be used.
    """
    if cfg.get('default_scope') != 'mmseg':
        return
    listed: Dict[str, Set[str]] = {}  # names by folder: one look at each
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for config in _datasets(cfg[loader]['dataset']):
            dataset = DATASETS.build(dict(config, pipeline=[]))
            for index in range(len(dataset)):
                path = dataset.get_data_info(index).get('seg_map_path')
                if path is None or '://' in path:
                    continue
                folder, name = os.path.split(path)
                if folder not in listed:
                    listed[folder] = set(
                        os.listdir(folder)) if os.path.isdir(folder) else set()
                if name not in listed[folder]:
                    fail(f'{loader} ({config["type"]}): the annotation file '
                         f'does not exist: {path}')


@contextmanager
def label_errors_in_one_line():
    """End with one line where a label map is found wrong on the way."""
    try:
        yield
    except LabelError as error:
        # A worker process puts its whole traceback in front.
        fail(str(error).strip().rpartition(f'{LabelError.__name__}: ')[2])


# -- weights that are not there, or of another model --------------------------


def _pretrained(node, where: str = 'model') -> Iterator[tuple]:
    """Each ``init_cfg`` of type 'Pretrained' below a node, and its place."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and 'checkpoint' in node:
            yield where, node
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}[{index}]')


def check_pretrained_files(cfg: Config) -> None:
    """Stop with one line where a file that ``init_cfg`` names is not there.

    Args:
        cfg (Config): The whole config.
    """
    for where, init_cfg in _pretrained(cfg.model):
        path = init_cfg['checkpoint']
        if '://' not in path and not os.path.isfile(path):
            fail(f'no such pretrained checkpoint: {path}; put it there, or '
                 f'start from random weights with --cfg-options '
                 f'{where}=None')


def _read_state(path: str, prefix: str) -> Dict[str, Tensor]:
    """Tensors of a checkpoint file below a prefix, without the prefix."""
    try:
        checkpoint = load_checkpoint_file(path)
    except CheckpointError as error:
        fail(str(error))
    state = checkpoint.get('state_dict', checkpoint)
    return {
        key[len(prefix):]: tensor
        for key, tensor in state.items() if key.startswith(prefix)
    }


def _check_fit(module: nn.Module, path: str, prefix: str, what: str) -> None:
    """Stop with one line where a module's weights are not in a file."""
    if '://' in path or not READS_RUNNER_CHECKPOINTS:
        return  # the runner will fetch it, or can alone read it
    state = _read_state(path, prefix)
    wanted = {
        key: tensor.shape
        for key, tensor in module.state_dict().items()
        if not key.endswith('num_batches_tracked')
    }
    missing = [key for key in wanted if key not in state]
    other = [
        key for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    if missing:
        example = f'there is no {missing[0]}'
    elif other:
        example = (f'{other[0]} has shape {tuple(state[other[0]].shape)}, '
                   f'the model wants {tuple(wanted[other[0]])}')
    else:
        return
    fail(f'{what} is of another architecture than the model: '
         f'{len(missing)} of {len(wanted)} tensors are missing and '
         f'{len(other)} have another shape; for example, {example}')


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for processes and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def check_pretrained_backbone(cfg: Config, model: nn.Module) -> None:
    """Stop with one line where the pretrained backbone is another one.

    mmengine would load what fits, print the rest, and train on.

    Args:
        cfg (Config): The whole config.
        model (nn.Module): The model that was built from it.
    """
    init_cfg = cfg.model.get('backbone', {}).get('init_cfg')
    if not isinstance(init_cfg, dict) or init_cfg.get('type') != 'Pretrained':
        return
    path = init_cfg['checkpoint']
    _check_fit(
        _unwrap(model).backbone, path,
        init_cfg.get('prefix') or '', f'the pretrained backbone in {path}')


def check_checkpoint(path: str, model: nn.Module) -> None:
    """Stop with one line where a checkpoint to test is of another model.

    mmengine would load what fits, print the rest, and test the mixture.

    Args:
        path (str): Checkpoint file; one behind a URL is passed over.
        model (nn.Module): The model that is to be tested.
    """
    _check_fit(_unwrap(model), path, '', f'the checkpoint {path}')
