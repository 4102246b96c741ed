# A small RetinaNet with VVT-nano, for the demo: 1.1 M parameters.
_base_ = './retinanet_vvt_fpn.py'

model = dict(
    backbone=dict(
        arch=dict(
            embed_dims=[32, 64, 96, 128],
            num_heads=[1, 2, 3, 4],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
        )
    ),
    neck=dict(
        in_channels=[64, 96, 128],
        out_channels=64,
        add_extra_convs=False,
        num_outs=3,
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        # Digits are 15 to 70 pixels high and taller than they are wide.
        anchor_generator=dict(
            octave_base_scale=3, ratios=[1.0, 1.6, 2.5], strides=[8, 16, 32]
        ),
    ),
)
