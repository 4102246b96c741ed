# vvt-nano_fpn_digit-scenes.py as a pure Python config: the types are classes.
from mmengine.config import read_base

with read_base():
    from .._base_.pure_python_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmpretrain.datasets.transforms import Invert
from mmcv.transforms import LoadImageFromFile, Resize
from mmseg.datasets.transforms import (
    LoadAnnotations,
    PackSegInputs,
    PhotoMetricDistortion,
)
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import (
    FPN,
    CrossEntropyLoss,
    DiceLoss,
    EncoderDecoder,
    FPNHead,
    SegDataPreProcessor,
)
from mmseg.visualization import SegLocalVisualizer

from mmvvt.datasets import CheckLabels, DigitScenes
from mmvvt.models import VVT

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(
        type=SegDataPreProcessor,
        **rgb,
        pad_val=0,
        seg_pad_val=255,
        size=(96, 96),
    ),
    backbone=dict(type=VVT, arch=arch, out_indices=(0, 1, 2, 3)),
    neck=dict(
        type=FPN, in_channels=[32, 64, 96, 128], out_channels=64, num_outs=4
    ),
    decode_head=dict(
        type=FPNHead,
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN', requires_grad=True),
        align_corners=False,
        loss_decode=[
            dict(type=CrossEntropyLoss),
            dict(type=DiceLoss, use_sigmoid=False, ignore_index=10),
        ],
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

load = dict(type=LoadImageFromFile)
resize = dict(type=Resize, scale=(96, 96), keep_ratio=True)
annotations = dict(type=LoadAnnotations)
check = dict(type=CheckLabels, num_classes=11)
pack = dict(type=PackSegInputs)

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=endless,
    dataset=dict(
        type=DigitScenes,
        data_root='data/digit-scenes',
        split='train',
        pipeline=[
            load,
            annotations,
            resize,
            check,
            dict(type=Invert, prob=0.2),
            dict(type=PhotoMetricDistortion),
            pack,
        ],
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    sampler=in_order,
    dataset=dict(
        type=DigitScenes,
        data_root='data/digit-scenes',
        split='val',
        pipeline=[load, resize, annotations, check, pack],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper.optimizer.update(lr=5e-3)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-2, by_epoch=False, end=50),
    dict(
        type=CosineAnnealingLR,
        eta_min_ratio=2e-3,
        by_epoch=False,
        begin=50,
        end=2400,
    ),
]
train_cfg = dict(type=IterBasedTrainLoop, max_iters=2400, val_interval=2400)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
auto_scale_lr = dict(base_batch_size=8)
log_processor = dict(by_epoch=False)

default_hooks.checkpoint.update(by_epoch=False, interval=2400)
default_hooks.update(visualization=dict(type=SegVisualizationHook))
visualizer = dict(
    type=SegLocalVisualizer, name='visualizer', vis_backends=vis_backends
)
