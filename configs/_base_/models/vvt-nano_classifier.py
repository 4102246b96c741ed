# VVT-nano: 0.7 M parameters, small enough to train on the CPU of a laptop.
_base_ = './vvt_classifier.py'

model = dict(
    backbone=dict(
        arch=dict(
            embed_dims=[32, 64, 96, 128],
            num_heads=[1, 2, 3, 4],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
        ),
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=128),
)
