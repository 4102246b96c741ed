# RetinaNet with VVT-nano: handwritten digits on photographs, for two CPU
# cores. The backbone is initialized from the checkpoint of the classification
# demo.
_base_ = [
    '../_base_/models/retinanet_vvt-nano.py',
    '../_base_/datasets/digit_scenes_coco.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/detection_runtime.py',
]
custom_imports = dict(imports=['mmvvt', 'mmvvt.datasets.digit_scenes_coco'])

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/vvt-nano_digits/epoch_30.pth',
            prefix='backbone.',
        )
    )
)

default_hooks = dict(
    checkpoint=dict(
        by_epoch=False,
        interval={{_base_.iterations}},
        max_keep_ckpts=1,
        save_best=None,
    )
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
