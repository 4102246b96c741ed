# As the 160k schedule, with 80 000 iterations and batch size 8 (8 x 1). Swin
# has no recipe for Cityscapes; these two numbers are ours.
_base_ = './swin_upernet_160k.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=1500),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=1500,
        end=80000,
    ),
]
train_cfg = dict(max_iters=80000, val_interval=8000)

auto_scale_lr = dict(base_batch_size=8)
