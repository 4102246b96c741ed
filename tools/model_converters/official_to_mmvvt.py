"""Convert an official VVT checkpoint to the format of mmvvt, or back."""

import argparse
import os

from mmvvt.arch import ARCH_SETTINGS
from mmvvt.checkpoint import (
    convert_official,
    convert_to_official,
    load_checkpoint_file,
    save_checkpoint_file,
)
from mmvvt.cli import run
from mmvvt.errors import UserError


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='checkpoint to read')
    parser.add_argument('dst', help='checkpoint to write')
    parser.add_argument(
        '--arch',
        choices=list(ARCH_SETTINGS),
        help='expected architecture of SRC (default: determined from the '
        'shapes of its tensors)',
    )
    parser.add_argument(
        '--reverse',
        action='store_true',
        help='convert from the format of mmvvt to the official format',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if os.path.realpath(args.src) == os.path.realpath(args.dst):
        raise UserError(f'SRC and DST are the same file: {args.src}')
    convert = convert_to_official if args.reverse else convert_official
    checkpoint = convert(load_checkpoint_file(args.src), args.arch)
    save_checkpoint_file(checkpoint, args.dst)

    if args.reverse:
        print(
            f'wrote {args.dst} with {len(checkpoint["model"])} tensors '
            'with official keys'
        )
        return
    state, name = checkpoint['state_dict'], checkpoint['meta']['arch']
    parameters = sum(t.numel() for t in state.values())
    classes = state['head.fc.bias'].numel()
    print(f'architecture: {name}, {parameters} parameters, {classes} classes')
    print(f'wrote {args.dst}')
    if classes == 1000:
        print(
            f'to test it: python -m mmvvt test vvt-{name}_8xb128_in1k '
            f'{args.dst}'
        )


if __name__ == '__main__':
    run(main)
