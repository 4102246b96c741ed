# UperNet with VVT-medium on Cityscapes, crop size 1024 x 1024. The settings
# are those of Swin, with batch size 8 and 80 000 iterations. The paper has no
# results on Cityscapes.
_base_ = [
    '../_base_/models/upernet_vvt.py',
    '../_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/schedules/swin_upernet_80k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    backbone=dict(
        arch='medium',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-medium_in1k.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    # Sliding-window inference with the crop size of training.
    test_cfg=dict(mode='slide', crop_size=(1024, 1024), stride=(512, 512)),
)
