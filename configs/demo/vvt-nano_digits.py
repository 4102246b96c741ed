# VVT-nano on the handwritten digits of scikit-learn, for two CPU cores.
_base_ = [
    '../_base_/models/vvt-nano_classifier.py',
    '../_base_/classification_runtime.py',
]

# Three equal channels, so that the backbone can also be used on RGB images.
data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    # Resize from 8 x 8 to the minimum input size of the backbone.
    dict(type='Resize', scale=(32, 32), interpolation='bicubic'),
    # The scenes of the other demos also contain dark digits.
    dict(type='Invert', prob=0.1),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 32), interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    dataset=dict(
        type='Digits',
        data_root='data/digits',
        split='train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=90,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='Digits',
        data_root='data/digits',
        split='val',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator

optim_wrapper = dict(
    # One fused operation updates all parameters.
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05, fused=True),
    constructor='MergedOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-2, end=2, convert_to_iter_based=True
    ),
    dict(
        type='CosineAnnealingLR',
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

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1, save_best=None),
    visualization=dict(rescale_factor=32),
)
randomness = dict(seed=0)
