"""mmpretrain's LoRA on a VVT: the fast paths notice wrapped layers."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from mmvvt.models import strips
from mmvvt.models.vvt import VVTBlock
from mmvvt.ops.strips import common

from conftest import build_model, relative_error

pytest.importorskip('mmpretrain')

ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[4, 4, 2, 2],
    depths=[1, 1, 1, 1],
)
SIZE = 96  # pixels
LINEAR = ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2']


@pytest.fixture(autouse=True)
def _small_images_run_in_strips(monkeypatch):
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 1)
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', 64 * 8)


def wrap(backbone, targets):
    """Return a LoRAModel of a copy of a backbone, with random additions."""
    model = build_model(
        dict(
            type='LoRAModel',
            module=dict(type='VVT', arch=ARCH, out_indices=(0, 1, 2, 3)),
            rank=2,
            alpha=4,
            targets=[dict(type=name) for name in targets],
        )
    )
    state = {}
    for key in model.module.state_dict():
        plain = key.replace('.original_layer.', '.')
        if '.lora_' not in key:
            state[key] = backbone.state_dict()[plain]
    model.module.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        if '.lora_up' in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def merged(backbone, model):
    """Return a plain VVT with the weights of W + (alpha / rank) * B A."""
    plain = copy.deepcopy(backbone)
    for name, layer in model.module.named_modules():
        if type(layer).__name__ == 'LoRALinear':
            with torch.no_grad():
                plain.get_submodule(name).weight += layer.scaling * (
                    layer.lora_up.weight @ layer.lora_down.weight
                )
    return plain


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    model = MODELS.build(dict(type='VVT', arch=ARCH, out_indices=(0, 1, 2, 3)))
    model.init_weights()
    return model


@pytest.mark.parametrize(
    'targets', [['q_proj'], ['fc2'], [r'.*attn\.(v|out)_proj'], LINEAR]
)
@pytest.mark.parametrize('training', [False, True])
def test_outputs_are_those_of_merged_weights(
    backbone, targets, training, monkeypatch
):
    """Wrapped layers are called; merged weights run in strips."""
    model = wrap(backbone, targets).train(training)
    plain = merged(backbone, model).train(training)
    image = torch.randn(1, 3, SIZE, SIZE)
    obstacles = []
    find = strips.find_obstacle
    monkeypatch.setattr(
        strips,
        'find_obstacle',
        lambda *args: obstacles.append(find(*args)) or obstacles[-1],
    )
    with torch.set_grad_enabled(training):
        actual = model(image)
        wrapped, obstacles[:] = list(obstacles), []
        expected = plain(image)
    assert obstacles[0] is None, 'too small for strips, tests nothing'
    assert 'added' in wrapped[0] or 'is a LoRALinear' in wrapped[0]
    for one, other in zip(actual, expected):
        assert relative_error(one, other) < 2e-5
    if not training:
        return
    loss = sum(feature.square().mean() for feature in actual)
    loss.backward()
    for name, parameter in model.named_parameters():
        trained = '.lora_' in name
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained, name
        if trained:
            assert parameter.grad.abs().max() > 0, name


def test_a_single_wrapped_block():
    """The result equals that of the layers, called one by one."""
    from mmpretrain.models.peft.lora import LoRALinear

    torch.manual_seed(0)
    block = VVTBlock(16, num_heads=1, mlp_ratio=4, fr_ratio=2, sr_ratio=1)
    x = torch.randn(1, 24 * 24, 16)
    assert strips.find_obstacle(block, x, (24, 24)) is None
    block.attn.q_proj = LoRALinear(block.attn.q_proj, alpha=2, rank=2)
    torch.nn.init.normal_(block.attn.q_proj.lora_up.weight)
    assert strips.find_obstacle(block, x, (24, 24)) is not None
    with torch.no_grad():
        y = x + block.attn(block.norm1(x), (24, 24))
        y = y + block.mlp(block.norm2(y), (24, 24))
        assert torch.equal(block(x, (24, 24)), y)


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_in_segmentors_and_detectors(scope):
    """Only the additions and the heads are trained and saved."""
    pytest.importorskip(scope)
    backbone = dict(
        type='mmpretrain.LoRAModel',
        module=dict(type='VVT', arch=ARCH, out_indices=(1, 2, 3)),
        rank=2,
        alpha=2,
        targets=[dict(type='q_proj')],
    )
    fpn = dict(type='FPN', in_channels=[24, 32, 40], out_channels=8)
    if scope == 'mmseg':
        cfg = dict(
            type='EncoderDecoder',
            backbone=backbone,
            neck=dict(fpn, num_outs=3),
            decode_head=dict(
                type='FCNHead', num_classes=3, in_channels=8, channels=8
            ),
        )
    else:
        head = dict(type='RetinaHead', num_classes=3, in_channels=8)
        cfg = dict(
            type='RetinaNet',
            backbone=backbone,
            neck=dict(fpn, num_outs=5),
            bbox_head=head,
        )
    model = build_model(cfg, scope)
    saved = {key for key in model.state_dict() if key.startswith('backbone.')}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert saved and all('.lora_' in key for key in saved)
    assert {n for n in trained if n.startswith('backbone.')} == saved
    assert any(n.startswith('neck.') for n in trained)
    assert any(n.startswith('neck.') for n in model.state_dict())
    features = model.extract_feat(torch.randn(1, 3, 64, 64))
    assert len(features) == cfg['neck']['num_outs']
