# Feature reduction ratio 4.
_base_ = './vvt-tiny-fr1_8xb128_cifar100.py'

model = dict(backbone=dict(arch=dict(fr_ratios=[4, 4, 4, 4])))
