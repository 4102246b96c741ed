"""Draw a sheet of test images with true and predicted labels."""

import argparse
import os

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.checkpoint import load_checkpoint_file, load_predictions
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.preflight import class_names, read_config
from mmvvt.visualization import draw_segmentation_sheet


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
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = read_config(args.config)
    meta = None
    if args.checkpoint is not None:
        meta = load_checkpoint_file(args.checkpoint).get('meta')
    names = class_names(cfg, meta)
    predictions = load_predictions(args.predictions)
    if not predictions or 'pred_sem_seg' not in predictions[0]:
        raise UserError(
            f'{args.predictions} contains no predictions of a segmentor'
        )
    name = os.path.splitext(os.path.basename(args.config))[0]
    draw_segmentation_sheet(
        predictions,
        names['classes'],
        names['palette'],
        f'{name}: some of {len(predictions)} validation images',
        args.out,
    )
    print(f'image, truth and prediction: {args.out}')


if __name__ == '__main__':
    run(main)
