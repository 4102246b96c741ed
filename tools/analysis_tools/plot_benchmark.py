"""Draw CSV files of benchmark.py: speed and memory over the image size."""

import argparse

from mmvvt.analysis.benchmark import read_csv
from mmvvt.cli import run
from mmvvt.visualization.benchmark import plot_benchmark


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('picture', help='PNG or SVG to write')
    parser.add_argument(
        'csv', nargs='+', help='what benchmark.py --csv wrote, one or more'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    rows = [row for path in args.csv for row in read_csv(path)]
    plot_benchmark(rows, args.picture)
    print(f'{args.picture}: {len(rows)} rows')


if __name__ == '__main__':
    run(main)
