"""What command lines share: arguments, and how errors are printed.

The only file of the package that ends the process.
"""

import os
import sys
from argparse import Namespace
from typing import Callable

import torch
import torch.distributed
from mmengine.config import Config, DictAction

from .errors import UserError
from .preflight import read_config


def run(main: Callable[[], None]) -> None:
    """Call a tool's main function and print a user's error as one line.

    A :class:`mmvvt.errors.UserError` is printed to stderr without a
    traceback, and the process exits with code 1. Other exceptions are errors
    of the program and keep their traceback.

    Args:
        main (Callable): Called without arguments.
    """
    try:
        main()
    except UserError as error:
        # A data loader's worker process puts its traceback in front.
        name = type(error).__name__
        message = str(error).strip().rpartition(f'{name}: ')[2]
        sys.exit(f'error: {message}')


def add_common_arguments(parser) -> None:
    """Arguments that training and testing share."""
    parser.add_argument(
        '--work-dir',
        help='folder for logs and results (default: work_dirs/CONFIG_NAME)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of the config to override: key=value, nested keys '
        'with dots, lists as key="[a,b]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job were started',
    )
    # torch.distributed.launch passes it, torchrun sets the variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


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
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.update(cfg.get('model_wrapper_cfg') or {})
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
