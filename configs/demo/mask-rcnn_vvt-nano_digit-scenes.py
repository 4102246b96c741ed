# Mask R-CNN on a small VVT: as the RetinaNet demo, with masks.
_base_ = [
    '../_base_/models/mask-rcnn_vvt-nano.py',
    '../_base_/datasets/digit_scenes_coco.py',
    '../_base_/detection_runtime.py',
]
custom_imports = dict(
    imports=['mmvvt', 'mmvvt.datasets.digit_scenes_coco'])

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/vvt-nano_digits/epoch_30.pth',
            prefix='backbone.')))

iterations = 1400
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=False,
        begin=100,
        end=iterations),
]
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=8)

val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False, interval=iterations, max_keep_ckpts=1,
        save_best=None))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
