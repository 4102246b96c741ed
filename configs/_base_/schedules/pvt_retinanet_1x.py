# Settings of PVT for RetinaNet, 12 epochs: AdamW, learning rate 1e-4 for batch
# size 16 (8 x 2), weight decay 1e-4 for all parameters, warm-up of 500
# iterations, learning rate divided by 10 at epochs 8 and 11. Mixed precision
# is ours.
_base_ = './adamw_detection_1x.py'

optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-4), paramwise_cfg=dict(_delete_=True)
)
