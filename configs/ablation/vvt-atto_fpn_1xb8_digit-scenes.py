# The base config of the ablation studies on digit scenes: a small Semantic FPN
# trained from random weights, for two CPU cores.
_base_ = '../demo/vvt-nano_fpn_digit-scenes.py'

model = dict(
    backbone=dict(
        init_cfg=None,
        arch=dict(
            _delete_=True,
            embed_dims=[16, 32, 48, 64],
            num_heads=[1, 2, 2, 2],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
            fr_ratios=[2, 2, 2, 2],
        ),
    ),
    neck=dict(in_channels=[16, 32, 48, 64], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=32),
    auxiliary_head=dict(in_channels=32, channels=32),
)

optim_wrapper = dict(
    # Position tables, which some variants have, are not decayed.
    paramwise_cfg=dict(custom_keys={'.pos_embed': dict(decay_mult=0.0)})
)
iterations = 2000
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
default_hooks = dict(checkpoint=dict(interval=500))
