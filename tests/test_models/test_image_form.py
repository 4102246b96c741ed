"""The form of VVT for export computes the same function as the layers."""

import pytest
import torch
import torch.nn as nn

from mmvvt.errors import UserError
from mmvvt.models import VVT
from mmvvt.models.image_form import NORMS, ImageForm, _ImageBlock, _TokenBlock
from mmvvt.ops import LOCALITIES

from conftest import relative_error

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[8, 6, 4, 2],
    depths=[1, 1, 2, 1],
)
ALL = (0, 1, 2, 3)


def build(arch=ARCH, **options):
    torch.manual_seed(0)
    model = VVT(arch, **{'out_indices': ALL, **options})
    model.init_weights()
    # At initialisation, the attention has almost no effect.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def count(form, kind):
    return sum(isinstance(module, kind) for module in form.modules())


def check_same(model, form, tolerance=1e-12, size=(70, 45)):
    x = torch.randn(2, 3, *size, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        found, expected = form(x), model(x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize('locality', LOCALITIES)
def test_equals_the_layers(locality, clamp, norm):
    model = build(attn_cfg=dict(locality=locality, clamp=clamp)).double()
    form = ImageForm(model, norm)
    assert count(form, _ImageBlock) == 5
    check_same(model, form)


@pytest.mark.parametrize('norm', NORMS)
def test_sums_are_clamped(norm):
    """The sums exceed the clamp, the products do not.

    One block: behind clamped sums, whether a product is zero or a rounding
    error depends on the order of the sum, and the clamps amplify that.
    """
    outs = []
    for clamp in (True, False):
        model = build(out_indices=(0,), attn_cfg=dict(clamp=clamp)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(1e8 if '.v_proj.' in name else 1)
                parameter.mul_(1e-8 if '.q_proj.' in name else 1)
        form = ImageForm(model, norm)
        check_same(model, form)
        with torch.no_grad():
            outs.append(form(torch.ones(1, 3, 64, 64).double())[-1])
    assert relative_error(*outs) > 0.01


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2,)])
def test_output_stages(out_indices):
    model = build(out_indices=out_indices).double()
    check_same(model, ImageForm(model, 'channels'))


def test_spatial_reduction_calls_the_layers():
    model = build(dict(ARCH, sr_ratios=[2, 1, 1, 1])).double()
    form = ImageForm(model)
    assert count(form, _TokenBlock) == 1
    check_same(model, form)


def dilate(model):
    conv = model.block2[0].mlp.dwconv.dwconv
    conv.dilation, conv.padding = (2, 2), (2, 2)


def circular(model):
    model.block2[0].mlp.dwconv.dwconv.padding_mode = 'circular'
    model.block2[0].mlp.dwconv.dwconv._reversed_padding_repeated_twice = [
        1
    ] * 4


def replace_norm(model):
    model.block2[0].norm1 = nn.Identity()


def hook_layer(model):
    model.block2[0].mlp.fc1.register_forward_hook(lambda m, i, out: 2 * out)


def hook_block(model):
    model.block2[0].register_forward_hook(lambda m, i, out: out.flip(-1))


def override_forward(model):
    block = model.block2[0]
    block.forward = lambda x, spatial_shape: x


def hook_embedding(model):
    model.patch_embed2.register_forward_hook(
        lambda m, i, out: (2 * out[0], out[1])
    )


def replace_norm_of_embedding(model):
    model.patch_embed2.norm = nn.Identity()


def hook_norm(model):
    model.norm2.register_forward_hook(lambda m, i, out: 2 * out)


class _TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        # (B, N, C) -> (B, C, N) -> (B, N, C)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def replace_stage_norm(model):
    model.norm2 = _TokenBatchNorm(16).double().eval()
    nn.init.uniform_(model.norm2.running_var, 1, 2)


def centre_tokens(model):
    model.norm2.register_forward_hook(
        lambda m, i, out: out - out.mean(dim=1, keepdim=True)
    )


def without_affine(model):
    model.norm2 = nn.LayerNorm(16, elementwise_affine=False)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(
    'change',
    [
        dilate,
        circular,
        replace_norm,
        hook_layer,
        hook_block,
        override_forward,
        hook_embedding,
        replace_norm_of_embedding,
        hook_norm,
        replace_stage_norm,
        centre_tokens,
        without_affine,
    ],
    ids=lambda change: change.__name__,
)
def test_changed_layers_are_honoured(change, norm):
    model = build().double()
    x = torch.randn(2, 3, 70, 45).double()
    with torch.no_grad():
        before = model(x)
        change(model)
        after = model(x)
    assert relative_error(after[1], before[1]) > 1e-3
    check_same(model, ImageForm(model, norm))


@pytest.mark.parametrize('norm', NORMS)
def test_zero_and_tiny_numbers_are_clamped_as_usual(norm):
    """Queries of zero give an output of zero, not of the lower bound."""
    model = build()
    with torch.no_grad():
        for block in model.block1:
            block.attn.q_proj.weight.zero_()
            block.attn.q_proj.bias.fill_(-1)
    check_same(model, ImageForm(model, norm), 1e-5)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('scale', [1e-8, 1e8])
def test_output_of_the_attention_is_clamped(norm, scale):
    """Before the gate and after it, which doubles it at most."""
    model = build().double()
    with torch.no_grad():
        for block in model.block1:
            block.attn.out_proj.weight.mul_(scale)
            block.attn.out_proj.bias.zero_()
    check_same(model, ImageForm(model, norm))


@pytest.mark.parametrize('norm,norms', [('tokens', 8), ('channels', 0)])
def test_exported_graph(norm, norms):
    """The graph has the form that was asked for, also in ``torch.export``.

    With 'channels', no image is transposed. Inside of ``torch.export``,
    ``type(layer) is nn.LayerNorm`` is False.
    """
    form = ImageForm(build(out_indices=(1,)), norm)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        form,
        (torch.randn(2, 3, 64, 96),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    targets = [str(node.target) for node in program.graph.nodes]
    # Two blocks, two embeddings and the outputs of two stages
    assert targets.count('aten.layer_norm.default') == norms
    assert ('aten.permute.default' in targets) is (norm == 'tokens')


@pytest.mark.parametrize('norm', NORMS)
def test_products_are_exported_without_copies(norm):
    """An expansion would be a copy of the widest tensors in OpenVINO."""
    form = ImageForm(
        build(out_indices=(1,), attn_cfg=dict(locality='none')), norm
    )
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        form,
        (torch.randn(2, 3, 64, 64),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count('aten.matmul.default') == 2 * 2  # two blocks
    assert 'aten.expand.default' not in targets


def test_openvino_keeps_few_activations(tmp_path):
    """It computes the hidden activations of all parts of a sum first."""
    openvino = pytest.importorskip('openvino')
    from mmvvt.deploy.formats import openvino_core

    form = ImageForm(build(out_indices=(0,)), 'channels')
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        form,
        (torch.randn(2, 3, 64, 64),),
        dynamo=True,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        opset_version=20,
        verbose=False,
    )
    operators = [node.op_type for node in program.model_proto.graph.node]
    assert operators.count('MatMul') == 4  # two groups of factors
    assert operators.count('Expand') == 2  # factors of rows and columns
    path = str(tmp_path / 'model.onnx')
    program.save(path)
    compiled = openvino_core().compile_model(
        openvino.convert_model(path),
        'CPU',
        {'INFERENCE_PRECISION_HINT': 'f32'},
    )

    def order(node):
        value = node.get_rt_info()['execOrder']
        return int(getattr(value, 'value', value))

    lifetimes = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        # The weights of depthwise convolutions are (C, 1, 1, 3, 3).
        if (
            node.get_input_size() > 1
            and len(node.input(1).get_partial_shape()) == 5
        ):
            readers = node.output(0).get_target_inputs()
            last = max(order(reader.get_node()) for reader in readers)
            lifetimes.append((order(node), last))
    assert len(lifetimes) == 8  # parts
    kept = [sum(a <= t <= b for a, b in lifetimes) for t, _ in lifetimes]
    assert max(kept) == 2


@pytest.mark.parametrize(
    'mlp_ratios,parts',
    [
        ([8, 8, 4, 4], [8, 4, 1, 1]),
        ([2, 5, 8, 8], [2, 3, 2, 1]),
        ([5, 9, 4, 4], [5, 5, 1, 1]),
    ],
)
def test_wide_mlps_are_exported_in_parts(mlp_ratios, parts):
    """No part has more activations than the first stage."""
    model = build(dict(ARCH, mlp_ratios=mlp_ratios)).double()
    form = ImageForm(model)
    for index, stage in enumerate(form.stages):
        hidden_dims = mlp_ratios[index] * ARCH['embed_dims'][index]
        for block in stage:
            if isinstance(block, _ImageBlock):
                widths = [part[0].out_channels for part in block.mlp]
                assert len(widths) == parts[index]
                assert sum(widths) == hidden_dims
                assert max(widths) <= 8 * 4**index
                assert max(widths) - min(widths) < len(widths)
    check_same(model, form)


def test_float16_does_not_overflow():
    """The median over images: the clamps amplify the errors of some."""
    model = build()
    form = ImageForm(build(), 'channels').half()
    errors = []
    for _ in range(7):
        x = 1000 * torch.randn(1, 3, 256, 256)
        with torch.no_grad():
            outs, expected = form(x.half()), model(x)
        assert all(out.isfinite().all() for out in outs)
        errors.append([relative_error(a, b) for a, b in zip(outs, expected)])
    for of_map in zip(*errors):
        assert sorted(of_map)[3] < 0.03


def test_norm_is_checked():
    with pytest.raises(UserError, match="norm must be one of .*, got 'rows'"):
        ImageForm(build(), 'rows')


@pytest.mark.parametrize('scale', [1e-8, 1e9])
def test_small_and_large_sums_are_clamped(scale):
    """Values out of range change the key-value sums and the numerator."""
    model = build().double()
    with torch.no_grad():
        for block in model.block1:
            block.attn.v_proj.weight.mul_(scale)
            block.attn.v_proj.bias.mul_(scale)
    check_same(model, ImageForm(model))
