# RetinaNet with VVT-tiny on COCO, 12 epochs, with the settings of PVT.
_base_ = [
    '../_base_/models/retinanet_vvt_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/pvt_retinanet_1x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-tiny_in1k.pth',
            prefix='backbone.',
        ),
    )
)
