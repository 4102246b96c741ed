"""Train the variants of an ablation grid, resumable run by run."""

import argparse
from pathlib import Path

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.analysis.ablation import (
    read_grid,
    read_results,
    summarize,
    to_markdown,
)
from mmvvt.apis import prepare_variants, run_grid, select_results
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.fileio import atomic_write, check_writable
from mmvvt.visualization.ablation import plot_ablation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', help='YAML file of the grid')
    parser.add_argument(
        '--csv',
        help='file with the results; finished runs in it are skipped '
        '(default: work_dirs/ablation/GRID.csv)',
    )
    parser.add_argument('--plot', help='PNG file to write')
    parser.add_argument(
        '--work-dir',
        help='directory of the runs (default: work_dirs/ablation/GRID)',
    )
    parser.add_argument(
        '--variants', nargs='+', help='variants to run (default: all)'
    )
    parser.add_argument(
        '--seeds', nargs='+', type=int, help='seeds to run (default: all)'
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='runs at the same time, which share the processors (default: 1)',
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--cost',
        action='store_true',
        help='build each variant and print its parameters and multiply-adds, '
        'without training',
    )
    action.add_argument(
        '--report',
        action='store_true',
        help='print the table of the CSV file, without training',
    )
    return parser.parse_args()


def print_cost(variants):
    width = max(len(variant.name) for variant in variants)
    print(f'{"variant":{width}} {"params (M)":>11} {"MMACs":>9}')
    for variant in variants:
        found = variant.complexity
        print(
            f'{variant.name:{width}} {found.parameters / 1e6:11.3f} '
            f'{found.multiply_adds / 1e6:9.2f}'
        )


def main():
    args = parse_args()
    if args.plot:
        if args.cost:
            raise UserError('--plot draws results, which --cost does not have')
        if not args.plot.endswith('.png'):
            raise UserError(f'--plot must end with .png, got {args.plot}')
        check_writable(args.plot)
    grid = read_grid(args.grid)
    folder = Path('work_dirs', 'ablation')
    csv = args.csv or str(folder / f'{grid.name}.csv')
    variants = prepare_variants(grid, args.variants)
    if args.cost:
        print_cost(variants)
        return
    if args.report:
        rows = read_results(csv)
        results = select_results(grid, variants, rows, args.seeds)
        if not results:
            raise UserError(
                f'no results of these variants, seeds and settings in {csv}'
            )
    else:
        results = run_grid(
            grid,
            variants,
            csv,
            args.work_dir or str(folder / grid.name),
            args.seeds,
            args.jobs,
            report=lambda line: print(line, flush=True),
        )
    summaries = summarize(results)
    print(to_markdown(summaries, grid.metric))
    if args.plot:
        with atomic_write(args.plot) as temporary:
            plot_ablation(summaries, grid.metric, grid.name, temporary)
        print(f'{args.plot}: {len(results)} runs')


if __name__ == '__main__':
    run(main)
