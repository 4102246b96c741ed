"""Report top-1 accuracy, training curves and sample predictions."""

import argparse
import os
import sys

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.checkpoint import load_checkpoint_file, load_predictions
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.preflight import class_names, read_config
from mmvvt.visualization import draw_classification_sheet, plot_curves


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint that was tested')
    parser.add_argument('work_dir', help='work directory of tools/train.py')
    parser.add_argument('predictions', help='output of tools/test.py --out')
    return parser.parse_args()


def main():
    args = parse_args()
    for path in (args.checkpoint, args.work_dir, args.predictions):
        if not os.path.exists(path):
            raise UserError(f'no such file or folder: {path}')
    cfg = read_config(args.config)
    meta = load_checkpoint_file(args.checkpoint).get('meta')
    classes = class_names(cfg, meta)['classes']
    predictions = load_predictions(args.predictions)
    right = sum(
        int(sample['pred_label']) == int(sample['gt_label'])
        for sample in predictions
    )
    total = len(predictions)
    top1 = 100 * right / total

    curves = os.path.join(args.work_dir, 'curves.png')
    sheet = os.path.join(args.work_dir, 'predictions.png')
    plot_curves(args.work_dir, 'accuracy/top1', 'held-out top-1 (%)', curves)
    draw_classification_sheet(
        predictions,
        classes,
        f'{total - right} of {total} held-out images are misclassified',
        sheet,
    )

    print(f'\ntop-1: {top1:.2f} % ({right} of {total} held-out images)')
    print(f'curves: {curves}')
    print(f'predictions: {sheet}')
    show_dir = os.path.join(args.work_dir, 'show')
    print(
        'to draw each image with its prediction: '
        f'{os.path.relpath(sys.executable)} -m mmvvt test {args.config} '
        f'{args.checkpoint} --show-dir {show_dir}'
    )


if __name__ == '__main__':
    run(main)
