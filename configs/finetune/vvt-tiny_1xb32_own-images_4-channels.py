# As vvt-tiny_1xb32_own-images.py, for images with four channels of 16 bits,
# such as red, green, blue and near infrared, in PNG or TIFF files. OpenCV
# loads them in the order blue, green, red, fourth. Convert the checkpoint:
#     python tools/model_converters/inflate_input.py \
#         pretrained/vvt-tiny_in1k.pth pretrained/vvt-tiny_in1k_bgrx.pth \
#         --in-channels 4 --rgb 2 1 0
_base_ = './vvt-tiny_1xb32_own-images.py'

data_root = 'data/own-images'
pretrained = 'pretrained/vvt-tiny_in1k_bgrx.pth'

model = dict(
    backbone=dict(in_channels=4, init_cfg=dict(checkpoint=pretrained))
)
# One value for each channel, in the order of loading: those of ImageNet times
# 257, because 8 bits end at 255 and 16 bits at 65 535, and the middle of the
# range for the fourth. Better are those of your images.
data_preprocessor = dict(
    mean=[26607.2, 29884.0, 31784.5, 32767.5],
    std=[14745.4, 14679.8, 15007.5, 14745.4],
    to_rgb=False,
)

# Transforms with Pillow, and those of colours, require three channels of 8
# bits. These use OpenCV.
load = dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True)
train_pipeline = [
    load,
    dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.35, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    load,
    dict(type='ResizeEdge', scale=256, edge='short'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
extensions = ('.png', '.tif', '.tiff')
train_dataloader = dict(
    dataset=dict(
        data_root=data_root, extensions=extensions, pipeline=train_pipeline
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root, extensions=extensions, pipeline=test_pipeline
    )
)
test_dataloader = val_dataloader
