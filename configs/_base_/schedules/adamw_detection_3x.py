# 3x schedule: 36 epochs, learning rate divided by 10 at epochs 27 and 33.
_base_ = './adamw_detection_1x.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        end=36,
        milestones=[27, 33],
        gamma=0.1,
    ),
]
train_cfg = dict(max_epochs=36)
