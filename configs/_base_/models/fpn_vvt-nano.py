# A small Semantic FPN with VVT-nano, for the demo: 1.1 M parameters.
_base_ = './fpn_vvt.py'

model = dict(
    backbone=dict(
        arch=dict(
            embed_dims=[32, 64, 96, 128],
            num_heads=[1, 2, 3, 4],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
        )
    ),
    neck=dict(in_channels=[32, 64, 96, 128], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        norm_cfg=dict(type='BN'),
        num_classes=11,
    ),
)
