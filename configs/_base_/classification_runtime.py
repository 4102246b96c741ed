_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(
    # The official code also keeps the checkpoint with the best top-1.
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook'),
)
visualizer = dict(
    type='UniversalVisualizer', vis_backends={{_base_.vis_backends}}
)
