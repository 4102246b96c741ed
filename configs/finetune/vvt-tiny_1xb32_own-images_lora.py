# As vvt-tiny_1xb32_own-images.py, with LoRA: the weights of the backbone stay
# frozen, and only low-rank additions to the linear layers of the attention and
# the head are trained.
_base_ = './vvt-tiny_1xb32_own-images.py'

pretrained = 'pretrained/vvt-tiny_in1k.pth'  # a converted checkpoint

model = dict(
    backbone=dict(
        _delete_=True,
        type='LoRAModel',
        module=dict(
            type='VVT',
            arch='tiny',
            drop_path_rate=0.1,
            init_cfg=dict(
                type='Pretrained', checkpoint=pretrained, prefix='backbone.'
            ),
        ),
        rank=8,
        alpha=16,
        drop_rate=0.0,
        targets=[
            dict(type='q_proj'),
            dict(type='k_proj'),
            dict(type='v_proj'),
            dict(type='out_proj'),
        ],
    )
)

# All trained layers start at zero or random weights: no layer-wise decay.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(layer_decay_rate=1.0)
)
