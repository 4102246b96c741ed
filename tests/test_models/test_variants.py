"""Ablation variants of the backbone: what they compute, and their use."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvvt.analysis.complexity import count
from mmvvt.errors import UserError
from mmvvt.models import (
    VVT,
    ConvMLP,
    GlobalContext,
    VicinityAttention,
    strips,
)
from mmvvt.models.image_form import NORMS, ImageForm
from mmvvt.models.vvt import PatchEmbed, PositionEmbedding, VVTBlock
from mmvvt.ops.strips import common

from conftest import relative_error

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
PLAIN = dict(overlap=False, pos_embed_size=(64, 96))
VARIANTS = {
    'softmax': dict(attn_cfg=dict(attention='softmax')),
    'global-context': dict(attn_cfg=dict(attention='global_context')),
    'no-fpc': dict(attn_cfg=dict(fpc=False)),
    'no-fpc-no-clamp': dict(attn_cfg=dict(fpc=False, clamp=False)),
    'plain-mlp': dict(mlp_cfg=dict(dwconv=False)),
    'plain-embed': dict(patch_cfg=dict(overlap=False)),
    'position': dict(patch_cfg=dict(pos_embed_size=64)),
    'plain': dict(
        attn_cfg=dict(attention='softmax', fpc=False, clamp=False),
        mlp_cfg=dict(dwconv=False),
        patch_cfg=PLAIN,
    ),
    'softmax-sr': dict(
        arch=dict(ARCH, sr_ratios=[4, 2, 1, 1]),
        attn_cfg=dict(attention='softmax'),
    ),
}
ALL = (0, 1, 2, 3)


def build(name, **options):
    torch.manual_seed(0)
    settings = {'arch': ARCH, 'out_indices': ALL, **VARIANTS[name], **options}
    model = VVT(**settings)
    model.init_weights()
    # At initialisation, the attention has almost no effect.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.mark.parametrize('size', [(64, 96), (33, 47), (71, 45)])
def test_shapes_and_gradients(variant, size):
    """Every parameter is used, and the strides are those of VVT."""
    model = build(variant)
    outs = model(torch.randn(2, 3, *size))
    for i, out in enumerate(outs):
        grid = [math.ceil(n / (4 * 2**i)) for n in size]
        assert list(out.shape) == [2, ARCH['embed_dims'][i], *grid]
    sum(out.pow(4).mean() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # A constant has no effect on a softmax.
        assert parameter.grad.any() or 'conv_mask.bias' in name, name


def test_differs_from_the_main_model(variant):
    """The options have an effect on the function, not only on the weights."""
    model = build(variant).eval()
    main = VVT(ARCH, out_indices=ALL).eval()
    shared = main.state_dict()
    for name, value in model.state_dict().items():
        if name in shared and shared[name].shape == value.shape:
            shared[name] = value
    main.load_state_dict(shared)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model(x)[0], main(x)[0]) > 1e-3


def explicit_softmax(attn, x, fpc):
    """Softmax attention as written in textbooks, for fr and heads of attn."""
    heads = attn.num_heads
    batch, tokens, _ = x.shape

    def split(t):
        # (B, N, C / fr) -> (B, N, heads, d) -> (B, heads, N, d)
        return t.reshape(batch, tokens, heads, -1).transpose(1, 2)

    q, k, v = (split(f(x)) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).exp()
    out = weights @ v / weights.sum(dim=3, keepdim=True)
    # (B, heads, N, d) -> (B, N, heads, d) -> (B, N, C / fr)
    out = attn.out_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    if not fpc:
        return out
    hidden = F.relu(x.mean(1, keepdim=True) @ attn.se_fc[0].weight.T)
    return out * (1 + torch.sigmoid(hidden @ attn.se_fc[2].weight.T))


@pytest.mark.parametrize('fpc', [True, False])
@pytest.mark.parametrize('fr_ratio', [1, 2, 4])
def test_softmax_by_hand(fr_ratio, fpc):
    """Outputs and all gradients, on a grid that is not square."""
    attn = VicinityAttention(
        16, 2, fr_ratio=fr_ratio, attention='softmax', clamp=False, fpc=fpc
    ).double()
    x = torch.randn(2, 15, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attn.parameters()]
    cotangent = torch.randn(2, 15, 16, dtype=torch.float64)
    out, expected = attn(x, (3, 5)), explicit_softmax(attn, x, fpc)
    assert relative_error(out, expected) < 1e-12
    for found, want in zip(
        torch.autograd.grad(out, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
    ):
        # The bias of keys has no effect on a softmax.
        assert (found - want).norm() < 1e-10 * (1 + want.norm())


def test_clamps_of_softmax_attention():
    """The output projection and the FPC are clamped as in the main model."""
    attn = VicinityAttention(8, 1, attention='softmax')
    with torch.no_grad():
        attn.out_proj.weight.mul_(1e8)
    out = attn(torch.randn(1, 6, 8), (2, 3))
    assert out.abs().max() == 1e4
    attn.clamp = False
    assert attn(torch.randn(1, 6, 8), (2, 3)).abs().max() > 1e4


def test_without_fpc_the_gate_is_left_out():
    full = VicinityAttention(16, 2)
    bare = VicinityAttention(16, 2, fpc=False)
    bare.load_state_dict(
        {n: p for n, p in full.state_dict().items() if 'se_fc' not in n}
    )
    with torch.no_grad():  # a gate of zero
        full.se_fc[2].weight.fill_(-1e6)
        full.se_fc[0].weight.fill_(1.0)
    x = torch.rand(2, 15, 16)
    assert torch.allclose(full(x, (3, 5)), bare(x, (3, 5)))


def test_global_context_by_hand():
    """GCNet: a softmax over the tokens, and a transform of their average."""
    module = GlobalContext(16).double()
    with torch.no_grad():  # the last layer is initialized with zeros
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    context = module.context
    scores = x @ context.conv_mask.weight.flatten() + context.conv_mask.bias
    mean = (scores.softmax(dim=1)[..., None] * x).sum(dim=1)  # (B, C)
    squeeze, norm, _, excite = context.channel_add_conv
    hidden = mean @ squeeze.weight.flatten(1).T + squeeze.bias
    hidden = F.layer_norm(
        hidden, (4,), norm.weight.flatten(), norm.bias.flatten()
    ).relu()
    added = hidden @ excite.weight.flatten(1).T + excite.bias
    assert relative_error(module(x, (3, 5)), x + added[:, None]) < 1e-12


def test_mlp_without_convolution_by_hand():
    mlp = ConvMLP(8, 24, dwconv=False)
    x = torch.randn(2, 15, 8)
    assert torch.allclose(mlp(x, (3, 5)), mlp.fc2(F.gelu(mlp.fc1(x))))
    assert set(mlp.state_dict()) == {
        f'fc{i}.{name}' for i in (1, 2) for name in ('weight', 'bias')
    }


def test_patches_without_overlap_by_hand():
    """Each token sees its own patch; edges are padded with zeros."""
    embed = PatchEmbed(3, 8, stride=4, overlap=False).double()
    image = torch.randn(2, 3, 10, 15, dtype=torch.float64)
    tokens, grid = embed(image)
    assert grid == (3, 4)
    padded = torch.zeros(2, 3, 12, 16, dtype=torch.float64)
    padded[:, :, :10, :15] = image
    weight = embed.proj.weight.flatten(1)  # (8, 3 * 4 * 4)
    for row in range(3):
        for column in range(4):
            patch = padded[
                :, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4
            ]
            expected = embed.norm(
                patch.flatten(1) @ weight.T + embed.proj.bias
            )
            found = tokens[:, 4 * row + column]
            assert relative_error(found, expected) < 1e-12


def test_position_table():
    """The table itself at its size, a bilinear resize at other sizes."""
    embed = PositionEmbedding(2, (4, 6))
    zeros = torch.zeros(3, 24, 2)
    # (1, C, h, w) -> (1, N, C)
    table = embed.table.flatten(2).transpose(1, 2)
    assert torch.equal(embed(zeros, (4, 6)), table.expand(3, -1, -1))
    with torch.no_grad():  # a ramp along the columns
        embed.table.copy_(torch.arange(6.0).expand(1, 2, 4, 6))
    out = embed(torch.zeros(1, 96, 2), (8, 12))[0, :, 0].reshape(8, 12)
    # The centre of column j of 12 is (j + 0.5) / 2 - 0.5 of 6 columns.
    expected = ((torch.arange(12) + 0.5) / 2 - 0.5).clamp(0, 5)
    assert torch.allclose(out, expected.expand(8, 12))


def test_position_tables_have_the_grids_of_an_image():
    model = VVT(ARCH, patch_cfg=dict(pos_embed_size=(70, 45)))
    shapes = [
        tuple(getattr(model, f'patch_embed{i}').pos_embed.table.shape[2:])
        for i in (1, 2, 3, 4)
    ]
    assert shapes == [(18, 12), (9, 6), (5, 3), (3, 2)]


# -- use --------------------------------------------------------------------


def test_large_images_on_a_cpu(variant, monkeypatch):
    """Whether a block runs in strips or not, the results are the same."""
    model = build(variant).double()
    x = torch.randn(2, 3, 70, 45, dtype=torch.float64)
    results = []
    for least in (math.inf, 0):
        monkeypatch.setattr(common, 'MIN_ELEMENTS', least)
        model.zero_grad()
        outs = model(x)
        sum(out.pow(4).mean() for out in outs).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append([*outs, *grads])
    for found, expected in zip(*results):
        assert (found - expected).norm() < 1e-9 * (1 + expected.norm())


def test_variants_do_not_run_in_strips(variant, monkeypatch):
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    x = torch.randn(1, 15, 8)
    main = VVT(ARCH).block1[0]
    assert strips.find_obstacle(main, x, (3, 5)) is None
    block = build(variant).block1[0]
    expected = variant not in ('plain-embed', 'position')
    assert (strips.find_obstacle(block, x, (3, 5)) is not None) == expected


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('size', [(64, 96), (70, 45)])
def test_export_form(variant, norm, size):
    model = build(variant).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(ImageForm(model, norm)(x), model(x)):
            assert relative_error(found, expected) < 1e-12


def test_torch_export_with_dynamic_size(variant):
    """Exported once, a variant is right for other sizes and batches."""
    model = build(variant, out_indices=(0, 1)).eval()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(
            ImageForm(model), (image,), dynamic_shapes=[dims]
        )
        for shape in ((1, 3, 70, 45), (3, 3, 33, 128)):
            x = torch.randn(shape)
            for found, expected in zip(program.module()(x), model(x)):
                assert relative_error(found, expected) < 1e-5


def test_trace(variant):
    model = build(variant).eval()
    traced = torch.jit.trace(model, torch.randn(2, 3, 64, 96))
    x = torch.randn(1, 3, 70, 45)
    for found, expected in zip(traced(x), model(x)):
        assert relative_error(found, expected) < 1e-5


def test_checkpointing_and_state_dict(variant):
    """Saved and loaded, with activation checkpointing: the same gradients."""
    plain = build(variant)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    saving = build(variant, with_cp=True)
    for parameter in saving.parameters():
        nn.init.zeros_(parameter)
    saving.load_state_dict(torch.load(file))
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for model in (plain, saving):
        sum(out.pow(4).mean() for out in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(variant, dtype):
    """Under autocast and as half model, close to float32."""
    model = build(variant).eval()
    x = torch.randn(2, 3, 70, 45)
    with torch.no_grad():
        expected = model(x)[0]
        with torch.autocast('cpu', dtype):
            found = model(x)[0]
        assert relative_error(found, expected) < 0.05
        found = model.to(dtype)(x.to(dtype))[0]
    assert found.dtype == dtype
    assert relative_error(found.float(), expected) < 0.05


def test_per_sample_gradients(variant):
    model = build(variant, out_indices=(1,)).eval()
    parameters = dict(model.named_parameters())
    images = torch.randn(3, 3, 36, 40)

    def loss(parameters, image):
        (out,) = torch.func.functional_call(model, parameters, (image[None],))
        return out.pow(4).mean()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        parameters, images
    )
    expected = torch.func.grad(loss)(parameters, images[1])
    for name, grad in expected.items():
        assert torch.allclose(grads[name][1], grad, rtol=1e-3, atol=1e-6), name


def test_layer_depths_and_frozen_stages():
    model = build('plain', frozen_stages=0)
    assert model.get_layer_depth('patch_embed1.pos_embed.table') == (0, 6)
    assert model.get_layer_depth('patch_embed3.pos_embed.table') == (2, 6)
    assert not model.patch_embed1.pos_embed.table.requires_grad
    assert model.patch_embed2.pos_embed.table.requires_grad


def test_initialization_of_the_global_context():
    """As in mmcv, the block starts as the identity."""
    model = VVT(ARCH, attn_cfg=dict(attention='global_context'))
    model.init_weights()
    x = torch.randn(2, 15, 8)
    assert torch.equal(model.block1[0].attn(x, (3, 5)), x)


def test_initialization_of_position_tables():
    model = VVT('tiny', patch_cfg=dict(pos_embed_size=224))
    table = model.patch_embed1.pos_embed.table
    with torch.no_grad():
        table.fill_(7.0)
    model.init_weights()
    assert abs(table.mean()) < 1e-3
    assert abs(table.std() - 0.02) < 1e-3


# -- cost -------------------------------------------------------------------


@pytest.mark.parametrize('fpc', [True, False])
def test_multiply_adds_of_softmax_attention(fpc):
    """Quadratic in the number of tokens, with the fused kernels, too."""
    c, heads, n = 16, 2, 60
    block = VVTBlock(c, heads, 1, 2, 1, attn_cfg=dict(attention='softmax'))
    block.attn = VicinityAttention(c, heads, attention='softmax', fpc=fpc)
    block.mlp = nn.Identity()
    attn = block.attn

    class OnGrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attn

        def forward(self, image):
            # (1, C, h, w) -> (1, C, N) -> (1, N, C)
            return attn(image.flatten(2).transpose(1, 2), (6, 10))

    linears = 4 * n * c * c // 2 + (2 * c * c if fpc else 0)
    products = 2 * n * n * c // 2
    found = count(OnGrid(), (1, c, 6, 10))
    assert found.multiply_adds == linears + products


def test_plain_parts_cost_less():
    size = (1, 3, 64, 64)
    full = count(VVT(ARCH), size).multiply_adds
    no_conv = count(VVT(ARCH, mlp_cfg=dict(dwconv=False)), size)
    hidden = [2 * dims for dims in ARCH['embed_dims']]
    tokens = [256, 64, 16, 4]
    convolutions = sum(9 * h * n for h, n in zip(hidden, tokens))
    assert full - no_conv.multiply_adds == convolutions
    plain = count(VVT(ARCH, patch_cfg=dict(overlap=False)), size)
    kernels = [49 - 16, 9 - 4, 9 - 4, 9 - 4]
    inputs = [3, *ARCH['embed_dims'][:3]]
    embeddings = sum(
        k * i * o * n
        for k, i, o, n in zip(kernels, inputs, ARCH['embed_dims'], tokens)
    )
    assert full - plain.multiply_adds == embeddings


# -- bad input --------------------------------------------------------------


@pytest.mark.parametrize(
    'options,message',
    [
        (
            dict(attn_cfg=dict(attention='linear')),
            "attention must be one of ('vicinity', 'softmax', "
            "'global_context'), got 'linear'",
        ),
        (
            dict(attn_cfg=dict(attention='softmax', locality='1d')),
            "with attention='softmax', attn_cfg allows the keys clamp, "
            'se_ratio, fpc, backend, got locality',
        ),
        (
            dict(attn_cfg=dict(attention='global_context', fpc=False, eps=1)),
            "with attention='global_context', attn_cfg allows the keys "
            'ratio, backend, got eps, fpc',
        ),
        # Text is true in Python, and would select the main model.
        (
            dict(attn_cfg=dict(fpc='no')),
            "fpc must be True or False, got 'no'",
        ),
        (
            dict(attn_cfg=dict(clamp='false')),
            "clamp must be True or False, got 'false'",
        ),
        (
            dict(mlp_cfg=dict(dwconv='no')),
            "dwconv must be True or False, got 'no'",
        ),
        (
            dict(patch_cfg=dict(overlap=0)),
            "patch_cfg['overlap'] must be True or False, got 0",
        ),
        (
            dict(attn_cfg=dict(eps='1e-3')),
            "eps must be a number of at least 0, got '1e-3'",
        ),
        (
            dict(attn_cfg=dict(eps=float('nan'))),
            'eps must be a number of at least 0, got nan',
        ),
        (
            dict(attn_cfg=dict(se_ratio=0)),
            'se_ratio must be a positive integer, got 0',
        ),
        (
            dict(attn_cfg=dict(attention='global_context', ratio=math.nan)),
            'embed_dims * ratio must be at least 1, got 8 * nan',
        ),
        (
            dict(attn_cfg=dict(fr_ratio=4)),
            'attn_cfg does not allow fr_ratio, which each stage has: set it '
            'in arch, with 4 values',
        ),
        (dict(mlp_cfg=None), 'mlp_cfg must be a dict, got None'),
        (dict(attn_cfg='softmax'), "attn_cfg must be a dict, got 'softmax'"),
        (
            dict(attn_cfg=dict(localty='1d')),
            "with attention='vicinity', attn_cfg allows the keys locality, ",
        ),
        (
            dict(attn_cfg=dict(attention='global_context', ratio='big')),
            'embed_dims * ratio must be at least 1, got 8 * big',
        ),
        (
            dict(attn_cfg=dict(attention='global_context', ratio=0.01)),
            'embed_dims * ratio must be at least 1, got 8 * 0.01',
        ),
        (
            dict(attn_cfg=dict(attention='global_context', backend='cuda')),
            'backend must be one of',
        ),
        (
            dict(mlp_cfg=dict(conv=False)),
            "mlp_cfg allows the keys ('dwconv',), got ['conv']",
        ),
        (
            dict(patch_cfg=dict(stride=8)),
            "patch_cfg allows the keys ('overlap', 'pos_embed_size'), got "
            "['stride']",
        ),
        (
            dict(patch_cfg=dict(pos_embed_size=16)),
            "patch_cfg['pos_embed_size'] must be one or two integers of at "
            'least 32 pixels, got 16',
        ),
        (
            dict(patch_cfg=dict(pos_embed_size=(64, 64, 64))),
            'must be one or two integers',
        ),
        (
            dict(patch_cfg=dict(pos_embed_size=64.0)),
            'must be one or two integers',
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError) as caught:
        VVT(ARCH, **options)
    assert message in str(caught.value)


def test_unknown_attention_of_the_layer():
    with pytest.raises(UserError, match="must be 'vicinity' or 'softmax'"):
        VicinityAttention(8, 1, attention='global_context')
