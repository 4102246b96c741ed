"""Check everything that needs a GPU, with one command.

environment: the GPU, the versions, and what is missing.
kernels: the errors of each Triton kernel against float64 in all dtypes,
outputs and gradients. Without a GPU, small grids in Triton's interpreter.
ops: the time of each operation, beside the time that reading and writing its
tensors once takes at the bandwidth of a copy.
models: VVT with the kernels, without them, and as the plain formula, beside
other backbones: time and peak memory, eager and compiled, measured by
benchmark.py.

Writes errors.csv, ops.csv, models.csv and models.png to the output folder. The
exit code is 1 if an error of a kernel is too large or a section fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mmvvt.analysis.benchmark import (
    DTYPES,
    NAMES,
    PEERS,
    parse_size,
    read_csv,
    write_csv,
)
from mmvvt.analysis.engines import ENGINES, FILES
from mmvvt.analysis.gpu import (
    can_run_kernels,
    copy_bandwidth,
    environment,
    missing,
    op_times,
)
from mmvvt.analysis.kernel_errors import interpreted_errors, kernel_errors
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.ops.dispatch import HAS_TRITON

SECTIONS = ('environment', 'kernels', 'ops', 'models')
MODELS = ('vvt-small-triton', 'vvt-small', 'vvt-small-plain', *PEERS)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out-dir',
        default='work_dirs/check_gpu',
        help='folder for the results (default: work_dirs/check_gpu)',
    )
    parser.add_argument(
        '--sections',
        nargs='+',
        choices=SECTIONS,
        help='sections to run (default: all with a GPU, environment and '
        'kernels without one)',
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=MODELS,
        metavar='MODEL',
        help=f'models to time (default: {" ".join(MODELS)})',
    )
    parser.add_argument(
        '--forward-sizes',
        nargs='*',
        default=['128x224', '4x1024'],
        metavar='BATCHxSIDE',
        help='sizes of the forward pass (default: 128x224 4x1024)',
    )
    parser.add_argument(
        '--train-sizes',
        nargs='*',
        default=['64x224'],
        metavar='BATCHxSIDE',
        help='sizes of the training step (default: 64x224)',
    )
    parser.add_argument(
        '--engines',
        nargs='+',
        default=['pytorch', 'compiled'],
        choices=[name for name in ENGINES if name not in FILES],
        help='pytorch is eager mode (default: pytorch compiled)',
    )
    parser.add_argument(
        '--dtype',
        default='bfloat16',
        choices=DTYPES,
        help='dtype of the times (default: bfloat16)',
    )
    parser.add_argument(
        '--op-batch',
        type=int,
        default=128,
        help='batch size of the operations, at 224 pixels (default: 128)',
    )
    parser.add_argument(
        '--runs',
        type=int,
        default=10,
        help='number of timed runs (default: 10)',
    )
    return parser.parse_args()


def check_args(args):
    for name in args.models:
        if name not in NAMES:
            raise UserError(
                f'--models allows {", ".join(NAMES)}, got {name!r}'
            )
    for size in (*args.forward_sizes, *args.train_sizes):
        parse_size(size)
    for name in ('runs', 'op_batch'):
        if getattr(args, name) < 1:
            raise UserError(
                f'--{name.replace("_", "-")} must be 1 or more, got '
                f'{getattr(args, name)}'
            )
    try:
        os.makedirs(args.out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'cannot create the folder {args.out_dir}: {error.strerror}'
        ) from error


def device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def print_environment(args):
    for name, value in environment().items():
        print(f'{name:20} {value}')
    return []


def check_kernels(args):
    """Print the errors, and return those that are too large as text."""
    if not HAS_TRITON:
        print('skipped: Triton is not installed')
        return []
    if can_run_kernels():
        place, errors = 'on the GPU', kernel_errors('cuda')
    else:
        place, errors = "in Triton's interpreter", interpreted_errors()
    write_csv(os.path.join(args.out_dir, 'errors.csv'), errors)
    groups = {}
    for e in errors:
        groups.setdefault((e.kernel, e.dtype, e.tensor), []).append(e)
    print(
        f'{len(errors)} comparisons {place}; the case that is closest to '
        'what is allowed:'
    )
    for (kernel, dtype, tensor), group in groups.items():
        # NaN counts as the largest error.
        worst = max(
            group, key=lambda e: (e.error != e.error, e.error / e.allowed)
        )
        print(
            f'{kernel:12} {dtype:9} {tensor:8} {worst.error:.1e}, allowed '
            f'{worst.allowed:.1e}: {worst.case}'
        )
    return [
        f'{e.kernel} in {e.dtype}, {e.tensor}: error {e.error:.1e}, allowed '
        f'is {e.allowed:.1e} ({e.case})'
        for e in errors
        if not e.passed
    ]


def time_ops(args):
    size = 1 << 30 if device() == 'cuda' else 1 << 24
    bandwidth = copy_bandwidth(device(), size)
    print(f'bandwidth of a copy: {bandwidth / 1e9:.0f} GB/s')
    backends = ('triton',) if can_run_kernels() else ()
    rows = op_times(
        device(),
        bandwidth,
        batch=args.op_batch,
        dtype=args.dtype,
        backends=(*backends, 'torch', 'reference'),
        runs=args.runs,
    )
    write_csv(os.path.join(args.out_dir, 'ops.csv'), rows)
    print(
        f'{"operation":12} {"input":20} {"mode":10} {"backend":10} '
        f'{"us":>9} {"least us":>9} {"ratio":>6}'
    )
    for row in rows:
        print(
            f'{row.operation:12} {row.shape:20} {row.mode:10} '
            f'{row.backend:10} {1e6 * row.seconds:9.1f} '
            f'{1e6 * row.least_seconds:9.1f} '
            f'{row.seconds / row.least_seconds:6.1f}'
        )
    return []


def time_models(args):
    """Run benchmark.py for each size, and return its failures as text."""
    names = environment()
    models = [
        name
        for name in args.models
        if name not in PEERS
        or names[PEERS[name]['type'].split('.')[0]] != 'missing'
    ]
    rows, problems = [], []
    groups = [('forward', size) for size in args.forward_sizes]
    groups += [('train_step', size) for size in args.train_sizes]
    for mode, size in groups:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'rows.csv')
            # One process for each group: it starts with empty memory, and
            # torch.compile with an empty cache.
            done = subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).with_name('benchmark.py')),
                    '--models',
                    *models,
                    '--sizes',
                    size,
                    '--modes',
                    mode,
                    '--dtype',
                    args.dtype,
                    '--engines',
                    *args.engines,
                    '--memory',
                    '--runs',
                    str(args.runs),
                    '--csv',
                    path,
                ]
            )
            if done.returncode:
                problems.append(
                    f'benchmark.py failed for {mode} at {size}, see above'
                )
            else:
                rows += read_csv(path)
    if rows:
        # matplotlib is slow to import
        from mmvvt.visualization.benchmark import plot_benchmark

        write_csv(os.path.join(args.out_dir, 'models.csv'), rows)
        plot_benchmark(rows, os.path.join(args.out_dir, 'models.png'))
    return problems


RUN = dict(
    environment=print_environment,
    kernels=check_kernels,
    ops=time_ops,
    models=time_models,
)


def main():
    args = parse_args()
    check_args(args)
    sections = args.sections or (
        SECTIONS if torch.cuda.is_available() else SECTIONS[:2]
    )
    problems = []
    for name in SECTIONS:
        if name not in sections:
            continue
        print(f'\n== {name} ==', flush=True)
        try:
            problems += RUN[name](args)
        except UserError as error:
            problems.append(f'{name}: {error}')
        except (RuntimeError, AssertionError) as error:
            # The next section may still work, such as after running out of
            # memory.
            problems.append(
                f'{name} raised {type(error).__name__}: '
                f'{UserError(str(error))}'
            )
    left = [name for name in SECTIONS if name not in sections]
    print('\n== summary ==')
    for reason in missing():
        print(f'missing: {reason}')
    if left:
        print(f'not run: {", ".join(left)}')
    for problem in problems:
        print(f'FAILED: {problem}')
    print(f'results are in {args.out_dir}', flush=True)
    if problems:
        raise UserError(f'{len(problems)} checks failed, see FAILED above')


if __name__ == '__main__':
    run(main)
