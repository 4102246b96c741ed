# Handwritten digits on photographs, 128 x 128, with boxes and masks. The
# dataset is generated if it is missing. There is no random flip because a
# mirrored digit is not a valid digit.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # Most scenes are light digits on dark photographs. Invert half of them.
    dict(type='mmpretrain.Invert', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # Does not change the image, but sets scale_factor for mmdet.
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
        ),
    ),
]

train_dataloader = dict(
    batch_size=8,
    # On two cores, a worker process would slow down training by more than
    # the time to load a batch.
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='DigitScenesCoco',
        data_root='data/digit-scenes',
        ann_file='instances_training.json',
        data_prefix=dict(img='images/training'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='DigitScenesCoco',
        data_root='data/digit-scenes',
        ann_file='instances_validation.json',
        data_prefix=dict(img='images/validation'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file='data/digit-scenes/instances_validation.json',
    metric='bbox',
)
test_evaluator = val_evaluator
