# VVT-tiny trained from scratch on CIFAR-100, resized to 224 x 224, with the
# settings for ImageNet-1K. The paper does not state which model it used for
# its ablation study on CIFAR-100.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/cifar100_vvt_224.py',
    '../_base_/schedules/adamw_cosine_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1), head=dict(num_classes=100)
)
