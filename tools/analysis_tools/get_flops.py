"""Count the parameters and multiply-adds of models, or sweep image sizes.

With config files, the parameters and multiply-adds of their models are
counted for one image size.

With --sweep MIN MAX, the multiply-adds, activations, peak memory and latency
of VVT-small and of other backbones are measured at sides from MIN to MAX,
with a factor of the square root of 2 between them, rounded to multiples of
32. Each model and size runs in its own process with a memory limit. A model
that needs more memory is listed as out of memory. The processes of one size
run in turn. The growth exponent of a quantity is the slope of a least-squares
fit of its logarithm against that of the number of pixels, over the larger
half of the sizes at which it was measured. With --out, rows that exist in the
file are kept, so that a sweep that was interrupted can be resumed.
"""

import argparse
import os

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.analysis.benchmark import NAMES, machine_line, write_csv
from mmvvt.analysis.complexity import count
from mmvvt.analysis.sweep import MODELS as SWEEP_MODELS
from mmvvt.analysis.sweep import (
    OUT_OF_MEMORY,
    QUANTITIES,
    fit_growth,
    growth_path,
    merge,
    read_known,
    sweep,
    sweep_sides,
)
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.fileio import check_writable
from mmvvt.preflight import build_model, read_config
from mmvvt.visualization.sweep import check_picture, plot_sweep

# Arguments that require --sweep
SWEEP_ARGUMENTS = ('models', 'runs', 'memory_limit', 'out', 'plot')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='*', help='config files')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='SIZE',
        help='height and width of the image, or one number for both '
        '(default: 224)',
    )
    group = parser.add_argument_group('sweep')
    group.add_argument(
        '--sweep',
        type=int,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='smallest and largest side of the image, multiples of 32',
    )
    group.add_argument(
        '--models',
        nargs='+',
        metavar='MODEL',
        help=f'models, from {", ".join(NAMES)} (default: '
        f'{" ".join(SWEEP_MODELS)})',
    )
    group.add_argument(
        '--runs',
        type=int,
        help='timed runs for each model and size (default: 5)',
    )
    group.add_argument(
        '--memory-limit',
        type=float,
        metavar='GIB',
        help='memory limit of a process (default: 90 %% of the available '
        'memory, without 1.5 GiB for each process that waits). Rows out of '
        'memory are measured again with a higher limit',
    )
    group.add_argument(
        '--out',
        metavar='CSV',
        help='file to write after each size, and to resume from; the '
        'exponents are written to a file next to it, which ends with '
        '_exponents.csv',
    )
    group.add_argument(
        '--plot', metavar='PICTURE', help='PNG or SVG file to write'
    )
    args = parser.parse_args()
    if not args.configs and args.sweep is None:
        parser.error('config files or --sweep are required')
    return args


def count_configs(args):
    """Print the parameters and multiply-adds of the models of configs."""
    shape = args.shape or [224]
    if len(shape) > 2 or min(shape) < 1:
        raise UserError(
            f'--shape takes one or two positive numbers, got {shape}'
        )
    height, width = shape[0], shape[-1]
    print(
        f'Multiply-adds of matrix products and convolutions for one image of '
        f'{height} x {width}.\nVVT is counted with the reference '
        'implementation (features four times as wide).\nNot counted: '
        'normalization, activations, resizing, the sampling in RoIAlign and '
        '\ndeformable attention, and the auxiliary head of a segmentor (its '
        'parameters are\nincluded). Two-stage detectors: 1000 proposals, '
        'and 100 for the mask heads.'
    )
    print(f'{"config":60} {"params":>12} {"M":>8} {"GMACs":>8}')
    for path in args.configs:
        cfg = read_config(path)
        model = build_model(cfg)
        backbone = cfg.model.backbone
        # TupleOutputs has the backbone in it.
        channels = backbone.get('backbone', backbone).get('in_channels', 3)
        found = count(model, (1, channels, height, width))
        name = path.rsplit('/', 1)[-1].removesuffix('.py')
        print(
            f'{name:60} {found.parameters:12d} '
            f'{found.parameters / 1e6:8.2f} '
            f'{found.multiply_adds / 1e9:8.2f}'
        )


def print_size(rows):
    """Print the rows of one size."""
    print(
        f'\n{rows[0].side} x {rows[0].side}\n{"":18} {"GMACs":>9} '
        f'{"M activations":>13} {"peak GiB":>8} seconds'
    )
    for row in rows:
        measured = f'{"N/A":>8} {OUT_OF_MEMORY} ({row.limit_gib:.3g} GiB)'
        if row.status != OUT_OF_MEMORY:
            measured = (
                f'{row.peak_gib:8.2f} {row.seconds:.3g} '
                f'({row.seconds_p20:.3g} to {row.seconds_p80:.3g})'
            )
        print(
            f'{row.model:18} {row.multiply_adds / 1e9:9.2f} '
            f'{row.activations / 1e6:13.1f} {measured}',
            flush=True,
        )


def print_growth(growth):
    """Print the exponents, and the sides of each fit."""
    print(
        '\nGrowth exponents over the number of pixels (sides of the fit); 1 '
        'is linear\n'
        + ' ' * 18
        + ''.join(f'{name:>23}' for name in QUANTITIES.values())
    )
    cells = {}
    for g in growth:
        shown = 'N/A' if g.exponent is None else f'{g.exponent:.2f}'
        cells[g.model, g.quantity] = (
            f'{shown} ({g.first_side} to {g.last_side})'
        )
    for model in dict.fromkeys(g.model for g in growth):
        print(
            f'{model:18}'
            + ''.join(
                f'{cells.get((model, quantity), "N/A"):>23}'
                for quantity in QUANTITIES
            )
        )


def run_sweep(args):
    """Measure, print and write all sizes, then the exponents."""
    sides = sweep_sides(*args.sweep)
    rows = []
    if args.plot:
        check_picture(args.plot)
        check_writable(args.plot)
    if args.out:
        check_writable(args.out)
        check_writable(growth_path(args.out))
        rows = read_known(args.out)
    print(machine_line())
    groups = sweep(
        args.models or SWEEP_MODELS,
        sides,
        5 if args.runs is None else args.runs,
        args.memory_limit,
        rows,
    )
    for group in groups:
        print_size(group)
        rows = merge(rows, group)
        if args.out:
            write_csv(args.out, rows)
    growth = fit_growth(rows)
    print_growth(growth)
    if args.out:
        write_csv(growth_path(args.out), growth)
    if args.plot:
        plot_sweep(rows, growth, args.plot)


def main():
    args = parse_args()
    if args.sweep is None:
        for name in SWEEP_ARGUMENTS:
            if getattr(args, name) is not None:
                raise UserError(
                    f'--{name.replace("_", "-")} requires --sweep MIN MAX'
                )
        count_configs(args)
        return
    if args.configs or args.shape:
        raise UserError(
            '--sweep takes --models, and neither config files nor --shape, '
            f'got {" ".join([*args.configs, *map(str, args.shape or [])])}'
        )
    if args.out and os.path.splitext(args.out)[1].lower() != '.csv':
        raise UserError(
            f'--out must be a file with the suffix .csv, got {args.out}'
        )
    run_sweep(args)


if __name__ == '__main__':
    run(main)
