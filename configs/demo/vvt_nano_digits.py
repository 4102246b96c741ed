# vvt-nano_digits.py as a pure Python config: the types are classes.
from mmengine.config import read_base

with read_base():
    from .._base_.pure_python_runtime import *

from mmengine.dataset import default_collate
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmpretrain.datasets import LoadImageFromFile, PackInputs, Resize
from mmpretrain.datasets.transforms import Invert
from mmpretrain.engine.hooks import VisualizationHook
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import (
    ClsDataPreprocessor,
    CutMix,
    GlobalAveragePooling,
    ImageClassifier,
    LabelSmoothLoss,
    LinearClsHead,
    Mixup,
)
from mmpretrain.visualization import UniversalVisualizer

from mmvvt.datasets import Digits
from mmvvt.models import VVT

model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(
        type=ClsDataPreprocessor,
        num_classes=10,
        mean=[127.5] * 3,
        std=[127.5] * 3,
    ),
    backbone=dict(type=VVT, arch=arch),
    neck=dict(type=GlobalAveragePooling),
    head=dict(
        type=LinearClsHead,
        num_classes=10,
        in_channels=128,
        loss=dict(type=LabelSmoothLoss, label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(
        augments=[dict(type=Mixup, alpha=0.8), dict(type=CutMix, alpha=1.0)]
    ),
)

load = dict(type=LoadImageFromFile)
resize = dict(type=Resize, scale=(32, 32), interpolation='bicubic')
invert = dict(type=Invert, prob=0.1)
pack = dict(type=PackInputs)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    sampler=shuffled,
    collate_fn=dict(type=default_collate),
    drop_last=True,
    dataset=dict(
        type=Digits,
        data_root='data/digits',
        split='train',
        pipeline=[load, resize, invert, pack],
    ),
)
val_dataloader = dict(
    batch_size=90,
    num_workers=0,
    persistent_workers=False,
    sampler=in_order,
    collate_fn=dict(type=default_collate),
    dataset=dict(
        type=Digits,
        data_root='data/digits',
        split='val',
        pipeline=[load, resize, pack],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=Accuracy, topk=1)
test_evaluator = val_evaluator

param_scheduler = [
    dict(type=LinearLR, start_factor=1e-2, end=2, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        eta_min_ratio=5e-3,
        begin=2,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)

default_hooks.update(
    visualization=dict(type=VisualizationHook, rescale_factor=32)
)
visualizer = dict(type=UniversalVisualizer, vis_backends=vis_backends)
