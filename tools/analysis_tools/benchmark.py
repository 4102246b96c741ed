"""Images per second of a VVT against the plain formula, with the same weights.

The plain side takes attention as the official code has it: features four
times as wide, the clamps as separate passes, angle tables built in each block
and step. Both sides run in this process, in alternation, after their outputs
have been compared.
"""

import argparse
from functools import partial

import torch

from mmvvt.analysis.benchmark import (alternate, check_same, forward,
                                      machine_line, parse_size, train_step)
from mmvvt.arch import ARCH_SETTINGS
from mmvvt.engine.cli import fail
from mmvvt.models import VVT


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='small', choices=ARCH_SETTINGS)
    parser.add_argument(
        '--sizes',
        nargs='+',
        default=['4x224', '1x1024'],
        metavar='BATCHxSIDE',
        help='(default: 4x224 1x1024)')
    parser.add_argument(
        '--runs', type=int, default=5, help='counted runs (default: 5)')
    return parser.parse_args()


def build(arch: str, backend: str) -> VVT:
    torch.manual_seed(0)
    model = VVT(arch, out_indices=(0, 1, 2, 3), attn_cfg=dict(backend=backend))
    model.init_weights()
    return model.cuda() if torch.cuda.is_available() else model


def main():
    args = parse_args()
    try:
        sizes = [parse_size(text) for text in args.sizes]
    except ValueError as error:
        fail(str(error))
    models = [build(args.arch, 'auto'), build(args.arch, 'reference')]
    device = next(models[0].parameters()).device

    print(machine_line())
    print(f'VVT-{args.arch}, float32, {args.runs} runs a side in alternation; '
          'images per second: median (20th to 80th percentile)')
    print(f'{"size":>8} {"":12} {"ours":>22} {"plain formula":>22} '
          f'{"ratio":>6} {"error":>8}')
    for batch, side in sizes:
        image = torch.randn(batch, 3, side, side, device=device)
        # Feature maps of 3 to 36 blocks of depth, in float32.
        error = check_same(*[m.eval() for m in models], image, 1e-3)
        for name, step in (('forward', forward), ('train step', train_step)):
            timings = alternate(
                [partial(step, model, image) for model in models], args.runs)
            cells = [
                f'{batch / t.median:.2f} ({batch / t.high:.2f} to '
                f'{batch / t.low:.2f})' for t in timings
            ]
            ratio = timings[1].median / timings[0].median
            print(
                f'{f"{batch} x {side}":>8} {name:12} {cells[0]:>22} '
                f'{cells[1]:>22} {ratio:6.2f} {error:8.1e}',
                flush=True)


if __name__ == '__main__':
    main()
