# retinanet_vvt-nano_digit-scenes.py as a pure Python config: the types are
# classes.
from mmengine.config import read_base

with read_base():
    from .._base_.pure_python_runtime import *

from mmcv.ops import nms
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import (
    LoadAnnotations,
    PackDetInputs,
    PhotoMetricDistortion,
    Resize,
)
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import (
    FPN,
    DetDataPreprocessor,
    FocalLoss,
    L1Loss,
    RetinaHead,
    RetinaNet,
)
from mmdet.models.task_modules import (
    AnchorGenerator,
    DeltaXYWHBBoxCoder,
    MaxIoUAssigner,
    PseudoSampler,
)
from mmdet.visualization import DetLocalVisualizer
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop

from mmvvt.datasets.digit_scenes_coco import DigitScenesCoco
from mmvvt.models import VVT

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor,
        **rgb,
        pad_size_divisor=32,
    ),
    backbone=dict(type=VVT, arch=arch, out_indices=(1, 2, 3)),
    neck=dict(
        type=FPN, in_channels=[64, 96, 128], out_channels=64, num_outs=3
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(
            type=AnchorGenerator,
            octave_base_scale=3,
            scales_per_octave=3,
            ratios=[1.0, 1.6, 2.5],
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(
            type=DeltaXYWHBBoxCoder,
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0],
        ),
        loss_cls=dict(
            type=FocalLoss,
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=1.0,
        ),
        loss_bbox=dict(type=L1Loss, loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner,
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0.0,
            ignore_iof_thr=-1,
        ),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type=nms, iou_threshold=0.5),
        max_per_img=100,
    ),
)

load = dict(type=LoadImageFromFile)
annotations = dict(type=LoadAnnotations, with_bbox=True)
resize = dict(type=Resize, scale=(128, 128), keep_ratio=True)

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=endless,
    dataset=dict(
        type=DigitScenesCoco,
        data_root='data/digit-scenes',
        ann_file='instances_training.json',
        data_prefix=dict(img='images/training'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            load,
            annotations,
            dict(type=PhotoMetricDistortion),
            dict(type=PackDetInputs),
        ],
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    sampler=in_order,
    dataset=dict(
        type=DigitScenesCoco,
        data_root='data/digit-scenes',
        ann_file='instances_validation.json',
        data_prefix=dict(img='images/validation'),
        test_mode=True,
        pipeline=[
            load,
            resize,
            annotations,
            dict(
                type=PackDetInputs,
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type=CocoMetric,
    ann_file='data/digit-scenes/instances_validation.json',
    metric='bbox',
)
test_evaluator = val_evaluator

param_scheduler = [
    dict(type=LinearLR, start_factor=1e-2, by_epoch=False, end=100),
    dict(
        type=CosineAnnealingLR,
        eta_min_ratio=5e-3,
        by_epoch=False,
        begin=100,
        end=1400,
    ),
]
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1400, val_interval=1400)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
auto_scale_lr = dict(base_batch_size=8)
log_processor = dict(by_epoch=False)

default_hooks.checkpoint.update(by_epoch=False, interval=1400)
default_hooks.update(visualization=dict(type=DetVisualizationHook))
visualizer = dict(
    type=DetLocalVisualizer, name='visualizer', vis_backends=vis_backends
)
