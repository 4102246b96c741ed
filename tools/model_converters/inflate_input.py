"""Convert a checkpoint of an RGB model to another number of channels.

The result initializes a backbone with in_channels=N. With one or two
channels, each gets the sum of the kernels of red, green and blue, divided by
the number of channels. With more, the kernels of red, green and blue are kept.
"""

import argparse
import os

from mmvvt.checkpoint import (
    inflate_input,
    load_checkpoint_file,
    save_checkpoint_file,
)
from mmvvt.cli import run
from mmvvt.errors import UserError


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', help='converted checkpoint of an RGB model')
    parser.add_argument('dst', help='checkpoint to write')
    parser.add_argument(
        '--in-channels',
        type=int,
        required=True,
        metavar='N',
        help='number of channels of the new images',
    )
    parser.add_argument(
        '--rgb',
        type=int,
        nargs=3,
        default=(0, 1, 2),
        metavar=('R', 'G', 'B'),
        help='which of the new channels are red, green and blue, counted from '
        '0 (default: 0 1 2; images that OpenCV loads with four channels: '
        '2 1 0)',
    )
    parser.add_argument(
        '--extra',
        choices=['zeros', 'mean'],
        default='zeros',
        help='kernels of the other channels: zeros, which leave the output '
        'unchanged until they are trained, or the mean of the three, with '
        'all kernels multiplied by 3/N (default: zeros)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if os.path.realpath(args.src) == os.path.realpath(args.dst):
        raise UserError(f'SRC and DST are the same file: {args.src}')
    checkpoint = inflate_input(
        load_checkpoint_file(args.src), args.in_channels, args.rgb, args.extra
    )
    save_checkpoint_file(checkpoint, args.dst)
    print(f'wrote {args.dst} for in_channels={args.in_channels}')


if __name__ == '__main__':
    run(main)
