"""Compile the Triton kernels, and print their resources and bytes as tables.

A GPU is not needed. There is one row per launch of a forward and a backward
pass, with the sizes of a VVT-small (batch size 64, 224 pixels). width:
channels per head of the attention, or channels of the convolution; registers:
of a thread; spills: bytes of a thread's stack; shared: KiB of shared memory
of a program; least: bytes per token of the tensors of the launch, each once;
requested: bytes per token of all loads and stores.
"""

import argparse

import torch

from mmvvt.analysis.kernels import (
    ARCHITECTURES,
    CHANNELS,
    DTYPES,
    HEAD_DIMS,
    kernel_rows,
    kernel_table,
)
from mmvvt.cli import run
from mmvvt.fileio import atomic_write
from mmvvt.ops.dispatch import HAS_TRITON


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--archs',
        nargs='+',
        default=list(ARCHITECTURES),
        metavar='ARCH',
        help=f'GPU architectures, from {", ".join(ARCHITECTURES)} (default: '
        'all)',
    )
    parser.add_argument(
        '--dtypes',
        nargs='+',
        default=list(DTYPES),
        choices=DTYPES,
        help='dtypes of the tokens (default: all)',
    )
    parser.add_argument(
        '--head-dims',
        type=int,
        nargs='*',
        default=HEAD_DIMS,
        help='channels per head of the attention (default: '
        f'{" ".join(map(str, HEAD_DIMS))})',
    )
    parser.add_argument(
        '--channels',
        type=int,
        nargs='*',
        default=CHANNELS,
        help='channels of the convolution (default: '
        f'{" ".join(map(str, CHANNELS))})',
    )
    parser.add_argument('--out', help='also write the tables to this file')
    return parser.parse_args()


def versions():
    """Versions that determine the compiled code."""
    if not HAS_TRITON:
        return f'torch {torch.__version__}'  # kernel_rows says what is missing
    import triton

    return f'torch {torch.__version__}, Triton {triton.__version__}'


def main():
    args = parse_args()
    text = f'{versions()}\n'
    print(text)
    spilling = 0
    for dtype in dict.fromkeys(args.dtypes):
        rows = kernel_rows(args.archs, dtype, args.head_dims, args.channels)
        for operation in ('attention', 'convolution'):
            part = [row for row in rows if row.operation == operation]
            if not part:
                continue
            table = f'\n### {operation}, {dtype}\n\n{kernel_table(part)}'
            print(table, flush=True)
            text += table
        spilling += sum(
            found.spills > 0
            for row in rows
            for found, _, _ in row.used.values()
        )
    print(f'{spilling} compiled kernels spill registers')
    if args.out:
        with atomic_write(args.out) as path:
            with open(path, 'w', encoding='utf-8') as file:
                file.write(text)


if __name__ == '__main__':
    run(main)
