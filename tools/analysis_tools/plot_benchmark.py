"""Plot speed and memory from CSV files written by benchmark.py."""

import argparse

from mmvvt.analysis.benchmark import read_csv
from mmvvt.cli import run
from mmvvt.visualization.benchmark import plot_benchmark


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('picture', help='PNG or SVG file to write')
    parser.add_argument(
        'csv', nargs='+', help='files written by benchmark.py --csv'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    rows = [row for path in args.csv for row in read_csv(path)]
    plot_benchmark(rows, args.picture)
    print(f'{args.picture}: {len(rows)} rows')


if __name__ == '__main__':
    run(main)
