# Mask R-CNN with VVT-large on COCO, 12 epochs, with the settings of Swin.
_base_ = [
    '../_base_/models/mask-rcnn_vvt_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_detection_1x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.3,
        with_cp=True,  # False is faster but uses more memory
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-large_in1k.pth',
            prefix='backbone.',
        ),
    )
)
