# Fine-tune Semantic FPN with VVT-tiny on your own images and masks:
#     data/own-masks/images/train/NAME.jpg, data/own-masks/images/val/NAME.jpg
#     data/own-masks/masks/train/NAME.png, data/own-masks/masks/val/NAME.png
# A mask has one channel of 8 bits with the index of the class of each pixel:
# 0 for the first class, 1 for the second and so on. Pixels with 255 are
# ignored.
_base_ = [
    '../_base_/models/fpn_vvt.py',
    '../_base_/schedules/adamw_layer_decay_20e.py',
    '../_base_/segmentation_runtime.py',
]

data_root = 'data/own-masks'
metainfo = dict(
    classes=('background', 'object'), palette=[[0, 0, 0], [220, 20, 60]]
)
img_suffix = '.jpg'
pretrained = 'pretrained/vvt-tiny_in1k.pth'  # a converted checkpoint

num_classes = len(metainfo['classes'])
crop_size = (512, 512)

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.'
        ),
    ),
    decode_head=dict(num_classes=num_classes, norm_cfg=dict(type='BN')),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=num_classes),
    dict(
        type='RandomResize',
        scale=(2048, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    # Load labels after Resize: evaluation uses their original size.
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=num_classes),
    dict(type='PackSegInputs'),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=False,
    worker_init_fn=dict(type='seed_worker'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
        img_suffix=img_suffix,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
        img_suffix=img_suffix,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=4)
# Epochs, and not iterations as for the large datasets.
log_processor = dict(by_epoch=True)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(
        by_epoch=True, interval=1, max_keep_ckpts=1, save_best='mIoU'
    ),
)
