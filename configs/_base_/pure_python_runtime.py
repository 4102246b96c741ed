# The runtime settings of pure Python configs: each type is a class.
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import (
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim.optimizer import OptimWrapper
from mmengine.visualization import LocalVisBackend
from torch.optim import AdamW

from mmvvt.engine import (
    EpochSeedHook,
    MeanLossHook,
    MergedOptimWrapperConstructor,
    SafeCheckpointHook,
)

# Classes need no scope.
default_scope = None
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=SafeCheckpointHook, interval=1, max_keep_ckpts=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [dict(type=EpochSeedHook), dict(type=MeanLossHook)]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type=LocalVisBackend)]
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    constructor=MergedOptimWrapperConstructor,
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)

rgb = dict(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
)
shuffled = dict(type=DefaultSampler, shuffle=True)
in_order = dict(type=DefaultSampler, shuffle=False)
endless = dict(type=InfiniteSampler, shuffle=True)
arch = dict(
    embed_dims=[32, 64, 96, 128],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[4, 4, 4, 4],
    depths=[1, 1, 2, 1],
)
