"""Draw which parts of images increase the score of a class, by Grad-CAM.

The result is a contact sheet: one row for each image, with a heat map for each
class. For a segmentor, the score is the mean over the pixels that are
predicted as the class; for a detector, the mean over its boxes with a high
score. Images are transformed by the test pipeline of the config, and the sheet
shows the results.
"""

import argparse
import os

from mmengine.logging import MMLogger

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import (
    Predictor,
    choose_device,
    class_activation_maps,
    keep_freed_memory,
)
from mmvvt.cli import add_cfg_options, run
from mmvvt.errors import UserError
from mmvvt.fileio import atomic_write, check_writable
from mmvvt.preflight import read_config
from mmvvt.visualization import draw_activation_maps


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'images', nargs='+', metavar='image', help='image files'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', help='PNG file to write')
    parser.add_argument(
        '--class',
        nargs='+',
        dest='classes',
        metavar='NAME_OR_INDEX',
        help='classes (default: the predicted class of a classifier, at most '
        'three predicted classes of a segmentor or detector)',
    )
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument(
        '--stage',
        type=int,
        metavar='N',
        help='stage of the backbone, 1 to 4, whose norm is the layer '
        '(default: the last stage that the head uses)',
    )
    layer.add_argument(
        '--layer',
        metavar='NAME',
        help='layer of the model, such as backbone.block3.1.norm1 or '
        'neck.fpn_convs.0',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='minimum score of detections (default: 0.3)',
    )
    parser.add_argument(
        '--device',
        help='such as cpu or cuda:1 (default: cuda if available, else cpu)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def describe(found):
    """Return the name of the class, its score and what it is the mean of."""
    lines = [found.name, f'score {found.score:.3g}']
    lines += found.target.split(', ')
    return lines if found.heat.any() else [*lines, 'the map is zero']


def main():
    args = parse_args()
    if not args.out.endswith('.png'):
        raise UserError(f'OUT must end with .png, got {args.out}')
    check_writable(args.out)
    if not 0 <= args.score_thr <= 1:
        raise UserError(
            f'--score-thr must be from 0 to 1, got {args.score_thr}'
        )
    # Suppress log messages that are not relevant for inference.
    MMLogger.get_instance('vis_cam', log_level='ERROR')
    keep_freed_memory()
    predictor = Predictor(
        read_config(args.config, args.cfg_options),
        args.checkpoint,
        choose_device(args.device),
        args.score_thr,
    )
    rows = []
    for image in args.images:
        result = class_activation_maps(
            predictor, image, args.classes, args.stage, args.layer
        )
        height, width = result.grid
        for found in result.maps:
            name, *rest = describe(found)
            print(f'{image}: {name}: {", ".join(rest)}')
        panels = [('\n'.join(describe(m)), m.heat) for m in result.maps]
        label = f'{os.path.basename(image)}\n{height} x {width} positions'
        rows.append((label, result.image, panels))
    with atomic_write(args.out) as temporary:
        draw_activation_maps(rows, f'Grad-CAM of {result.layer}', temporary)
    count = sum(len(panels) for _, _, panels in rows)
    print(f'{count} maps of {len(rows)} images: {args.out}')


if __name__ == '__main__':
    run(main)
