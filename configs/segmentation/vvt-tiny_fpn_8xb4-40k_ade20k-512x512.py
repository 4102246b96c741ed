# Semantic FPN with VVT-tiny on ADE20K at 512 x 512, with the settings of PVT.
# The paper has no result for this model.
_base_ = [
    '../_base_/models/fpn_vvt.py',
    '../_base_/datasets/ade20k_512x512_pvt.py',
    '../_base_/schedules/pvt_fpn_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-tiny_in1k.pth',
            prefix='backbone.',
        ),
    ),
)
