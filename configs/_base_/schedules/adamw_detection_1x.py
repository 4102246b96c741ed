# Settings of Swin for Mask R-CNN, 12 epochs: AdamW, learning rate 1e-4 for
# batch size 16 (8 x 2), weight decay 0.05 except for norm layers of the
# backbone, warm-up of 500 iterations, learning rate divided by 10 at epochs 8
# and 11, mixed precision. PVT uses a learning rate of 2e-4 and a weight decay
# of 1e-4 for Mask R-CNN.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    ),
    constructor='MergedOptimWrapperConstructor',
    # As in Swin, parameters whose name contains 'norm': those of the norm
    # layers of the backbone, but neither other biases nor the batch norms of
    # the heads, which are called 'bn'.
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        end=12,
        milestones=[8, 11],
        gamma=0.1,
    ),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(base_batch_size=16)
