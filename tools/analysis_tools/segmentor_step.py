"""Peak memory and time of a segmentor's training step, on random images."""

import argparse
import resource
import statistics
import time

import torch
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

import mmvvt  # noqa: F401, registers VVT and what comes with it
from mmvvt.analysis.benchmark import machine_line
from mmvvt.engine.cli import fail, read_config


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--batch', type=int, default=2, help='images (default: 2)')
    parser.add_argument(
        '--runs', type=int, default=3, help='counted steps (default: 3)')
    return parser.parse_args()


def random_batch(cfg, batch):
    """Images and labels at the config's crop size, as the loader gives."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    height, width = cfg.model.data_preprocessor.size
    samples = []
    for _ in range(batch):
        labels = torch.randint(cfg.model.decode_head.num_classes,
                               (1, height, width))
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(img_shape=(height, width)))
        samples.append(sample)
    images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


def peak_gib():
    """Of the GPU's tensors, or of the whole process without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    args = parse_args()
    if args.batch < 1 or args.runs < 1:
        fail('--batch and --runs must be 1 or more, got '
             f'{args.batch} and {args.runs}')
    cfg = read_config(args.config)
    if 'decode_head' not in cfg.model:
        fail(f'{args.config} is no segmentor: its model has no decode_head')
    torch.manual_seed(0)
    cfg.model.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    if torch.cuda.is_available():
        model.cuda()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    seconds = []
    for _ in range(1 + args.runs):
        data = random_batch(cfg, args.batch)
        start = time.perf_counter()
        model.train_step(data, optim_wrapper)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    height, width = cfg.model.data_preprocessor.size
    print(machine_line())
    print(f'{args.batch} x {height} x {width}: '
          f'{statistics.median(seconds[1:]):.2f} s a step (median of '
          f'{args.runs}), peak {peak_gib():.2f} GiB')


if __name__ == '__main__':
    main()
