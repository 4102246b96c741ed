# Semantic FPN with VVT-nano: handwritten digits on photographs, for two CPU
# cores. The backbone is initialized from the checkpoint of the classification
# demo.
_base_ = [
    '../_base_/models/fpn_vvt-nano.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/vvt-nano_digits/epoch_30.pth',
            prefix='backbone.',
        )
    ),
    # 7 of 8 pixels are background, which dominates the cross-entropy loss. The
    # Dice loss ignores the background.
    decode_head=dict(
        dropout_ratio=0.0,
        loss_decode=[
            dict(type='CrossEntropyLoss'),
            dict(type='DiceLoss', use_sigmoid=False, ignore_index=10),
        ],
    ),
    # An auxiliary loss at stride 8 reduces the number of iterations needed to
    # learn the classes. The head is not used in inference.
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=64,
        in_index=1,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
    ),
)

iterations = 2400
optim_wrapper = dict(optimizer=dict(lr=5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=2e-3,
        by_epoch=False,
        begin=50,
        end=iterations,
    ),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)

default_hooks = dict(
    checkpoint=dict(interval=iterations, max_keep_ckpts=1, save_best=None)
)
randomness = dict(seed=0)
