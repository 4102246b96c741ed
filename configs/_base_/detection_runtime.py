_base_ = './default_runtime.py'

default_scope = 'mmdet'
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(save_best='coco/bbox_mAP'),
    visualization=dict(type='DetVisualizationHook'),
)
visualizer = dict(
    type='DetLocalVisualizer',
    # browse_dataset.py of mmseg and mmdet needs a name.
    name='visualizer',
    vis_backends={{_base_.vis_backends}},
)
