# UperNet settings of Swin: AdamW, learning rate 6e-5, weight decay 0.01 except
# for norm layers of the backbone, warm-up of 1500 iterations, then linear
# decay to 0 at iteration 160 000, batch size 16 (8 x 2). Mixed precision is
# ours.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01
    ),
    constructor='MergedOptimWrapperConstructor',
    # As in Swin, parameters whose name contains 'norm': those of the norm
    # layers of the backbone, but neither other biases nor the batch norms of
    # the heads, which are called 'bn'.
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=1500),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=1500,
        end=160000,
    ),
]

train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=160000, val_interval=8000
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(base_batch_size=16)
