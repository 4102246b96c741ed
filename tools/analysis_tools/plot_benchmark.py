"""Draw the CSV file of benchmark.py: speed and memory over the image size."""

import argparse

from mmvvt.analysis.benchmark import read_csv
from mmvvt.analysis.benchmark_plot import plot_benchmark
from mmvvt.engine.cli import fail


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', help='what benchmark.py --csv wrote')
    parser.add_argument('picture', help='PNG or SVG to write')
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        rows = read_csv(args.csv)
    except (OSError, ValueError) as error:
        fail(str(error))
    plot_benchmark(rows, args.picture)
    print(f'{args.picture}: {len(rows)} rows of {args.csv}')


if __name__ == '__main__':
    main()
