# Settings of DINO in mmdet, 12 epochs: AdamW, learning rate 1e-4 for batch
# size 16 (8 x 2) and 1e-5 for the backbone, weight decay 1e-4 for all
# parameters, gradient norm clipped to 0.1, learning rate divided by 10 at
# epoch 11. Mixed precision is ours.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    constructor='MergedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=True, end=12, milestones=[11], gamma=0.1)
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(base_batch_size=16)
