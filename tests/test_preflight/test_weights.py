"""Tests of the weights from which training starts, for all three tasks."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmvvt.apis import Predictor
from mmvvt.errors import CheckpointError, UserError
from mmvvt.preflight import (
    build_model,
    check_checkpoint,
    check_testing,
    check_training,
    read_config,
)
from mmvvt.preflight.weights import describe_initial_weights

ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
BACKBONE = dict(type='VVT', arch=ARCH)
CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(BACKBONE),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=40),
)
SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor'),
    backbone=dict(BACKBONE),
    decode_head=dict(
        type='FCNHead', num_classes=3, in_channels=40, channels=8
    ),
)
DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict(BACKBONE, out_indices=(1, 2, 3)),
    neck=dict(
        type='FPN', in_channels=[24, 32, 40], out_channels=8, num_outs=3
    ),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[1.0],
            strides=[8, 16, 32],
        ),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0.0,
        ),
        sampler=dict(type='PseudoSampler'),
    ),
)
TASKS = {'mmpretrain': CLASSIFIER, 'mmseg': SEGMENTOR, 'mmdet': DETECTOR}


@pytest.fixture(scope='module')
def state():
    """Tensors of a backbone with the names of a converted checkpoint."""
    torch.manual_seed(0)
    cfg = read_config(Config(dict(default_scope='mmpretrain', model=BACKBONE)))
    model = build_model(cfg)
    return {f'backbone.{k}': v for k, v in model.state_dict().items()}


def official(state):
    bare = {key[len('backbone.') :]: tensor for key, tensor in state.items()}
    return {
        **bare,
        'head.weight': torch.ones(9, 40),
        'head.bias': torch.ones(9),
    }


def notes(scope, path=None, **settings):
    """Lines of the log about the initial weights, or the error."""
    cfg = Config(dict(default_scope=scope, model=TASKS[scope], **settings))
    if path is not None:
        cfg.load_from = str(path)
    cfg = read_config(cfg)
    try:
        return describe_initial_weights(cfg, build_model(cfg))
    except UserError as error:
        assert '\n' not in str(error)
        return str(error)


@pytest.fixture(params=['mmpretrain', 'mmseg', 'mmdet'])
def scope(request):
    pytest.importorskip(request.param)
    return request.param


def with_init_cfg(scope, path, prefix='backbone.'):
    model = dict(TASKS[scope])
    model['backbone'] = dict(
        model['backbone'],
        init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix=prefix),
    )
    cfg = read_config(Config(dict(default_scope=scope, model=model)))
    try:
        return describe_initial_weights(cfg, build_model(cfg))
    except UserError as error:
        assert '\n' not in str(error)
        return str(error)


@pytest.mark.parametrize('nested', [True, False])
def test_an_official_file_is_refused(scope, state, tmp_path, nested):
    path = tmp_path / 'vvt_tiny_224.pth'
    content = official(state)
    torch.save(dict(model=content, epoch=299) if nested else content, path)
    expected = (
        'it is an official checkpoint that has not been converted; convert '
        'it with tools/model_converters/official_to_mmvvt.py'
    )
    assert notes(scope, path) == (
        f'load_from={path} has no weights for the backbone, which would '
        f'start from random weights: {expected}'
    )
    line = with_init_cfg(scope, path)
    assert line.startswith(f'the pretrained backbone in {path} does not match')
    assert line.endswith(expected)


def test_names_without_backbone(scope, state, tmp_path):
    path = tmp_path / 'backbone.pth'
    torch.save({k[len('backbone.') :]: t for k, t in state.items()}, path)
    assert notes(scope, path).endswith(
        "its names lack 'backbone.'; load it with model.backbone.init_cfg="
        "dict(type='Pretrained', checkpoint='FILE')"
    )
    assert with_init_cfg(scope, path).endswith(
        "its names lack 'backbone.'; leave out 'prefix'"
    )
    assert with_init_cfg(scope, path, prefix=None) == []


def test_a_part_of_the_model(scope, state, tmp_path):
    path = tmp_path / 'converted.pth'
    torch.save(dict(state_dict=state), path)
    (line,) = notes(scope, path)
    assert f'has {len(state)} of ' in line
    head = dict(mmpretrain='head.fc.weight', mmseg='decode_head.conv_seg')
    assert head.get(scope, 'neck.lateral_convs.0') in line
    assert '(not in the file)' in line and 'backbone' not in line
    assert with_init_cfg(scope, path) == []
    assert with_init_cfg(scope, path, prefix=None).endswith(
        "its names start with 'backbone.'; set prefix='backbone.'"
    )


@pytest.mark.parametrize(
    'surplus',
    [
        'block3.1.attn.q_proj.weight',  # a deeper network
        'block1.0.attn.sr.weight',
        'patch_embed5.proj.weight',
        'norm5.weight',
    ],
)
def test_a_larger_backbone(scope, state, tmp_path, surplus):
    """The tensors that both have may have the same shapes."""
    larger = {**state, f'backbone.{surplus}': torch.ones(3)}
    path = tmp_path / 'larger.pth'
    torch.save(dict(state_dict=larger), path)
    reason = (
        'does not match the architecture of the model: 1 tensors of the '
        'backbone are not in the model; for example, '
    )
    expected = f'{reason}backbone.{surplus}'
    assert notes(scope, path) == f'load_from={path} {expected}'
    assert with_init_cfg(scope, path) == (
        f'the pretrained backbone in {path} {reason}{surplus}'
    )
    bare = tmp_path / 'bare.pth'
    torch.save({k[len('backbone.') :]: t for k, t in larger.items()}, bare)
    assert with_init_cfg(scope, bare, prefix=None).endswith(reason + surplus)

    cfg = read_config(Config(dict(default_scope=scope, model=TASKS[scope])))
    model = build_model(cfg)
    torch.save({**model.state_dict(), **larger}, path)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(str(path), model)
    assert str(caught.value) == f'the checkpoint {path} {expected}'
    # Tensors outside of the backbone may be left out.
    torch.save({**model.state_dict(), 'auxiliary.block9.0': larger}, path)
    check_checkpoint(str(path), model)


def test_a_head_of_another_size(state, tmp_path):
    path = tmp_path / 'classifier.pth'
    head = {
        'head.fc.weight': torch.ones(9, 40),
        'head.fc.bias': torch.ones(9),
    }
    torch.save(dict(state_dict={**state, **head}), path)
    total = len(state) + 2
    assert notes('mmpretrain', path) == [
        f'load_from={path} has {len(state)} of {total} tensors of the model; '
        'these start from random weights: head.fc.weight, head.fc.bias '
        '(different shape, such as (9, 40) instead of (3, 40))'
    ]
    head = {'head.fc.weight': torch.ones(3, 40), 'head.fc.bias': torch.ones(3)}
    torch.save(dict(state_dict={**state, **head}), path)
    assert notes('mmpretrain', path) == []
    # As saved by a distributed model
    module = {f'module.{k}': t for k, t in {**state, **head}.items()}
    torch.save(dict(state_dict=module), path)
    assert notes('mmpretrain', path) == []


def test_other_files(state, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict={'layer1.weight': torch.ones(3)}), path)
    assert notes('mmpretrain', path).endswith('its names are layer1.weight')
    narrow = {k: t[..., :1] for k, t in state.items()}
    torch.save(dict(state_dict=narrow), path)
    assert 'the architecture differs, backbone.' in notes('mmpretrain', path)
    torch.save(dict(state_dict={}), path)
    assert 'it has no tensors' in notes('mmpretrain', path)


def test_channels_of_the_checkpoint(state, tmp_path):
    path = tmp_path / 'four.pth'
    weight = state['backbone.patch_embed1.proj.weight']
    four = torch.cat([weight, weight[:, :1]], dim=1)
    state = {**state, 'backbone.patch_embed1.proj.weight': four}
    torch.save(dict(state_dict=state), path)
    assert with_init_cfg('mmpretrain', path).endswith(
        '; to convert a checkpoint of 4 input channels to 3, use '
        'tools/model_converters/inflate_input.py'
    )
    (line,) = notes('mmpretrain', path)
    assert 'to convert a checkpoint of 4 input channels to 3' in line


def test_before_pytorch_2_6(state, tmp_path, monkeypatch):
    """Files of tensors are checked; others can be read by the runner only."""
    from mmvvt.preflight import weights

    path, broken = tmp_path / 'official.pth', tmp_path / 'broken.pth'
    torch.save(official(state), path)
    broken.write_bytes(b'not a checkpoint')
    monkeypatch.setattr(weights, 'READS_RUNNER_CHECKPOINTS', False)
    assert 'has not been converted' in notes('mmpretrain', path)
    assert notes('mmpretrain', broken) == []
    monkeypatch.setattr(weights, 'READS_RUNNER_CHECKPOINTS', True)
    assert str(broken) in notes('mmpretrain', broken)


def test_random_weights_are_mentioned(scope):
    assert notes(scope) == [
        'the model starts from random weights: neither load_from nor an '
        'init_cfg names a checkpoint'
    ]
    assert notes(scope, resume=True) == []


# -- LoRA ---------------------------------------------------------------------


def lora(folder, checkpoint):
    """Config of a classifier with LoRA and images of three classes."""
    for name in 'abc':
        (folder / 'images' / name).mkdir(parents=True, exist_ok=True)
        image = np.full((40, 40, 3), 99, np.uint8)
        cv2.imwrite(str(folder / 'images' / name / '0.png'), image)
    module = dict(BACKBONE)
    if checkpoint is not None:
        module['init_cfg'] = dict(
            type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.'
        )
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CustomDataset',
            data_root=str(folder / 'images'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=(32, 32)),
                dict(type='PackInputs'),
            ],
        ),
    )
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                CLASSIFIER,
                backbone=dict(
                    type='LoRAModel',
                    module=module,
                    rank=2,
                    alpha=2,
                    targets=[dict(type='q_proj')],
                ),
            ),
            train_dataloader=loader,
            test_dataloader=loader,
        )
    )


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_frozen_weights_of_lora(state, tmp_path):
    good, bad = tmp_path / 'good.pth', tmp_path / 'official.pth'
    torch.save(dict(state_dict=state), good)
    torch.save(dict(model=official(state)), bad)
    cfg = lora(tmp_path, good)
    assert check_training(read_config(cfg)) == []
    run = tmp_path / 'run.pth'
    model = build_model(read_config(cfg))
    torch.save(dict(state_dict=model.state_dict()), run)
    # What a run saves does not include the frozen weights.
    assert not any('norm1' in key for key in model.state_dict())
    assert check_testing(read_config(cfg), str(run)) == []
    image = str(tmp_path / 'images/a/0.png')
    assert len(Predictor(cfg, str(run), 'cpu')(image)['scores']) == 3

    for checkpoint, message in (
        (None, 'keeps the weights of model.backbone.module frozen, but they'),
        (tmp_path / 'no.pth', f'no such pretrained checkpoint: {tmp_path}'),
        (bad, 'an official checkpoint that has not been converted'),
    ):
        cfg = lora(tmp_path, checkpoint)
        assert message in error_of(check_training, read_config(cfg))
        assert message in error_of(check_testing, read_config(cfg), str(run))
        assert message in error_of(Predictor, cfg, str(run), 'cpu')

    # load_from has the frozen weights under names that do not exist.
    cfg = lora(tmp_path, good)
    cfg.load_from = str(good)
    assert error_of(check_training, read_config(cfg)).endswith(
        'the frozen weights of LoRAModel are loaded with '
        'model.backbone.module.init_cfg'
    )
