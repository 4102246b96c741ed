"""Draw where pixels of an image attend to, with and without the locality.

For each query pixel and block, the picture shows the vicinity weight, the
attention without it, the attention of the model, and with --heads the
attention of each head. The image is transformed by the test pipeline of the
config, and the picture shows the result.
"""

import argparse

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import (
    Predictor,
    attention_maps,
    choose_device,
    keep_freed_memory,
)
from mmvvt.cli import add_cfg_options, run
from mmvvt.errors import UserError
from mmvvt.fileio import atomic_write, check_writable
from mmvvt.preflight import read_config
from mmvvt.visualization import draw_attention


def parse_point(text):
    try:
        x, y = (float(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'expected X,Y with two numbers from 0 to 1, got {text!r}'
        ) from None
    return x, y


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('image', help='image file')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', help='PNG file to write')
    parser.add_argument(
        '--blocks',
        nargs='+',
        default=['block3.0'],
        metavar='NAME',
        help='blocks of the backbone (default: block3.0)',
    )
    parser.add_argument(
        '--points',
        nargs='+',
        type=parse_point,
        default=[(0.5, 0.5)],
        metavar='X,Y',
        help='query pixels, as fractions of width and height from the upper '
        'left corner (default: 0.5,0.5)',
    )
    parser.add_argument(
        '--heads',
        action='store_true',
        help='draw each head, in addition to the mean over the heads',
    )
    parser.add_argument(
        '--device',
        help='such as cpu or cuda:1 (default: cuda if available, else cpu)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def draw_row(name, point, found, heads):
    """Return the label, the point and the panels of a row of the picture."""
    panels = [
        ('vicinity weight', found.vicinity),
        ('without it, mean', found.similarity.mean(dim=0)),
        ('attention, mean', found.attention.mean(dim=0)),
    ]
    if heads:
        panels += [
            (f'attention, head {i}', head)
            for i, head in enumerate(found.attention)
        ]
    height, width = found.vicinity.shape
    label = f'{name}, {height} x {width} tokens'
    return label, point, [(text, t.cpu().numpy()) for text, t in panels]


def main():
    args = parse_args()
    if not args.out.endswith('.png'):
        raise UserError(f'OUT must end with .png, got {args.out}')
    check_writable(args.out)
    keep_freed_memory()
    predictor = Predictor(
        read_config(args.config, args.cfg_options),
        args.checkpoint,
        choose_device(args.device),
    )
    image, maps = attention_maps(
        predictor, args.image, args.blocks, args.points
    )
    if args.heads and len({len(maps[0][b].attention) for b in maps[0]}) > 1:
        raise UserError(
            '--heads needs blocks with the same number of heads, got '
            f'{", ".join(args.blocks)}'
        )
    rows = [
        draw_row(name, point, found[name], args.heads)
        for point, found in zip(args.points, maps)
        for name in args.blocks
    ]
    with atomic_write(args.out) as temporary:
        draw_attention(image, rows, args.image, temporary)
    print(f'{len(rows)} queries and blocks: {args.out}')


if __name__ == '__main__':
    run(main)
