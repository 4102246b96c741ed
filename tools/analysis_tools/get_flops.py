"""Count the parameters and multiply-adds of models."""

import argparse

from mmengine.registry import MODELS

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.analysis.complexity import count
from mmvvt.cli import run
from mmvvt.errors import UserError
from mmvvt.preflight import read_config


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        default=[224],
        metavar='SIZE',
        help='height and width of the image, or one number for both '
        '(default: 224)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if len(args.shape) > 2 or min(args.shape) < 1:
        raise UserError(
            f'--shape takes one or two positive numbers, got {args.shape}'
        )
    height, width = args.shape[0], args.shape[-1]
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
        model = MODELS.build(cfg.model)
        channels = cfg.model.backbone.get('in_channels', 3)
        found = count(model, (1, channels, height, width))
        name = path.rsplit('/', 1)[-1].removesuffix('.py')
        print(
            f'{name:60} {found.parameters:12d} '
            f'{found.parameters / 1e6:8.2f} '
            f'{found.multiply_adds / 1e9:8.2f}'
        )


if __name__ == '__main__':
    run(main)
