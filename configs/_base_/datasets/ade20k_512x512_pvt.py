# Overrides ade20k_512x512.py with the evaluation of PVT: the sides of the
# resized image are rounded up to multiples of 32, and the image is resized to
# this size. It is not padded.
_base_ = './ade20k_512x512.py'

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    # Load labels after Resize: evaluation uses their original size.
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=150),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Six scales, each with and without horizontal flip.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(
                    type='Resize',
                    scale=(2048 * size // 512, size),
                    keep_ratio=True,
                )
                for size in (256, 384, 512, 640, 768, 896)
            ],
            [dict(type='ResizeToMultiple', size_divisor=32)],
            [
                dict(type='RandomFlip', prob=0.0),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='CheckLabels', num_classes=150)],
            [dict(type='PackSegInputs')],
        ],
    ),
]
