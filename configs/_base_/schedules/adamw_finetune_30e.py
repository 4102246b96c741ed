# Fine-tuning at a higher resolution, with our own settings: AdamW, learning
# rate 1e-5 * batch size / 512 (batch size 1024 = 8 x 128), which is 1/50 of
# pre-training, very small weight decay, 30 epochs of cosine annealing without
# warm-up. The number of epochs and the weight decay are those with which Swin
# is fine-tuned at 384 x 384.
_base_ = './adamw_cosine_300e.py'

optim_wrapper = dict(optimizer=dict(lr=1e-5 * 1024 / 512, weight_decay=1e-8))
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.05,  # 1e-6
        by_epoch=True,
        end=30,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(max_epochs=30)
