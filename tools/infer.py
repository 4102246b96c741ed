"""Run inference on an image or a folder of images.

Visualizations are written as PNG files and results as JSON. The task is
determined by the config: classification, semantic segmentation, or object
detection with optional masks.
"""

import argparse
import os
import sys

from mmengine.logging import MMLogger
from rich.progress import track

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.apis import Predictor, choose_device, find_images, keep_freed_memory
from mmvvt.cli import add_cfg_options, run
from mmvvt.errors import UserError
from mmvvt.fileio import write_json
from mmvvt.preflight import read_config


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'source', metavar='IMAGE_OR_FOLDER', help='image or folder of images'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out-dir',
        required=True,
        help='output folder for results.json, pictures/ and label_maps/',
    )
    parser.add_argument(
        '--device',
        help='such as cpu or cuda:1 (default: cuda if available, else cpu)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='minimum score of detections (default: 0.3)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        raise UserError(
            f'--score-thr must be from 0 to 1, got {args.score_thr}'
        )
    # Suppress log messages that are not relevant for inference.
    MMLogger.get_instance('infer', log_level='ERROR')
    folder, files = find_images(args.source, args.out_dir)
    try:
        device = choose_device(args.device)
    except UserError as error:
        raise UserError(f'--{error}') from error
    keep_freed_memory()
    predictor = Predictor(
        read_config(args.config, args.cfg_options),
        args.checkpoint,
        device,
        args.score_thr,
    )

    images, skipped = [], []
    for entry in track(
        predictor.run(folder, files, args.out_dir),
        f'{predictor.task} on {device}',
        total=len(files),
        disable=len(files) == 1,
    ):
        if 'reason' in entry:
            print(
                f'skipped {entry["file"]}: {entry["reason"]}', file=sys.stderr
            )
        (skipped if 'reason' in entry else images).append(entry)

    out = os.path.join(args.out_dir, 'results.json')
    write_json(
        out,
        dict(
            task=predictor.task,
            config=args.config,
            checkpoint=args.checkpoint,
            images=images,
            skipped=skipped,
        ),
    )
    print(f'{len(images)} of {len(files)} images: {out}')
    if skipped:
        raise UserError(f'{len(skipped)} of {len(files)} images were skipped')


if __name__ == '__main__':
    run(main)
