"""Evaluate a checkpoint: top-1 accuracy, mIoU or mAP."""

import argparse
import os
from tempfile import TemporaryDirectory

import mmengine
from mmengine.config import ConfigDict
from mmengine.runner import Runner

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import dry_run, keep_freed_memory
from mmvvt.cli import add_common_arguments, init_processes, load_config, run
from mmvvt.engine import DumpPredictions
from mmvvt.errors import UserError
from mmvvt.preflight import check_testing, guard_pipelines, type_name


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='FILE.pkl|FILE.json',
        help='write the predictions (.pkl) or the metrics (.json)',
    )
    parser.add_argument(
        '--show-dir', help='folder for visualizations of the predictions'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='use test-time augmentation, with the tta_model and '
        'tta_pipeline of the config',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def draw_into(cfg, folder):
    """Enable the visualization hook, whose options differ by package."""
    hook = cfg.default_hooks.get('visualization')
    kind = type_name(hook)
    if kind.endswith('SegVisualizationHook'):
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
    elif kind.endswith('DetVisualizationHook'):
        hook.update(draw=True, interval=1)
        # A relative path would be resolved in the work directory.
        hook.test_out_dir = os.path.abspath(folder)
    elif kind.endswith('VisualizationHook'):
        hook.update(enable=True, out_dir=folder, interval=1)
    else:
        raise UserError(
            '--show-dir needs default_hooks.visualization in the config'
        )


def augment_at_test_time(cfg):
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise UserError(f'--tta needs {key} in the config')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # the innermost dataset has the pipeline
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def merge_arguments(cfg, args):
    path = os.path.expanduser(args.checkpoint)
    if not os.path.isfile(path) and '://' not in path:
        raise UserError(f'no such checkpoint file: {args.checkpoint}')
    cfg.load_from = args.checkpoint
    if args.out and os.path.splitext(args.out)[1] not in ('.pkl', '.json'):
        raise UserError(
            f'--out must end in .pkl (predictions) or .json (metrics), got '
            f'{args.out}'
        )
    if args.show_dir:
        draw_into(cfg, args.show_dir)
    if args.tta:
        augment_at_test_time(cfg)
    return cfg


def main():
    args = parse_args()
    cfg = merge_arguments(load_config(args), args)
    notes = check_testing(cfg, args.checkpoint)
    guard_pipelines(cfg, ['test_dataloader'])
    init_processes(cfg, args)
    keep_freed_memory()
    if args.dry_run:
        with TemporaryDirectory() as folder:  # a dry run leaves no files
            cfg.work_dir = folder
            lines = dry_run(Runner.from_cfg(cfg), training=False)
        print('no problems were found', *notes, *lines, sep='\n')
        return
    runner = Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.warning(note)
    if args.out and args.out.endswith('.pkl'):
        runner.test_evaluator.metrics.append(
            DumpPredictions(out_file_path=args.out)
        )
    metrics = runner.test()
    if args.out and args.out.endswith('.json'):
        if mmengine.dist.is_main_process():
            mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    run(main)
