"""Time VVT against the plain formula and against other backbones.

The plain formula (vvt-*-plain) is the official code's way: features four
times as wide, the clamps as separate passes, angle tables built in each block
and step. All models run in this process, in turn, run by run, so that the
machine's drift hits all alike; a VVT only after its outputs have been
compared with the plain formula's.
"""

import argparse
from functools import partial

import torch

from mmvvt.analysis.benchmark import (
    DTYPES,
    MODES,
    NAMES,
    VVTS,
    Row,
    alternate,
    build,
    check_finite,
    check_same,
    forward,
    machine_line,
    parse_size,
    peak_memory,
    profile,
    train_step,
    write_csv,
)
from mmvvt.cli import run
from mmvvt.errors import UserError

STEPS = dict(forward=forward, train_step=train_step)
# Of feature maps, up to 36 blocks deep, in float32.
TOLERANCE = 1e-3


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=['vvt-small', 'vvt-small-plain'],
        metavar='MODEL',
        help=f'of {", ".join(NAMES)} (default: vvt-small vvt-small-plain)',
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        default=['4x224', '1x1024'],
        metavar='BATCHxSIDE',
        help='(default: 4x224 1x1024)',
    )
    parser.add_argument(
        '--modes',
        nargs='+',
        default=MODES,
        choices=MODES,
        help='(default: both)',
    )
    parser.add_argument(
        '--dtype',
        default='float32',
        choices=DTYPES,
        help='a half type stands for autocast (default: float32)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='time each model through torch.compile, too',
    )
    parser.add_argument(
        '--memory',
        action='store_true',
        help='measure the peak memory too, each in a process of its own',
    )
    parser.add_argument(
        '--profile',
        action='store_true',
        help='in place of times, print what each model spends them on (CPU)',
    )
    parser.add_argument(
        '--runs', type=int, default=5, help='counted runs (default: 5)'
    )
    parser.add_argument('--csv', help='file to write the table to')
    return parser.parse_args()


def check(models, names, image):
    """Outputs before times: a VVT's against the plain formula's."""
    for name, model in zip(names, models):
        model.eval()
        check_finite(model, image)
        if name in VVTS and not name.endswith('-plain'):
            error = check_same(
                model, build(f'{name}-plain').eval(), image, TOLERANCE
            )
            print(
                f'{name} and the plain formula differ by {error:.1e} '
                f'at {image.shape[-1]} pixels'
            )


def print_group(rows, batch, side, mode):
    print(f'\n{batch} x {side}, {mode.replace("_", " ")}')
    print(f'{"":28} {"images per second":>24} {"time":>8} {"peak GiB":>9}')
    for row in rows:
        speed = (
            f'{batch / row.seconds:.2f} ({batch / row.seconds_p80:.2f} '
            f'to {batch / row.seconds_p20:.2f})'
        )
        label = row.model + (' compiled' if row.engine == 'compiled' else '')
        peak = 'N/A' if row.peak_gib is None else f'{row.peak_gib:.2f}'
        print(
            f'{label:28} {speed:>24} {row.seconds / rows[0].seconds:7.2f}x '
            f'{peak:>9}',
            flush=True,
        )


def compiled_sides(args, models, image, mode):
    """What torch.compile makes of the models, without those it cannot take."""
    sides = []
    for name, model in zip(args.models, models):
        compiled = torch.compile(model)
        try:
            STEPS[mode](compiled, image, args.dtype)
        except Exception as error:  # whatever a compiler may raise
            reason = type(error).__name__
            print(f'{name} is left out compiled: {reason} in torch.compile')
            continue
        sides.append(('compiled', name, compiled))
    return sides


def measure(args, models, batch, side, mode):
    """A row for each model and engine, timed in alternation."""
    image = torch.randn(batch, 3, side, side)
    if torch.cuda.is_available():
        image = image.cuda()
    sides = [
        ('eager', name, model) for name, model in zip(args.models, models)
    ]
    if args.compile:
        sides += compiled_sides(args, models, image, mode)
    timings = alternate(
        [
            partial(STEPS[mode], model, image, args.dtype)
            for _, _, model in sides
        ],
        args.runs,
    )
    return [
        Row(
            name,
            mode,
            engine,
            args.dtype,
            batch,
            side,
            args.runs,
            t.median,
            t.low,
            t.high,
            peak_memory(name, batch, side, mode, args.dtype)
            if args.memory and engine == 'eager'
            else None,
            machine_line(),
        )
        for (engine, name, _), t in zip(sides, timings)
    ]


def print_profile(args, models, batch, side, mode):
    """Milliseconds of a pass by kind of operation, a column a model."""
    image = torch.randn(batch, 3, side, side)
    columns = [
        profile(partial(STEPS[mode], model, image, args.dtype))
        for model in models
    ]
    print(f'\n{batch} x {side}, {mode.replace("_", " ")}, milliseconds')
    print(f'{"":16}' + ''.join(f'{name:>18}' for name in args.models))
    for kind in columns[0]:
        print(
            f'{kind:16}' + ''.join(f'{1e3 * c[kind]:18.0f}' for c in columns)
        )
    print(
        f'{"sum":16}'
        + ''.join(f'{1e3 * sum(c.values()):18.0f}' for c in columns),
        flush=True,
    )


def main():
    args = parse_args()
    if args.runs < 1:
        raise UserError(f'--runs must be 1 or more, got {args.runs}')
    if args.profile and torch.cuda.is_available():
        raise UserError(
            '--profile is for a machine without a GPU: hide it with '
            'CUDA_VISIBLE_DEVICES='
        )
    sizes = [parse_size(text) for text in args.sizes]
    models = [build(name) for name in args.models]
    print(machine_line())
    if not args.profile:
        print(
            f'{args.dtype}, {args.runs} runs a side in alternation; images '
            'per second: median (20th to 80th percentile); time: over that '
            f'of {args.models[0]}'
        )
    check(
        models,
        args.models,
        torch.randn(1, 3, 224, 224).to(
            'cuda' if torch.cuda.is_available() else 'cpu'
        ),
    )

    rows = []
    for batch, side in sizes:
        for mode in args.modes:
            if args.profile:
                print_profile(args, models, batch, side, mode)
                continue
            group = measure(args, models, batch, side, mode)
            print_group(group, batch, side, mode)
            rows += group
            if args.csv:  # after each, as a run takes hours
                write_csv(args.csv, rows)


if __name__ == '__main__':
    run(main)
