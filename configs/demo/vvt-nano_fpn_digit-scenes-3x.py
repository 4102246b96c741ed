# The demo with three times as many iterations and labels of twice the
# resolution. The labels of the short run have too little detail at the edges
# of the strokes for longer training.
_base_ = './vvt-nano_fpn_digit-scenes.py'

train_pipeline = _base_.train_pipeline
train_pipeline[4].transforms[0].scale = (48, 48)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

iterations = 7200
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=2e-3,
        by_epoch=False,
        begin=50,
        end=iterations,
    ),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations))
