# Fine-tuning at a larger size; the recipe is ours. AdamW at a fiftieth of the
# rate of pre-training, lr 1e-5 * batch / 512 (batch 1024 = 8 x 128), next to
# no weight decay, 30 epochs of cosine without warm-up.
_base_ = './adamw_cosine_300e.py'

optim_wrapper = dict(optimizer=dict(lr=1e-5 * 1024 / 512, weight_decay=1e-8))
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        by_epoch=True,
        end=30,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(max_epochs=30)
