"""Benchmark VVT against its reference implementation and other backbones.

The reference implementation (vvt-*-plain) computes attention as the official
code does: with features of four times the head dimension, clamps as separate
operations, and cosine and sine tables recomputed in each block. The runs of
all models are interleaved in one process, so that changes in the speed of the
machine affect all models equally. The outputs of VVT are compared with those
of the reference implementation before timing.
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
from mmvvt.apis import keep_freed_memory
from mmvvt.cli import run
from mmvvt.errors import UserError

STEPS = dict(forward=forward, train_step=train_step)
# Relative error of float32 feature maps after up to 36 blocks.
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
        help=f'models to time, from {", ".join(NAMES)} (default: vvt-small '
        'vvt-small-plain)',
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        default=['4x224', '1x1024'],
        metavar='BATCHxSIDE',
        help='batch sizes and image sizes (default: 4x224 1x1024)',
    )
    parser.add_argument(
        '--modes',
        nargs='+',
        default=MODES,
        choices=MODES,
        help='modes to time (default: both)',
    )
    parser.add_argument(
        '--dtype',
        default='float32',
        choices=DTYPES,
        help='bfloat16 and float16 use autocast (default: float32)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='also time each model with torch.compile',
    )
    parser.add_argument(
        '--memory',
        action='store_true',
        help='also measure peak memory, in a separate process per model',
    )
    parser.add_argument(
        '--profile',
        action='store_true',
        help='print the time by kind of operation instead (CPU only)',
    )
    parser.add_argument(
        '--runs', type=int, default=5, help='number of timed runs (default: 5)'
    )
    parser.add_argument('--csv', help='CSV file to write the results to')
    return parser.parse_args()


def check(models, names, image):
    """Check outputs, and compare VVT with its reference implementation."""
    for name, model in zip(names, models):
        model.eval()
        check_finite(model, image)
        if name in VVTS and not name.endswith('-plain'):
            error = check_same(
                model, build(f'{name}-plain').eval(), image, TOLERANCE
            )
            print(
                f'{name} and the reference implementation differ by '
                f'{error:.1e} at {image.shape[-1]} pixels'
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
    """Compile the models and skip those for which compilation fails."""
    sides = []
    for name, model in zip(args.models, models):
        compiled = torch.compile(model)
        try:
            STEPS[mode](compiled, image, args.dtype)
        except Exception as error:  # a compiler may raise anything
            reason = type(error).__name__
            print(f'{name}: skipped with torch.compile, it raised {reason}')
            continue
        sides.append(('compiled', name, compiled))
    return sides


def measure(args, models, batch, side, mode):
    """Time all models and engines with interleaved runs."""
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
    """Print milliseconds by kind of operation, one column per model."""
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
            '--profile requires a machine without a GPU: hide the GPU with '
            'CUDA_VISIBLE_DEVICES='
        )
    keep_freed_memory()
    sizes = [parse_size(text) for text in args.sizes]
    models = [build(name) for name in args.models]
    print(machine_line())
    if not args.profile:
        print(
            f'{args.dtype}, {args.runs} interleaved runs per model; images '
            'per second: median (20th to 80th percentile); time: relative to '
            f'{args.models[0]}'
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
            if args.csv:  # after each group: a benchmark takes hours
                write_csv(args.csv, rows)


if __name__ == '__main__':
    run(main)
