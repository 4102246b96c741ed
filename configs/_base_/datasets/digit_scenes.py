# Handwritten digits on photographs, 128 x 128; written where absent. They are
# shrunk to 96 x 96, where digits are about as large as those that the backbone
# has learnt, 32 pixels.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    # a quarter of the time that the default, Pillow, takes
    dict(type='LoadAnnotations', imdecode_backend='cv2'),
    dict(type='CheckLabels', num_classes=11),
    # Labels at the stride of the head's output: with larger ones the losses
    # are a third of a step. Pillow takes the pixel in the middle; OpenCV's one
    # is to the upper left of it, which shifts the strokes.
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
    # Most photographs are dark, and so the ink is light: sometimes the other
    # way round.
    dict(type='mmpretrain.Invert', prob=0.2),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# Labels after the resizing: they are compared with at full size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=11),
    dict(type='PackSegInputs'),
]

train_dataloader = dict(
    batch_size=8,
    # A batch is loaded in a tenth of the time of a step: on two cores a
    # process of its own would slow the steps by more.
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

# Three sizes; no mirrored ones, since digits do not look alike in a mirror.
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
