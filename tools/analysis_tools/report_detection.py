"""Draw a sheet of test images with true and predicted boxes."""

import argparse
import os

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.checkpoint import load_checkpoint_file, load_predictions
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.preflight import class_names, read_config
from mmvvt.visualization import draw_detection_sheet


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('predictions', help='output of tools/test.py --out')
    parser.add_argument('out', help='PNG file to write')
    parser.add_argument(
        '--checkpoint',
        help='checkpoint that was tested, whose class names are used '
        '(default: those of the config)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='minimum score of the boxes to draw (default: 0.3)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        raise UserError(
            f'--score-thr must be between 0 and 1, got {args.score_thr}'
        )
    cfg = read_config(args.config)
    meta = None
    if args.checkpoint is not None:
        meta = load_checkpoint_file(args.checkpoint).get('meta')
    names = class_names(cfg, meta)
    predictions = load_predictions(args.predictions)
    if not predictions or 'pred_instances' not in predictions[0]:
        raise UserError(
            f'{args.predictions} contains no predictions of a detector'
        )
    name = os.path.splitext(os.path.basename(args.config))[0]
    draw_detection_sheet(
        predictions,
        names['classes'],
        names['palette'],
        f'{name}: some of {len(predictions)} validation images, scores of at '
        f'least {args.score_thr:g}',
        args.score_thr,
        args.out,
    )
    print(f'truth and prediction: {args.out}')


if __name__ == '__main__':
    run(main)
