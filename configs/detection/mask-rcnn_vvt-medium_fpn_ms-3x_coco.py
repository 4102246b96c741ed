# Mask R-CNN with VVT-medium on COCO, 36 epochs of multi-scale training.
_base_ = [
    '../_base_/models/mask-rcnn_vvt_fpn.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/adamw_detection_3x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        arch='medium',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-medium_in1k.pth',
            prefix='backbone.',
        ),
    )
)
