"""Benchmark VVT against its reference implementation and other backbones.

The reference implementation (vvt-*-plain) computes attention as the official
code does: with features of four times the head dimension, clamps as separate
operations, and cosine and sine tables recomputed in each block. The runs of
all models are interleaved in one process, so that changes in the speed of the
machine affect all models equally. The outputs of VVT are compared with those
of the reference implementation before timing.

With --engines onnxruntime openvino, each model is also exported as a backbone
with dynamic image sizes and timed in these engines, with the number of
threads of PyTorch. The outputs of the engines are compared with those of
PyTorch at each size before timing.
"""

import argparse
import tempfile
import time
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
from mmvvt.analysis.engines import (
    ENGINES,
    FILES,
    check_engine,
    check_engines,
    export,
    open_engine,
    peak_memory_of_file,
)
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.ops.native import load

STEPS = dict(forward=forward, train_step=train_step)
# Relative error of float32 feature maps after up to 48 blocks.
TOLERANCE = 1e-3
# Seconds between runs if engines share the processor. After a run, a thread
# of ONNX Runtime waits for work for about 50 ms without sleeping.
PAUSE = 0.1


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
        '--engines',
        nargs='+',
        default=['pytorch'],
        choices=ENGINES,
        help='engines to time each model in; compiled is torch.compile, '
        'onnxruntime and openvino require --modes forward (default: pytorch)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='the same as adding compiled to --engines',
    )
    parser.add_argument(
        '--memory',
        action='store_true',
        help='also measure peak memory, in a separate process per model and '
        'engine, except compiled',
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
                model,
                build(f'{name.removesuffix("-triton")}-plain').eval(),
                image,
                TOLERANCE,
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
        peak = 'N/A' if row.peak_gib is None else f'{row.peak_gib:.2f}'
        ratio = row.seconds / rows[0].seconds
        print(
            f'{row.label:28} {speed:>24} {ratio:7.2f}x {peak:>9}',
            flush=True,
        )


def device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def export_all(args, models, sizes, folder):
    """Export the models, and compare the engines with PyTorch.

    Returns:
        dict: Path of the file, and function from a tensor to a tuple of
        tensors, by engine and name. Models that cannot be exported are left
        out.
    """
    opened = {}
    for engine in args.engines:
        if engine not in FILES:
            continue
        for name, model in zip(args.models, models):
            start = time.perf_counter()
            try:
                path = export(model, engine, folder)
            except UserError:
                raise
            except Exception as error:  # an exporter may raise anything
                reason = type(error).__name__
                print(
                    f'{name}: skipped with {engine}, the export raised '
                    f'{reason}',
                    flush=True,
                )
                continue
            seconds = time.perf_counter() - start
            print(f'{name}: exported for {engine} in {seconds:.1f} s')
            for dtype in dict.fromkeys(('float32', args.dtype)):
                runner = open_engine(path, engine, dtype)
                for batch, side in sizes:
                    image = torch.randn(batch, 3, side, side)
                    error = check_engine(
                        name, engine, model, runner, image, dtype
                    )
                    print(
                        f'{name} in {engine} and PyTorch differ by '
                        f'{error:.1e} at {side} pixels in {dtype}',
                        flush=True,
                    )
            opened[engine, name] = path, runner
    return opened


def sides_of(args, models, opened, image, mode):
    """List the engine, the name and a function for each side to time.

    Models for which compilation fails are left out.
    """
    sides = []
    for engine in args.engines:
        for name, model in zip(args.models, models):
            if engine in FILES:
                if (engine, name) in opened:
                    _, runner = opened[engine, name]
                    sides.append((engine, name, partial(runner, image)))
                continue
            if engine == 'compiled':
                model = torch.compile(model)
            step = partial(STEPS[mode], model, image, args.dtype)
            if engine == 'compiled':
                try:
                    step()
                except Exception as error:  # a compiler may raise anything
                    reason = type(error).__name__
                    print(
                        f'{name}: skipped with torch.compile, it raised '
                        f'{reason}'
                    )
                    continue
            sides.append((engine, name, step))
    return sides


def measure_memory(args, opened, engine, name, batch, side, mode):
    """Return the peak memory in GiB, None if it is not measured."""
    if not args.memory or engine == 'compiled':
        return None
    if engine in FILES:
        path, _ = opened[engine, name]
        return peak_memory_of_file(path, engine, args.dtype, batch, side)
    return peak_memory(name, batch, side, mode, args.dtype)


def measure(args, models, opened, batch, side, mode):
    """Time all models and engines with interleaved runs."""
    image = torch.randn(batch, 3, side, side).to(device())
    sides = sides_of(args, models, opened, image, mode)
    timings = alternate(
        [step for _, _, step in sides],
        args.runs,
        pause=PAUSE if opened else 0.0,
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
            measure_memory(args, opened, engine, name, batch, side, mode),
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


def benchmark(args, models, opened, sizes):
    """Measure, print and write one group per size and mode."""
    rows = []
    for batch, side in sizes:
        for mode in args.modes:
            if args.profile:
                print_profile(args, models, batch, side, mode)
                continue
            group = measure(args, models, opened, batch, side, mode)
            print_group(group, batch, side, mode)
            rows += group
            if args.csv:  # after each group: a benchmark takes hours
                write_csv(args.csv, rows)


def main():
    # The processes that measure memory import this file, and should use only
    # the memory that a model needs.
    from mmvvt.apis import keep_freed_memory

    args = parse_args()
    if args.runs < 1:
        raise UserError(f'--runs must be 1 or more, got {args.runs}')
    if args.profile and torch.cuda.is_available():
        raise UserError(
            '--profile requires a machine without a GPU: hide the GPU with '
            'CUDA_VISIBLE_DEVICES='
        )
    if args.compile:
        args.engines = [*args.engines, 'compiled']
    args.engines = list(dict.fromkeys(args.engines))
    if args.profile and args.engines != ['pytorch']:
        raise UserError(
            f'--profile allows --engines pytorch, got {" ".join(args.engines)}'
        )
    check_engines(args.engines, args.models, args.modes, args.dtype)
    keep_freed_memory()
    sizes = [parse_size(text) for text in args.sizes]
    models = [build(name) for name in args.models]
    print(machine_line())
    if not torch.cuda.is_available():
        reason = load()[1]
        print(
            'strips use '
            + (f'PyTorch operations: {reason}' if reason else 'the kernels')
        )
    if not args.profile:
        print(
            f'{args.dtype}, {args.runs} interleaved runs per model; images '
            'per second: median (20th to 80th percentile); time: relative to '
            f'the first row, {args.models[0]} in {args.engines[0]}'
        )
    check(models, args.models, torch.randn(1, 3, 224, 224).to(device()))
    with tempfile.TemporaryDirectory() as folder:
        opened = export_all(args, models, sizes, folder)
        benchmark(args, models, opened, sizes)


if __name__ == '__main__':
    run(main)
