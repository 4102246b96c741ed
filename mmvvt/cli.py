"""Arguments and error handling shared by the command-line tools.

This is the only module of the package that exits the process.
"""

import logging
import os
import sys
from argparse import Namespace
from typing import Any, Callable

import torch
import torch.distributed
from mmengine.config import Config, DictAction

from .errors import UserError
from .fileio import DISK_FULL
from .preflight import read_config


def _stop_if_disk_is_full(handler, record) -> None:
    """Replacement for ``logging.Handler.handleError``.

    Instead of printing a traceback for each line that cannot be written, it
    ends the run when the disk is full.
    """
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        path = getattr(handler, 'baseFilename', None)
        raise OSError(error.errno, error.strerror, path) from error
    _print_error(handler, record)


_print_error = logging.Handler.handleError


def run(main: Callable[[], None]) -> None:
    """Run the main function of a tool and report user errors in one line.

    A :class:`mmvvt.errors.UserError` is printed to stderr without a
    traceback, and the process exits with code 1. Other exceptions are bugs
    and keep their traceback. The process group of a distributed run, if any,
    is destroyed when the main function returns.

    Args:
        main (Callable): Main function, called without arguments.
    """
    handler: Any = logging.Handler
    handler.handleError = _stop_if_disk_is_full
    try:
        main()
        # The threads of a group may abort a process that exits before them.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        # PreflightError has one line per problem.
        message = str(error).replace('\n', '\nerror: ')
        sys.exit(f'error: {message}')
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        # For example, a logger that writes to a full disk.
        place = f' {error.filename}' if error.filename else ''
        sys.exit(f'error: cannot write{place}: {error.strerror}')


def add_cfg_options(parser) -> None:
    """Add the argument that overrides settings of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value, nested keys with '
        'dots, lists as key="[a,b]"',
    )


def add_common_arguments(parser) -> None:
    """Add the arguments shared by training and testing."""
    parser.add_argument(
        '--work-dir',
        help='directory for logs and results (default: work_dirs/CONFIG_NAME)',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher of the distributed job (default: none)',
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='do everything up to the first step, print the problems that '
        'are found and the resources that a step needs, and stop',
    )
    # torch.distributed.launch passes this; torchrun sets LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: Namespace) -> Config:
    """Read the config and merge the common arguments into it.

    Args:
        args (Namespace): Parsed arguments with ``config`` and those added by
            :func:`add_common_arguments`.

    Returns:
        Config: Config with ``work_dir`` and ``launcher`` set.
    """
    cfg = read_config(args.config, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = os.path.splitext(os.path.basename(cfg.filename))[0]
        cfg.work_dir = os.path.join('work_dirs', name)
    cfg.launcher = args.launcher
    return cfg


def init_processes(cfg: Config, args: Namespace) -> None:
    """Initialize the process group for distributed runs on the CPU.

    mmengine binds each process to a CUDA device when it initializes the
    process group and when it wraps the model. It does not initialize a group
    that already exists, and it reads the arguments of the model wrapper from
    the config. This function therefore does both on machines without a GPU.

    Args:
        cfg (Config): Config; ``model_wrapper_cfg`` is set if needed.
        args (Namespace): Parsed arguments with ``launcher`` and
            ``local_rank``.
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
