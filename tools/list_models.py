"""List the models of the package, whose names other commands accept."""

import argparse

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import list_models
from mmvvt.cli import run
from mmvvt.errors import UserError


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'pattern',
        nargs='?',
        help="start of the names, such as vvt-tiny, or '*upernet' to find it "
        'anywhere in a name (default: all names)',
    )
    parser.add_argument(
        '--task',
        help='classification, segmentation or detection (default: all)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    names = list_models(args.pattern, args.task)
    if not names:
        raise UserError(
            f'no model matches {args.pattern}; without a pattern, this '
            'command lists all models'
        )
    print(*names, sep='\n')


if __name__ == '__main__':
    run(main)
