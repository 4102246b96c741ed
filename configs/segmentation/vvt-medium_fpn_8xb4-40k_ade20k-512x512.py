# Semantic FPN with VVT-medium on ADE20K at 512 x 512, with the settings of
# PVT.
_base_ = [
    '../_base_/models/fpn_vvt.py',
    '../_base_/datasets/ade20k_512x512_pvt.py',
    '../_base_/schedules/pvt_fpn_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='medium',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-medium_in1k.pth',
            prefix='backbone.',
        ),
    ),
)
