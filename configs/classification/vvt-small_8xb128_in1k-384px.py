# VVT-small fine-tuned at 384 x 384 from the checkpoint trained at 224 x 224,
# which must be converted. Use another file with --cfg-options load_from=PATH.
# The paper reports the result but not the settings, so these are our own.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/imagenet_vvt_384.py',
    '../_base_/schedules/adamw_finetune_30e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
load_from = 'pretrained/vvt-small_in1k.pth'
