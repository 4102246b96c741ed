"""Train a classifier, a segmentor or a detector."""

import argparse
import os
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

from mmengine.runner import Runner

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import dry_run, keep_freed_memory
from mmvvt.checkpoint import (
    READS_RUNNER_CHECKPOINTS,
    check_resumable,
    find_resumable,
    load_checkpoint_file,
)
from mmvvt.cli import add_common_arguments, init_processes, load_config, run
from mmvvt.errors import UserError
from mmvvt.preflight import (
    check_training,
    explain_error,
    guard_pipelines,
    type_name,
)

LOAD_FROM = (
    '; set --cfg-options load_from=PATH, or load_from=None to start from '
    'random weights'
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='auto|PATH',
        help='resume from the given checkpoint, or from the latest '
        'checkpoint in the work directory (auto, or no value)',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='use mixed precision (float32 on a machine without a GPU)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the total batch size',
    )
    parser.add_argument(
        '--skip-unreadable',
        action='store_true',
        help='skip training images and annotations that cannot be loaded, '
        'and report their number at the end',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def resume_from_newest(cfg):
    """Resume from the newest checkpoint that can be used.

    Without one, training starts from the beginning, so that a job that is
    requeued can always be submitted with the same arguments.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [cfg.work_dir]
    if hook.get('out_dir'):
        name = os.path.basename(os.path.abspath(cfg.work_dir))
        folders.append(os.path.join(hook.out_dir, name))
    path, passed_over = find_resumable(folders)
    for error in passed_over:
        print(f'skipped: {error}', file=sys.stderr)
    cfg.resume = path is not None
    if cfg.resume:
        cfg.load_from = path
        print(f'resume from {path}', file=sys.stderr)
    else:
        print(f'nothing to resume from in {cfg.work_dir}', file=sys.stderr)


def merge_arguments(cfg, args):
    if args.resume not in (None, 'auto'):
        cfg.resume = True
        cfg.load_from = args.resume
    elif args.resume == 'auto' or (
        cfg.get('resume') and not cfg.get('load_from')
    ):
        resume_from_newest(cfg)
    if cfg.get('load_from') and '://' not in cfg.load_from:
        path = os.path.expanduser(cfg.load_from)
        if not os.path.isfile(path):
            hint = '' if cfg.get('resume') else LOAD_FROM
            raise UserError(f'no such checkpoint file: {cfg.load_from}{hint}')
        if READS_RUNNER_CHECKPOINTS:
            (check_resumable if cfg.get('resume') else load_checkpoint_file)(
                path
            )
    if not cfg.get('default_hooks'):
        cfg.default_hooks = dict()
    kind = 'mmengine.SafeCheckpointHook'
    hook = cfg.default_hooks.setdefault('checkpoint', dict(type=kind))
    if type_name(hook) == 'CheckpointHook':
        hook.type = kind
    if args.amp:
        wrapper = type_name(cfg.optim_wrapper)
        if wrapper not in (
            '',
            'OptimWrapper',
            'AmpOptimWrapper',
            'AutoAmpOptimWrapper',
        ):
            raise UserError(
                f'--amp does not support the optim_wrapper {wrapper}'
            )
        cfg.optim_wrapper.type = 'AutoAmpOptimWrapper'
    if args.auto_scale_lr:
        if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
            raise UserError(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size in '
                f'{args.config}'
            )
        cfg.auto_scale_lr.enable = True
    return cfg


def name_unreadable_files(cfg, skip):
    """Let errors name the file, or skip files and report their number."""
    log_file = os.path.join(cfg.work_dir, 'skipped_files.txt')
    if skip:
        if not cfg.get('resume'):
            with suppress(FileNotFoundError):  # or removed by another rank
                os.remove(log_file)
        cfg.custom_hooks = [
            *(cfg.get('custom_hooks') or []),
            dict(type='mmengine.SkippedFilesHook', log_file=log_file),
        ]
    loaders = ['train_dataloader', 'val_dataloader']
    guard_pipelines(cfg, loaders, skip, log_file)


def train(cfg, notes):
    runner = Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.warning(note)
    try:
        runner.train()
    except (RuntimeError, ValueError) as error:
        explained = explain_error(error)
        if explained is None:
            raise
        raise explained from error


def main():
    args = parse_args()
    cfg = merge_arguments(load_config(args), args)
    notes = check_training(cfg)
    name_unreadable_files(cfg, args.skip_unreadable and not args.dry_run)
    init_processes(cfg, args)
    keep_freed_memory()
    if args.dry_run:
        with TemporaryDirectory() as folder:  # a dry run leaves no files
            cfg.work_dir = folder
            lines = dry_run(Runner.from_cfg(cfg), training=True)
        print('no problems were found', *notes, *lines, sep='\n')
        return
    train(cfg, notes)


if __name__ == '__main__':
    run(main)
