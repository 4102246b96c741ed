# VVT-tiny on ImageNet-1K at 224 x 224, as in the official code: drop path
# rate 0.1, no gradient clipping, no EMA. Other settings are in the base
# configs.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/imagenet_vvt_224.py',
    '../_base_/schedules/adamw_cosine_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1))
