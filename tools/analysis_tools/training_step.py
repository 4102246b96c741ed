"""Measure time and peak memory of a training step of a segmentor or detector.

Images and ground truth are random.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData

import mmvvt  # noqa: F401, registers the modules of mmvvt
from mmvvt.analysis.benchmark import machine_line
from mmvvt.analysis.memory import peak_memory_gib
from mmvvt.apis import keep_freed_memory
from mmvvt.cli import add_cfg_options, run
from mmvvt.errors import UserError
from mmvvt.preflight import read_config

NUM_OBJECTS = 7  # an image of COCO has 7.3 on average


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--batch', type=int, default=2, help='batch size (default: 2)'
    )
    parser.add_argument(
        '--runs', type=int, default=3, help='timed steps (default: 3)'
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the images (default: the crop size of a segmentor; '
        '800 1333 for a detector)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def random_labels(model, height, width):
    """Create a random segmentation map as ground truth."""
    from mmseg.structures import SegDataSample

    labels = torch.randint(model.decode_head.num_classes, (1, height, width))
    return SegDataSample(gt_sem_seg=PixelData(data=labels))


def random_objects(model, height, width):
    """Create random objects as ground truth.

    Boxes have a quarter of the height and width; masks fill their boxes.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    x = torch.randint(3 * width // 4, (NUM_OBJECTS,))
    y = torch.randint(3 * height // 4, (NUM_OBJECTS,))
    # (objects, 4): x1, y1, x2, y2
    boxes = torch.stack([x, y, x + width // 4, y + height // 4], dim=1)
    masks = np.zeros((NUM_OBJECTS, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist()):
        mask[y1:y2, x1:x2] = 1
    head = model.roi_head if model.with_roi_head else model
    head = head.bbox_head
    if isinstance(head, torch.nn.ModuleList):
        head = head[0]
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=boxes.float(),
            labels=torch.randint(head.num_classes, (NUM_OBJECTS,)),
            masks=BitmapMasks(masks, height, width),
        )
    )


def random_batch(model, truth, batch, height, width):
    """Create a batch in the format of the data loader."""
    samples = [truth(model, height, width) for _ in range(batch)]
    for sample in samples:
        sample.set_metainfo(
            dict(img_shape=(height, width), scale_factor=(1.0, 1.0))
        )
    images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


def main():
    args = parse_args()
    if min(args.batch, args.runs, *(args.shape or [1])) < 1:
        raise UserError(
            '--batch, --runs and --shape must be 1 or more, got '
            f'{args.batch}, {args.runs} and {args.shape}'
        )
    cfg = read_config(args.config, args.cfg_options)
    if 'decode_head' in cfg.model:
        truth, shape = random_labels, cfg.model.data_preprocessor.size
    elif {'bbox_head', 'roi_head'} & set(cfg.model):
        truth, shape = random_objects, (800, 1333)
    else:
        raise UserError(
            f'{args.config} is neither a segmentor nor a detector: its '
            'model has no decode_head, bbox_head or roi_head'
        )
    height, width = args.shape or shape
    if truth is random_labels:
        cfg.model.data_preprocessor.size = (height, width)
    keep_freed_memory()
    torch.manual_seed(0)
    cfg.model.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    model.init_weights()
    if torch.cuda.is_available():
        model.cuda()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    seconds = []
    for _ in range(1 + args.runs):
        data = random_batch(model, truth, args.batch, height, width)
        start = time.perf_counter()
        model.train_step(data, optim_wrapper)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(machine_line())
    print(
        f'{args.batch} x {height} x {width}: '
        f'{statistics.median(seconds[1:]):.2f} s per step (median of '
        f'{args.runs}), peak {peak_memory_gib():.2f} GiB'
    )


if __name__ == '__main__':
    run(main)
