# A small Mask R-CNN with VVT-nano, for the demo.
_base_ = './mask-rcnn_vvt_fpn.py'

model = dict(
    backbone=dict(
        arch=dict(
            embed_dims=[32, 64, 96, 128],
            num_heads=[1, 2, 3, 4],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
        )
    ),
    neck=dict(in_channels=[32, 64, 96, 128], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(
            scales=[4], ratios=[1.0, 1.6, 2.5], strides=[4, 8, 16, 32]
        ),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10
        ),
    ),
    # A scene contains at most five digits.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)
    ),
)
