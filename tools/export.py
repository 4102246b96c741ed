"""Export a trained model to a file that runs without its Python code.

The file is run in its engine at three other sizes and compared with PyTorch.
If the outputs differ, it is removed and the exit code is 1.
"""

import argparse
import re

from mmengine.logging import MMLogger

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import export_model
from mmvvt.cli import add_cfg_options, run
from mmvvt.errors import UserError
from mmvvt.preflight import read_config


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--format',
        default='onnx',
        help='onnx, openvino, exported-program or torchscript (default: onnx)',
    )
    parser.add_argument(
        '--out',
        required=True,
        metavar='FILE',
        help='file to write: .onnx, .xml, .pt2 or .pt',
    )
    parser.add_argument(
        '--backbone', action='store_true', help='export the backbone only'
    )
    parser.add_argument(
        '--label-map',
        action='store_true',
        help='segmentors: label maps instead of class scores',
    )
    parser.add_argument(
        '--nms',
        action='store_true',
        help='RetinaNet: boxes after non-maximum suppression, for one image, '
        'instead of the outputs of the head',
    )
    parser.add_argument(
        '--fixed-size',
        metavar='HxW',
        help='fixed height and width in pixels (default: dynamic)',
    )
    parser.add_argument(
        '--half', action='store_true', help='compute in float16'
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='quantise the convolutions, calibrated with training images of '
        'the config (onnx, openvino)',
    )
    parser.add_argument(
        '--with-preprocessing',
        action='store_true',
        help='take RGB images with values from 0 to 255 and normalise them',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def parse_size(text: str):
    match = re.fullmatch(r'(\d{1,6})x(\d{1,6})', text)
    if match is None:
        raise UserError(
            f'--fixed-size must be HxW, such as 512x512, got {text!r}'
        )
    return int(match[1]), int(match[2])


def main():
    args = parse_args()
    # Suppress log messages that are not relevant for exporting.
    MMLogger.get_instance('export', log_level='ERROR')
    result = export_model(
        read_config(args.config, args.cfg_options),
        args.checkpoint,
        args.out,
        args.format,
        backbone=args.backbone,
        label_map=args.label_map,
        nms=args.nms,
        fixed_size=None
        if args.fixed_size is None
        else parse_size(args.fixed_size),
        half=args.half,
        int8=args.int8,
        with_preprocessing=args.with_preprocessing,
    )
    for note in result.notes:
        print(f'note: {note}')
    print(
        f'{result.path}: {result.size / 1e6:.1f} MB, worst relative error '
        f'against PyTorch {result.error:.1e}'
    )


if __name__ == '__main__':
    run(main)
