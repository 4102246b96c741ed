"""Predict an image or a folder of images: pictures, and results as JSON.

The config tells the task: classes with their scores, a class for each pixel,
or boxes and masks.
"""

import argparse
import os
import sys

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from rich.progress import track

import mmvvt  # noqa: F401, registers VVT and what comes with it
from mmvvt.analysis.inference import build_predictor, find_images, write_json
from mmvvt.engine.cli import fail, read_config


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='IMAGE_OR_FOLDER',
                        help='subfolders are searched too')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out-dir',
        required=True,
        help='folder for results.json, pictures/ and label_maps/')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: cuda if there is '
        'one, else cpu)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detections with a lower score are left out (default: 0.3)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of the config to override: key=value')
    return parser.parse_args()


def choose_device(name):
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        fail(f'--device {name} cannot be used: {str(error).splitlines()[0]}')
    return name


def main():
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        fail(f'--score-thr must be from 0 to 1, got {args.score_thr}')
    # The code bases have much to say that does not matter here.
    MMLogger.get_instance('infer', log_level='ERROR')
    folder, files = find_images(args.source, args.out_dir)
    device = choose_device(args.device)
    predictor = build_predictor(
        read_config(args.config, args.cfg_options), args.checkpoint, device,
        args.score_thr)

    images, skipped = [], []
    for entry in track(
            predictor.run(folder, files, args.out_dir),
            f'{predictor.task} on {device}',
            total=len(files),
            disable=len(files) == 1):
        if 'reason' in entry:
            print(f'skipped {entry["file"]}: {entry["reason"]}',
                  file=sys.stderr)
        (skipped if 'reason' in entry else images).append(entry)

    out = os.path.join(args.out_dir, 'results.json')
    write_json(
        out,
        dict(
            task=predictor.task,
            config=args.config,
            checkpoint=args.checkpoint,
            images=images,
            skipped=skipped))
    print(f'{len(images)} of {len(files)} images: {out}')
    if skipped:
        fail(f'{len(skipped)} of {len(files)} images had to be skipped')


if __name__ == '__main__':
    main()
