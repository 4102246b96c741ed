# RetinaNet with VVT-large on COCO, 12 epochs, with the settings of PVT.
_base_ = [
    '../_base_/models/retinanet_vvt_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/pvt_retinanet_1x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.1,
        with_cp=True,  # False is faster but uses more memory
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-large_in1k.pth',
            prefix='backbone.',
        ),
    )
)
