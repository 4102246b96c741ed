_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(visualization=dict(type='VisualizationHook'))
visualizer = dict(
    type='UniversalVisualizer', vis_backends={{_base_.vis_backends}})
# With seed_worker and no persistent workers in the train loader: a resumed
# run ends with the weights of an unbroken one.
custom_hooks = [dict(type='EpochSeedHook')]
