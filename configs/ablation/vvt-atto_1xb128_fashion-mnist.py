# The base config of the ablation studies on Fashion-MNIST: the pyramid of VVT
# with narrow stages, for two CPU cores.
_base_ = '../classification/vvt-nano_1xb128_fashion-mnist.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[16, 32, 48, 64],
            num_heads=[1, 2, 2, 2],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
            fr_ratios=[2, 2, 2, 2],
        )
    ),
    head=dict(in_channels=64),
    # Few epochs: no Mixup and CutMix.
    train_cfg=None,
)

# Random shifts by up to 2 pixels. Cropping is much faster than resizing.
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
# 28 + 2 * 2 pixels are exactly one crop: the image is padded. Images of other
# sizes would be cropped at random.
test_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=2),
    dict(type='PackInputs'),
]
train_dataloader = dict(num_workers=0, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    # One fused operation updates all parameters.
    optimizer=dict(fused=True),
    # Position tables, which some variants have, are not decayed.
    paramwise_cfg=dict(custom_keys={'.pos_embed': dict(decay_mult=0.0)}),
)
epochs = 3
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=5e-3,
        by_epoch=False,
        begin=100,
        end=468 * epochs,
    ),
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=1, save_best=None),
    logger=dict(interval=100),
)
