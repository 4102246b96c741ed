"""List the configs of the package, whose names other commands accept."""

import argparse
import fnmatch

from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.shipped import shipped_configs


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'patterns',
        nargs='*',
        default=['*'],
        help="names to list, such as 'vvt-tiny*' (default: all)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    configs = shipped_configs()
    names = [
        name
        for name in configs
        if any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns)
    ]
    if not names:
        raise UserError(f'no config matches {" ".join(args.patterns)}')
    for name in names:
        print(f'{name:48} {configs[name].parent.name}')


if __name__ == '__main__':
    run(main)
