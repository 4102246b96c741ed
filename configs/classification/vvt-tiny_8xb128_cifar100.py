# VVT-tiny trained from scratch on CIFAR-100, resized to 224 x 224, as in the
# ablation studies of the paper. Other settings are the same as on ImageNet-1K.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/cifar100_vvt_224.py',
    '../_base_/schedules/adamw_cosine_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1), head=dict(num_classes=100)
)
