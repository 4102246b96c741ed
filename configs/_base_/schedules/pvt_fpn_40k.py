# Semantic FPN settings of PVT: AdamW, learning rate 2e-4, weight decay 1e-4
# for all parameters, polynomial decay with power 0.9 over 40 000 iterations,
# batch size 32 (8 x 4). Mixed precision is ours.
optim_wrapper = dict(
    type='AutoAmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4),
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, end=40000)
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(base_batch_size=32)
