# VVT-medium on ImageNet-1K at 224 x 224, as in the official code: drop path
# rate 0.3, gradient clipping 1.0, no EMA. Other settings are in the base
# configs.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/imagenet_vvt_224.py',
    '../_base_/schedules/adamw_cosine_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='medium', drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
