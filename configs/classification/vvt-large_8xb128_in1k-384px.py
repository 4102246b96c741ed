# VVT-large fine-tuned at 384 from its 224 checkpoint, to be named with
# --cfg-options load_from=PATH. The paper publishes the result but not the
# recipe: this one is ours.
_base_ = [
    '../_base_/models/vvt_classifier.py',
    '../_base_/datasets/imagenet_vvt_384.py',
    '../_base_/schedules/adamw_finetune_30e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='large', drop_path_rate=0.3, with_cp=True))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
