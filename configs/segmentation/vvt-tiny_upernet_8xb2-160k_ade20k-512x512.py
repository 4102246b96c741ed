# UperNet with VVT-tiny on ADE20K at 512 x 512, with the settings of Swin. The
# paper has no result for this model.
_base_ = [
    '../_base_/models/upernet_vvt.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/swin_upernet_160k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-tiny_in1k.pth',
            prefix='backbone.',
        ),
    ),
)
# 8 GPUs with 2 images each
train_dataloader = dict(batch_size=2)
