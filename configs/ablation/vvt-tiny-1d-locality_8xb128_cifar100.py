# Locality along the flattened sequence of tokens.
_base_ = '../classification/vvt-tiny_8xb128_cifar100.py'

model = dict(backbone=dict(attn_cfg=dict(locality='1d')))
