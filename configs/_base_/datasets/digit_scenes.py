# Handwritten digits on photographs, 128 x 128. The dataset is generated if it
# is missing. Images are resized to 96 x 96, so that digits are about as large
# as in pre-training (32 pixels).
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    # OpenCV takes a quarter of the time of the default, Pillow.
    dict(type='LoadAnnotations', imdecode_backend='cv2'),
    dict(type='CheckLabels', num_classes=11),
    # Resize labels to the resolution of the decode head's output. At a higher
    # resolution, the losses take a third of the time of a step. Pillow samples
    # the central pixel; OpenCV samples a pixel to its upper left, which would
    # shift the strokes.
    dict(
        type='KeyMapper',
        mapping=dict(img='gt_seg_map'),
        auto_remap=True,
        transforms=[
            dict(
                type='Resize',
                scale=(24, 24),
                keep_ratio=True,
                interpolation='nearest',
                backend='pillow',
            )
        ],
    ),
    # Most scenes are light digits on dark photographs. Invert some of them.
    dict(type='mmpretrain.Invert', prob=0.2),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# Load labels after Resize: evaluation uses their original size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=11),
    dict(type='PackSegInputs'),
]

train_dataloader = dict(
    batch_size=8,
    # Loading a batch takes a tenth of the time of a step. On two cores, a
    # worker process would slow down training by more than that.
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='DigitScenes',
        data_root='data/digit-scenes',
        split='train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='DigitScenes',
        data_root='data/digit-scenes',
        split='val',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# Three scales without flip: a mirrored digit is not a valid digit.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(size, size), keep_ratio=True)
                for size in (84, 96, 108)
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='CheckLabels', num_classes=11)],
            [dict(type='PackSegInputs')],
        ],
    ),
]
