# Feature reduction ratio 8.
_base_ = '../classification/vvt-tiny_8xb128_cifar100.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[96, 160, 320, 512],
            num_heads=[1, 2, 5, 8],
            mlp_ratios=[8, 8, 4, 4],
            depths=[2, 2, 2, 2],
            fr_ratios=[8, 8, 8, 8],
        )
    )
)
