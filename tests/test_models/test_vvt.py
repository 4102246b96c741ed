"""Tests of the backbone for all architectures."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from mmengine.registry import MODELS

from mmvvt.arch import resolve_arch
from mmvvt.checkpoint import official_shapes
from mmvvt.models import VVT, VicinityAttention
from mmvvt.ops import LOCALITIES, dispatch
from mmvvt.ops.strips import common

from conftest import relative_error

NANO = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 2, 1],
)
# Exact numbers of parameters, including a head with 1000 classes
PARAMETERS = dict(
    tiny=12882440, small=25492264, medium=47907304, large=61848520
)
ALL = (0, 1, 2, 3)


def nano(**options):
    model = VVT(NANO, **options)
    model.init_weights()
    return model


@pytest.mark.parametrize(
    'size', [(32, 32), (64, 96), (33, 47), (71, 45), (100, 32)]
)
def test_shapes(size):
    outs = nano(out_indices=ALL)(torch.randn(2, 3, *size))
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        assert out.shape == (
            2,
            NANO['embed_dims'][i],
            math.ceil(size[0] / stride),
            math.ceil(size[1] / stride),
        )


@pytest.mark.parametrize(
    'given,stages',
    [
        ((3,), [3]),
        (3, [3]),
        (-1, [3]),
        ((0, -1), [0, 3]),
        ((-4, -3, -2, -1), [0, 1, 2, 3]),
    ],
)
def test_out_indices(given, stages):
    x = torch.randn(1, 3, 32, 32)
    torch.manual_seed(1)
    every = nano(out_indices=ALL).eval()
    some = nano(out_indices=given)
    some.load_state_dict(every.state_dict())
    expected = [every(x)[i] for i in stages]
    outs = some.eval()(x)
    assert isinstance(outs, tuple) and len(outs) == len(expected)
    for out, want in zip(outs, expected):
        assert torch.equal(out, want)


@pytest.mark.parametrize('arch', PARAMETERS)
def test_published_architectures(arch):
    model = VVT(arch)
    head = 512 * 1000 + 1000
    assert (
        sum(p.numel() for p in model.parameters()) + head == PARAMETERS[arch]
    )
    expected = official_shapes(resolve_arch(arch), num_classes=1000)
    found = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    assert found == {
        k: shape for k, shape in expected.items() if not k.startswith('head.')
    }


@pytest.mark.parametrize('arch', ['tiny', 'large'])
def test_every_parameter_gets_a_finite_gradient(arch):
    model = VVT(arch, out_indices=ALL, drop_path_rate=0.0)
    model.init_weights()
    # The output of a LayerNorm sums to zero, but its square does not.
    sum(
        out.square().sum() for out in model(torch.randn(1, 3, 64, 48))
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('clamp', [True, False])
def test_every_locality(locality, clamp):
    model = nano(attn_cfg=dict(locality=locality, clamp=clamp))
    (out,) = model(torch.randn(1, 3, 64, 64))
    assert out.isfinite().all()


def test_localities_differ():
    x = torch.randn(1, 3, 96, 96)
    outs = {}
    state = nano().state_dict()
    for locality in LOCALITIES:
        model = nano(attn_cfg=dict(locality=locality)).eval()
        model.load_state_dict(state)
        (outs[locality],) = model(x)
    for a in LOCALITIES:
        for b in LOCALITIES:
            assert a == b or relative_error(outs[a], outs[b]) > 1e-5


def test_spatial_and_feature_reduction():
    arch = {**NANO, 'sr_ratios': [4, 2, 2, 1], 'fr_ratios': [1, 2, 4, 2]}
    model = VVT(arch, out_indices=ALL, attn_cfg=dict(se_ratio=2))
    model.init_weights()
    outs = model(torch.randn(2, 3, 75, 64))
    assert all(out.isfinite().all() for out in outs)
    assert model.block1[0].attn.sr.stride == (4, 4)
    assert model.block3[0].attn.q_proj.out_features == 6
    assert model.block3[0].attn.se_fc[0].out_features == 12


def test_spatial_reduction_needs_a_grid():
    model = VVT({**NANO, 'sr_ratios': [1, 1, 1, 2]})
    with pytest.raises(
        ValueError, match=r'sr_ratio 2 requires .* got \(1, 1\)'
    ):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('frozen', [-1, 0, 2, 3])
def test_frozen_stages(frozen):
    model = nano(
        frozen_stages=frozen,
        out_indices=ALL,
        drop_rate=0.5,
        drop_path_rate=0.5,
    )
    assert model.train() is model
    for i in ALL:
        for part in (f'patch_embed{i + 1}', f'block{i + 1}', f'norm{i + 1}'):
            for module in getattr(model, part).modules():
                assert module.training == (i > frozen), part
            for parameter in getattr(model, part).parameters():
                assert parameter.requires_grad == (i > frozen), part
    x = torch.randn(2, 3, 32, 32)
    if frozen >= 0:  # no dropout in frozen stages
        assert torch.equal(model(x)[frozen], model(x)[frozen])
    if frozen < 3:
        assert not torch.equal(model(x)[3], model(x)[3])


def test_checkpointing_equals_plain():
    x = torch.randn(2, 3, 64, 64)
    plain = nano(out_indices=ALL, drop_path_rate=0.3, drop_rate=0.1)
    cheap = nano(
        out_indices=ALL, drop_path_rate=0.3, drop_rate=0.1, with_cp=True
    )
    cheap.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, cheap):
        torch.manual_seed(5)  # drop the same paths
        outs = model(x)
        sum(out.square().sum() for out in outs).backward()
        results.append(
            (outs, {n: p.grad for n, p in model.named_parameters()})
        )
    for out, want in zip(results[1][0], results[0][0]):
        assert torch.equal(out, want)
    for name, grad in results[1][1].items():
        assert torch.equal(grad, results[0][1][name]), name


def test_checkpointing_recomputes_blocks():
    model = nano(with_cp=True)
    calls = []
    model.block1[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert len(calls) == 2


def test_drop_path_rises_to_its_rate():
    model = nano(drop_path_rate=0.4)
    rates = [
        block.drop_path.drop_prob
        for i in ALL
        for block in getattr(model, f'block{i + 1}')
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nano(out_indices=ALL)
    x = torch.randn(2, 3, 64, 80)
    exact = model(x)
    with torch.autocast('cpu', dtype=dtype):
        outs = model(x)
    for out, want in zip(outs, exact):
        assert out.isfinite().all()
        assert relative_error(out, want) < 0.05
    sum(out.float().square().sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_large_activations_in_half_precision(dtype):
    """Sums that exceed the range of float16 do not overflow."""
    attention = VicinityAttention(8, num_heads=1, fr_ratio=1)
    with torch.no_grad():
        for name in ('q_proj', 'k_proj', 'v_proj'):
            getattr(attention, name).weight.fill_(1.0)
            getattr(attention, name).bias.fill_(100.0)
        attention.out_proj.weight.fill_(0.1)
    x = torch.randn(1, 128 * 128, 8)
    exact = copy.deepcopy(attention).double()(x.double(), (128, 128))
    with torch.autocast('cpu', dtype=dtype):
        out = attention(x, (128, 128))
    assert out.isfinite().all()
    assert relative_error(out, exact) < 0.02


def test_channels_last():
    model = nano(out_indices=ALL).eval()
    x = torch.randn(2, 3, 64, 72)
    expected = model(x)
    outs = model.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last)
    )
    for out, want in zip(outs, expected):
        assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_tokens_are_a_view_of_the_convolution(memory_format):
    """Tokens share memory with the convolution in both memory formats."""
    embed = nano().patch_embed1
    inputs = {}
    embed.proj.register_forward_hook(
        lambda module, args, out: inputs.update(maps=out)
    )
    embed.norm.register_forward_pre_hook(
        lambda module, args: inputs.update(tokens=args[0])
    )
    embed(torch.randn(2, 3, 64, 40).to(memory_format=memory_format))
    assert inputs['tokens'].is_contiguous()
    assert inputs['tokens'].data_ptr() == inputs['maps'].data_ptr()


def test_compiles_in_one_graph():
    model = nano(out_indices=ALL)
    x = torch.randn(1, 3, 64, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    outs = compiled(x)
    for out, want in zip(outs, model(x)):
        assert relative_error(out, want) < 1e-5
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports(monkeypatch):
    """A model that runs in strips can be exported."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    model = nano(out_indices=ALL).eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        for out, want in zip(exported(x), model(x)):
            assert relative_error(out, want) < 1e-5


def test_initialisation():
    torch.manual_seed(0)
    model = VVT('tiny')
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            fan_out = (
                module.kernel_size[0] ** 2
                * module.out_channels
                / module.groups
            )
            assert module.weight.std().item() == pytest.approx(
                math.sqrt(2 / fan_out), rel=0.1
            )
            assert not module.bias.any()


def test_second_initialisation_leaves_the_weights():
    model = nano()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.warns(UserWarning, match='called more than once'):
        model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_pretrained_init_cfg(tmp_path):
    """A backbone loads the checkpoint of a classifier with a prefix."""
    source = nano()
    path = tmp_path / 'classifier.pth'
    state = {f'backbone.{k}': t for k, t in source.state_dict().items()}
    torch.save({'state_dict': {**state, 'head.fc.bias': torch.ones(3)}}, path)
    model = VVT(
        NANO,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        ),
    )
    model.init_weights()
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def forward_order(model):
    """Group the parameters: a list of prefixes in the order of forward."""
    prefixes = []
    for stage, blocks in enumerate(model.depths, start=1):
        prefixes.append(f'patch_embed{stage}.')
        prefixes += [f'block{stage}.{i}.' for i in range(blocks)]
        prefixes.append(f'norm{stage}.')
    return prefixes


@pytest.mark.parametrize('arch', [NANO, *PARAMETERS], ids=str)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth(arch, prefix):
    model = VVT(arch, frozen_stages=1)
    blocks = sum(model.depths)
    depths = {}
    for name, _ in model.named_parameters():
        depth, number = model.get_layer_depth(prefix + name, prefix)
        assert number == blocks + 2
        (module,) = (p for p in forward_order(model) if name.startswith(p))
        # All parameters of a block have the same depth.
        assert depths.setdefault(module, depth) == depth
    ordered = [depths[module] for module in forward_order(model)]
    assert ordered == sorted(ordered)
    # Every depth is used: no factor of the decay rate is skipped.
    assert set(ordered) == set(range(blocks + 2))
    assert depths['patch_embed1.'] == 0 and depths['block1.0.'] == 1
    assert depths['norm4.'] == blocks + 1
    last_of_stage = f'block3.{model.depths[2] - 1}.'
    assert depths['norm3.'] == depths['patch_embed4.'] == depths[last_of_stage]
    assert depths['block4.0.'] == depths['patch_embed4.'] + 1


def test_layer_depth_of_the_demo_architecture():
    model = VVT(NANO)  # depths 1, 1, 2, 1
    names = {
        'patch_embed1.proj.weight': 0,
        'block1.0.attn.q_proj.weight': 1,
        'norm1.weight': 1,
        'patch_embed2.norm.bias': 1,
        'block2.0.mlp.fc1.weight': 2,
        'block3.0.norm1.weight': 3,
        'block3.1.norm1.weight': 4,
        'norm3.bias': 4,
        'patch_embed4.proj.bias': 4,
        'block4.0.norm2.bias': 5,
        'norm4.weight': 6,
    }
    for name, depth in names.items():
        assert model.get_layer_depth(name) == (depth, 7), name
        assert model.get_layer_depth(f'net.{name}', 'net.') == (depth, 7)
        # Without the prefix, the parameter is not in the backbone.
        assert model.get_layer_depth(name, 'backbone.') == (6, 7)
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)
    assert model.get_layer_depth('neck.block1.0.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg', 'mmdet'])
def test_builds_under_every_scope(scope):
    pytest.importorskip(scope)
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(dict(type='VVT', arch=NANO)), VVT)
    registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
    assert isinstance(registry.build(dict(type='VVT', arch=NANO)), VVT)


@pytest.mark.parametrize(
    'change,message',
    [
        (
            dict(arch='huge'),
            r"arch must be one of \['tiny', 'small', 'medium', "
            r"'large'\] or a dict, got 'huge'",
        ),
        (dict(arch=7), 'arch must be a name or a dict, got 7'),
        (
            dict(arch={**NANO, 'depths': [1, 2, 3]}),
            r"arch\['depths'\] must be 4 "
            r'positive integers, one per stage, got \[1, 2, 3\]',
        ),
        (dict(arch={**NANO, 'depths': [1, 2, 3, 0]}), 'positive'),
        (
            dict(arch={k: v for k, v in NANO.items() if k != 'num_heads'}),
            r"arch is missing the keys \['num_heads'\]",
        ),
        (
            dict(arch={**NANO, 'heads': [1, 1, 1, 1]}),
            r"unknown keys \['heads'\]",
        ),
        (
            dict(arch={**NANO, 'num_heads': [3, 2, 3, 4]}),
            'embed_dims 8 of stage 0 '
            r'must be divisible by fr_ratio \* num_heads = 2 \* 3',
        ),
        (
            dict(out_indices=(0, 4)),
            r'out_indices must be between -4 and 3, got '
            r'\(0, 4\)',
        ),
        (dict(out_indices=(3, 0)), r'increasing order .* got \(3, 0\)'),
        (dict(out_indices=()), 'at least one stage'),
        (dict(frozen_stages=4), 'frozen_stages must be -1 .* to 3, got 4'),
        (
            dict(drop_path_rate=1.0),
            r'drop_path_rate must be in \[0, 1\), got 1.0',
        ),
        (dict(drop_rate='0.1'), r"drop_rate must be in \[0, 1\), got '0.1'"),
        (dict(with_cp='no'), "with_cp must be True or False, got 'no'"),
        (dict(in_channels=0), 'in_channels must be a positive integer, got 0'),
        (dict(attn_cfg=dict(locality='2d')), "locality must be one of .*'2d'"),
        (
            dict(attn_cfg=dict(se_ratio=3)),
            'embed_dims 8 must be divisible by se_ratio 3',
        ),
        (
            dict(attn_cfg=dict(backend='fast')),
            "backend must be one of .*'fast'",
        ),
        (
            dict(pretrained='a.pth'),
            "VVT does not support pretrained='a.pth'; .* "
            r"init_cfg=dict\(type='Pretrained', checkpoint=",
        ),
        (dict(pretrained=True), 'VVT does not support pretrained=True'),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        VVT(**{'arch': NANO, **change})


def test_pretrained_none_is_ignored():
    assert VVT(NANO, pretrained=None).init_cfg is None


def test_backend_that_cannot_run_is_refused_when_built(monkeypatch):
    monkeypatch.setattr(dispatch, 'HAS_TRITON', False)
    with pytest.raises(RuntimeError, match='Triton is not installed'):
        VVT(NANO, attn_cfg=dict(backend='triton'))


@pytest.mark.parametrize(
    'shape,message',
    [
        ((1, 3, 31, 64), 'at least 32 x 32 pixels, got 31 x 64'),
        ((1, 3, 64, 8), 'at least 32 x 32 pixels, got 64 x 8'),
        (
            (1, 1, 64, 64),
            r'must be \(B, 3, H, W\), got shape \(1, 1, 64, 64\)',
        ),
        ((3, 64, 64), r'must be \(B, 3, H, W\), got shape \(3, 64, 64\)'),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        nano()(torch.zeros(shape))


def test_attention_checks_its_grid():
    with pytest.raises(
        ValueError,
        match=r'spatial_shape \(2, 2\) has 4 '
        'tokens, but x has 6',
    ):
        VicinityAttention(8, 2)(torch.zeros(1, 6, 8), (2, 2))
