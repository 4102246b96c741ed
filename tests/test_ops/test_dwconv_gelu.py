"""Tests of the Triton kernels for depthwise convolution with GELU."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmvvt.models import ConvMLP
from mmvvt.models.vvt import VVTBlock
from mmvvt.ops import dwconv_gelu

from conftest import relative_error
from triton_testing import (
    DEVICE,
    INTERPRETED,
    needs_kernels,
    poison,
    run_interpreted,
)

# (B, h, w, C): partial tiles of 8 columns, 16 rows, and 64 and 128 channels
SHAPES = [(2, 5, 9, 6), (1, 1, 11, 130), (1, 33, 3, 5), (2, 1, 1, 65)]


def make_inputs(b, h, w, c, dtype=torch.float32):
    return [
        torch.randn(shape).to(DEVICE, dtype).requires_grad_()
        for shape in ((b, h * w, c), (c, 1, 3, 3), (c,))
    ]


def layers(x, weight, bias, shape):
    """Compute the same with standard PyTorch operations."""
    # (B, N, C) -> (B, h, w, C) -> (B, C, h, w)
    x = x.unflatten(1, shape).permute(0, 3, 1, 2)
    x = F.gelu(F.conv2d(x, weight, bias, padding=1, groups=len(weight)))
    # (B, C, h, w) -> (B, C, N) -> (B, N, C)
    return x.flatten(2).transpose(1, 2)


def run(inputs, shape, function=dwconv_gelu, dtype=None):
    """Return the output and the gradients by name."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*inputs, shape)
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, inputs, cotangent)
    return dict(zip(('output', 'x', 'weight', 'bias'), (out, *grads)))


@pytest.mark.skipif(INTERPRETED or DEVICE == 'cuda', reason='it is running')
def test_interpreted():
    run_interpreted('test_dwconv_gelu.py')


@needs_kernels
def test_by_hand():
    """Each weight is applied at its offset, and the padding is zero."""
    x = torch.arange(1.0, 7.0).view(1, 6, 1).to(DEVICE)  # a grid of 2 x 3
    for row in range(3):
        for col in range(3):
            weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
            weight[0, 0, row, col] = 1
            out = dwconv_gelu(
                x, weight, torch.full((1,), 2.0, device=DEVICE), (2, 3)
            )
            for r in range(2):
                for c in range(3):
                    at = r + row - 1, c + col - 1
                    inside = 0 <= at[0] < 2 and 0 <= at[1] < 3
                    total = 2.0 + (1.0 + at[0] * 3 + at[1] if inside else 0.0)
                    want = F.gelu(torch.tensor(total))
                    assert torch.isclose(out[0, r * 3 + c, 0].cpu(), want)


@needs_kernels
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels(shape):
    inputs = make_inputs(*shape)
    ours = run(inputs, shape[1:3])
    wants = run(inputs, shape[1:3], layers, torch.float64)
    for name, want in wants.items():
        assert ours[name].shape == want.shape
        assert relative_error(ours[name].cpu(), want.cpu()) < 1e-6, name


@needs_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Errors are at most twice those of PyTorch in the same dtype."""
    inputs = make_inputs(2, 5, 9, 6, dtype=dtype)
    exact = run(inputs, (5, 9), layers, torch.float64)
    plain = run(inputs, (5, 9), layers)
    for name, t in run(inputs, (5, 9)).items():
        assert t.dtype == dtype
        error = relative_error(t.cpu(), exact[name].cpu())
        allowed = relative_error(plain[name].cpu(), exact[name].cpu())
        assert error <= 2 * allowed, name


@needs_kernels
def test_weights_may_stay_float32():
    """With float32 weights, the output has the dtype of x."""
    x, weight, bias = make_inputs(1, 4, 5, 6)
    ours = run((x.bfloat16(), weight, bias), (4, 5))
    assert ours['output'].dtype == ours['x'].dtype == torch.bfloat16
    assert ours['weight'].dtype == ours['bias'].dtype == torch.float32
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = dwconv_gelu(x, weight, bias, (4, 5))
    assert torch.equal(out, ours['output'])


@needs_kernels
def test_any_strides():
    x, weight, bias = make_inputs(2, 4, 5, 12)
    ours = run((x[..., ::2], weight[::2], bias[::2]), (4, 5))
    wants = run((x[..., ::2], weight[::2], bias[::2]), (4, 5), layers)
    for name, want in wants.items():
        torch.testing.assert_close(ours[name], want, msg=name)


@needs_kernels
def test_uninitialised_memory_is_written(monkeypatch):
    inputs = make_inputs(2, 5, 9, 6)
    poison(monkeypatch)
    ours = run(inputs, (5, 9))
    monkeypatch.undo()
    for name, t in ours.items():
        assert t.isfinite().all(), name


@needs_kernels
def test_same_bits_twice():
    inputs = make_inputs(2, 5, 9, 6)
    first, second = (run(inputs, (5, 9)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@needs_kernels
def test_inference_then_training():
    inputs = make_inputs(1, 3, 4, 5)
    with torch.inference_mode():
        out = dwconv_gelu(*inputs, (3, 4))
    again = dwconv_gelu(*inputs, (3, 4))
    again.sum().backward()
    assert torch.equal(out, again)


@needs_kernels
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_in_one_graph(dynamic):
    inputs = make_inputs(2, 4, 5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(
        dwconv_gelu, fullgraph=True, dynamic=dynamic, backend='aot_eager'
    )
    out = compiled(*inputs, (4, 5))
    assert torch.equal(out, dwconv_gelu(*inputs, (4, 5)))
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


@needs_kernels
def test_block(monkeypatch):
    """The backend set in the config is used by both kernels."""
    from mmvvt.ops.triton_kernels import dwconv_gelu as kernels

    blocks = {}
    for backend in ('triton', 'torch'):
        torch.manual_seed(0)
        block = VVTBlock(16, 2, 2, 2, 1, attn_cfg=dict(backend=backend))
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        blocks[backend] = block.to(DEVICE)
    called = []
    forward = kernels.dwconv_gelu
    monkeypatch.setattr(
        kernels,
        'dwconv_gelu',
        lambda *args: called.append(args) or forward(*args),
    )
    x = torch.randn(2, 12, 16, device=DEVICE)
    outs = {name: block(x, (3, 4)) for name, block in blocks.items()}
    assert len(called) == 1  # the kernel includes the GELU
    assert relative_error(outs['triton'].cpu(), outs['torch'].cpu()) < 1e-5
    for out in outs.values():
        out.square().sum().backward()
    for (name, ours), want in zip(
        blocks['triton'].named_parameters(), blocks['torch'].parameters()
    ):
        assert relative_error(ours.grad.cpu(), want.grad.cpu()) < 1e-4, name


@needs_kernels
def test_autocast_and_compilers(monkeypatch):
    """Autocast uses the kernel; compiled models use the layers."""
    from mmvvt.ops.triton_kernels import dwconv_gelu as kernels

    called = []
    forward = kernels.dwconv_gelu
    monkeypatch.setattr(
        kernels,
        'dwconv_gelu',
        lambda *args: called.append(args) or forward(*args),
    )
    mlp = ConvMLP(16, 32, backend='triton').to(DEVICE)
    x = torch.randn(2, 12, 16, device=DEVICE)
    expected = mlp(x, (3, 4))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = mlp(x, (3, 4))
    assert len(called) == 2 and called[1][0].dtype == torch.bfloat16
    assert relative_error(out.cpu(), expected.cpu()) < 0.02
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend='aot_eager')
    out = compiled(x, (3, 4))
    assert relative_error(out.cpu(), expected.cpu()) < 1e-5


CHANGES = [
    lambda mlp: setattr(mlp.dwconv.dwconv, 'dilation', (2, 2))
    or setattr(mlp.dwconv.dwconv, 'padding', (2, 2)),
    lambda mlp: setattr(
        mlp.dwconv,
        'dwconv',
        nn.Conv2d(32, 32, 3, padding=1, padding_mode='circular', groups=32),
    ),
    lambda mlp: setattr(
        mlp.dwconv, 'dwconv', nn.Conv2d(32, 32, 5, padding=2, groups=32)
    ),
    lambda mlp: setattr(mlp.dwconv.dwconv, 'bias', None),
    lambda mlp: setattr(mlp, 'act', nn.GELU('tanh')),
    lambda mlp: setattr(mlp, 'act', nn.ReLU()),
    lambda mlp: mlp.act.register_forward_hook(lambda *args: 2 * args[2]),
    lambda mlp: mlp.dwconv.register_forward_hook(lambda *args: 2 * args[2]),
    lambda mlp: mlp.dwconv.dwconv.register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
]


@needs_kernels
@pytest.mark.parametrize('change', CHANGES)
def test_changed_layers_are_called(change):
    """Modified layers are called instead of the kernel."""
    torch.manual_seed(0)
    mlp = ConvMLP(16, 32, backend='triton')
    x = torch.randn(2, 12, 16, device=DEVICE)
    before = mlp.to(DEVICE)(x, (3, 4))
    change(mlp)
    out = mlp.to(DEVICE)(x, (3, 4))
    mlp.backend = 'torch'
    assert torch.equal(out, mlp(x, (3, 4)))
    assert relative_error(out.cpu(), before.cpu()) > 1e-5


@pytest.mark.parametrize(
    'change,message',
    [
        (
            dict(x=torch.zeros(6, 4)),
            r'x must be \(B, N, C\), got shape \(6, 4\)',
        ),
        (
            dict(weight=torch.zeros(4, 3, 3)),
            r'must be \(4, 1, 3, 3\) and \(4,\)',
        ),
        (dict(bias=torch.zeros(3)), r'got \(4, 1, 3, 3\) and \(3,\)'),
        (dict(spatial_shape=(2, 2)), r'\(2, 2\) has 4 tokens, but x has 6'),
    ],
)
def test_bad_input(change, message):
    arguments = dict(
        x=torch.zeros(1, 6, 4),
        weight=torch.zeros(4, 1, 3, 3),
        bias=torch.zeros(4),
        spatial_shape=(2, 3),
    )
    with pytest.raises(ValueError, match=message):
        dwconv_gelu(**{**arguments, **change})


def test_backend_that_cannot_run_says_why():
    inputs = make_inputs(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'triton' cannot run: .*use"):
        dwconv_gelu(*inputs, (2, 3))
