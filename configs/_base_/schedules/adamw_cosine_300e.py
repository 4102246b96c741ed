# Settings of the official code: AdamW, learning rate 5e-4 * batch size / 512,
# weight decay 0.05 except for biases and norm layers, 5 epochs of warm-up from
# 1e-6, cosine annealing to 1e-5, 300 epochs, mixed precision. The batch size,
# 1024 = 8 x 128, is ours. The official code changes the learning rate once per
# epoch; here it changes in every iteration, see README.md.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(
        type='AdamW',
        lr=5e-4 * 1024 / 512,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
    ),
    constructor='MergedOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,  # 1e-6
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        # 1e-5. A ratio, because --auto-scale-lr scales the learning rate.
        eta_min_ratio=1e-2,
        by_epoch=True,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)
