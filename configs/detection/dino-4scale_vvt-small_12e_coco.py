# DINO with VVT-small on COCO, 12 epochs.
_base_ = [
    '../_base_/models/dino_vvt.py',
    '../_base_/datasets/coco_detection_multiscale.py',
    '../_base_/schedules/dino_12e.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='pretrained/vvt-small_in1k.pth',
            prefix='backbone.',
        ),
    )
)
