# Feature reduction ratio 8.
_base_ = './vvt-tiny-fr1_8xb128_cifar100.py'

model = dict(backbone=dict(arch=dict(fr_ratios=[8, 8, 8, 8])))
