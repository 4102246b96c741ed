_base_ = './default_runtime.py'

default_scope = 'mmseg'
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(by_epoch=False, interval=8000, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook', interval=1),
)
log_processor = dict(by_epoch=False)
visualizer = dict(
    type='SegLocalVisualizer',
    # browse_dataset.py of mmseg and mmdet needs a name.
    name='visualizer',
    vis_backends={{_base_.vis_backends}},
)
tta_model = dict(type='SegTTAModel')
