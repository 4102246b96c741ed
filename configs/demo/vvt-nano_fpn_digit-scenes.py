# Semantic FPN on a small VVT: handwritten digits on photographs, for two CPU
# cores. The backbone starts from the classification demo's checkpoint.
_base_ = [
    '../_base_/models/fpn_vvt-nano.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/vvt-nano_digits/epoch_30.pth',
            prefix='backbone.')),
    # Seven pixels in eight are background, which drowns the digits in the
    # cross entropy. The Dice loss leaves it out.
    decode_head=dict(loss_decode=[
        dict(type='CrossEntropyLoss', class_weight=[1.] * 10 + [0.8]),
        dict(type='DiceLoss', use_sigmoid=False, ignore_index=10),
    ]))

iterations = 1100
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=False,
        begin=50,
        end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)

default_hooks = dict(
    checkpoint=dict(
        interval=iterations, max_keep_ckpts=1, save_best=None))
randomness = dict(seed=0)
