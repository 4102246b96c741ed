# Fine-tuning on a small dataset, with our own settings: AdamW, the learning
# rate of a layer is 0.75 times that of the next one, weight decay 0.05 except
# for biases and norm layers, 20 epochs of cosine annealing after one epoch of
# warm-up. Set lr and auto_scale_lr.base_batch_size in each config.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    constructor='MergedOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.75, norm_decay_mult=0.0, bias_decay_mult=0.0
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-2,
        by_epoch=True,
        end=1,
        convert_to_iter_based=True,
    ),
    # A ratio, so that the learning rates of the layers keep their ratios.
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        begin=1,
        end=20,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
