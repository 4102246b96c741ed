"""Compare the compiled kernels with PyTorch operations, and break the build.

The kernels are in ``mmvvt/ops/native``.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad

from mmvvt.models.vvt import VVTBlock
from mmvvt.ops import LOCALITIES
from mmvvt.ops.angles import NUM_FACTORS
from mmvvt.ops.native import library, load
from mmvvt.ops.strips import attention, common, mlp, native_ops
from mmvvt.ops.strips.common import GradSums, Window
from mmvvt.ops.strips.native_ops import NativeOps, select_ops
from mmvvt.ops.strips.torch_ops import TorchOps

from conftest import relative_error

DTYPES = (torch.float32, torch.bfloat16)
# Unit roundoff of each dtype: results are rounded once.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

needs_kernels = pytest.mark.skipif(
    load()[0] is None, reason=f'no kernels: {load()[1]}'
)


@pytest.fixture
def one_thread():
    """Threads divide sums over tokens, which makes them more accurate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_compiles_with_gcc():
    """The tests of the kernels are skipped only without a compiler."""
    if sys.platform == 'linux' and shutil.which('g++'):
        assert load()[0] is not None, load()[1]


def images(*shape, dtype=torch.float32, std=1.0):
    return (torch.randn(shape) * std).to(dtype)


def both(method, *arguments, **keywords):
    """Call a method of the kernels, and that of PyTorch in float64."""

    def double(t):
        if isinstance(t, Window):
            return Window(*map(double, t))
        is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
        if t in DTYPES if isinstance(t, torch.dtype) else False:
            return torch.float64
        return t.double() if is_float else t

    return (
        getattr(NativeOps(), method)(*arguments, **keywords),
        getattr(TorchOps(), method)(
            *map(double, arguments),
            **{name: double(value) for name, value in keywords.items()},
        ),
    )


def both_factors(rows, grid, locality):
    """Factors for the kernels, and for PyTorch in float64."""
    cpu = torch.device('cpu')
    return (
        NativeOps().factors(rows, grid, locality, torch.float32, cpu),
        TorchOps().factors(rows, grid, locality, torch.float64, cpu),
    )


def assert_close(ours, expected, dtype, name=''):
    assert ours.shape == expected.shape, name
    assert relative_error(ours, expected) < ROUNDING[dtype], name


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('tokens', DTYPES)
@pytest.mark.parametrize('channels', [16, 80, 96])
def test_layer_norm(dtype, tokens, channels):
    x = images(3, 5, 7, channels, dtype=tokens) + 3
    weight, bias = images(channels), images(channels)
    sums = images(3, channels)
    expected_sums = sums.double()
    ours, _ = NativeOps().layer_norm(x, weight, bias, 1e-6, dtype, sums)
    doubles = (x.double(), weight.double(), bias.double())
    expected, statistics = TorchOps().layer_norm(
        *doubles, 1e-6, torch.float64, expected_sums
    )
    assert ours.dtype == dtype
    assert_close(ours, expected, dtype)
    assert_close(sums, expected_sums, torch.float32)

    grad = images(3, 5, 7, channels, dtype=dtype)
    residual_grad = images(3, 5, 7, channels, dtype=tokens)
    mean_grad = images(3, channels)
    results = []
    for mean in (mean_grad, None):
        out, expected_out = torch.full_like(x, float('nan')), x.double()
        grads, expected_grads = GradSums(), GradSums()
        NativeOps().layer_norm_backward(
            x,
            grad,
            mean,
            residual_grad,
            weight,
            bias,
            1e-6,
            None,
            out,
            grads,
        )
        TorchOps().layer_norm_backward(
            doubles[0],
            grad.double(),
            None if mean is None else mean.double(),
            residual_grad.double(),
            *doubles[1:],
            1e-6,
            statistics,
            expected_out,
            expected_grads,
        )
        assert_close(out, expected_out, tokens)
        names = ('norm_weight', 'norm_bias')
        for name, a, b in zip(
            names, grads.of(names), expected_grads.of(names)
        ):
            assert_close(a, b, torch.float32, name)
        results.append(out)
    assert relative_error(*results) > 0.1


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('tokens', DTYPES)
@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('scaled', [True, False])
def test_residual(dtype, tokens, gated, scaled):
    x = images(3, 5, 7, 32, dtype=tokens)
    branch = images(3, 5, 7, 32, dtype=dtype)
    branch[:, 0] *= 1e-4  # on both sides of the lower bound
    branch[:, 1] *= 1e4  # on both sides of the upper bound
    branch[:, 2, 0] = 0
    gate = torch.rand(3, 32) if gated else None
    scale = torch.tensor([0.0, 1.25, 2.0]).view(3, 1, 1, 1) if scaled else None
    out = torch.empty_like(x)
    expected = torch.empty(x.shape, dtype=torch.float64)
    options = (gate is not None, scale)
    NativeOps().residual(x, branch, gate, *options, out)
    TorchOps().residual(
        x.double(),
        branch.double(),
        gate.double() if gated else None,
        options[0],
        scale.double() if scaled else None,
        expected,
    )
    assert_close(out, expected, tokens)
    NativeOps().residual(x, branch, gate, *options, x)  # in place
    assert torch.equal(x, out)
    if not gated:
        return
    grad = images(3, 5, 7, 32, dtype=tokens)
    gate_grad = images(3, 32)
    expected_gate_grad = gate_grad.double()
    ours = NativeOps().residual_backward(
        grad, branch, gate, True, scale, gate_grad
    )
    theirs = TorchOps().residual_backward(
        grad.double(),
        branch.double(),
        gate.double(),
        True,
        scale.double() if scaled else None,
        expected_gate_grad,
    )
    assert ours[0].dtype == dtype
    assert_close(ours[0], theirs[0], dtype, 'branch')
    assert_close(ours[1], theirs[1], torch.float32, 'bias')
    assert_close(gate_grad, expected_gate_grad, torch.float32, 'gate')


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('channels', [8, 16, 48, 72])
def test_sum_pixels(dtype, channels):
    ours, expected = both('sum_pixels', images(3, 5, 7, channels, dtype=dtype))
    assert ours.dtype == torch.float32
    assert_close(ours, expected, torch.float32)


def gradient_sums(ops, x, grad):
    """The sums over tokens that the kernels compute besides other results."""
    channels = x.shape[-1]
    weight, bias = x[0, 0, :2]
    gate = x[:, 0, 2].contiguous()
    norm, grads = (weight, bias, 1e-6), GradSums()
    mean, gate_grad = torch.zeros(2, len(x), channels, dtype=x.dtype)
    _, statistics = ops.layer_norm(x, *norm, x.dtype, mean)
    ops.layer_norm_backward(
        x, grad, None, x, *norm, statistics, torch.empty_like(x), grads
    )
    _, bias_grad = ops.residual_backward(grad, x, gate, False, None, gate_grad)
    _, _, conv_weight_grad, conv_bias_grad = ops.depthwise_gelu_backward(
        Window(None, x, True, True),
        x[0, :1, :9].permute(2, 0, 1).reshape(channels, 1, 3, 3),
        bias,
        grad.clone(),
    )
    return dict(
        pixels=ops.sum_pixels(x),
        mean=mean,
        norm_weight=grads.of(('norm_weight',))[0],
        norm_bias=grads.of(('norm_bias',))[0],
        gate=gate_grad,
        bias=bias_grad,
        conv_weight=conv_weight_grad,
        conv_bias=conv_bias_grad,
    )


@needs_kernels
@pytest.mark.parametrize('rows', [7, 50, 500])
def test_sums_are_not_worse(rows, one_thread):
    """Errors of sums over 140 to 10,000 tokens, as small as those of PyTorch.

    Each number of tokens that is added to the same float increases the error.
    """
    errors = defaultdict(list)
    for _ in range(6):
        x, grad = torch.randn(2, 2, rows, 10, 48)
        sides = [
            gradient_sums(ops(), x, grad) for ops in (NativeOps, TorchOps)
        ]
        expected = gradient_sums(TorchOps(), x.double(), grad.double())
        for name, want in expected.items():
            errors[name].append([relative_error(t[name], want) for t in sides])
    for name, values in errors.items():
        ours, theirs = torch.tensor(values).log().mean(dim=0).exp()
        assert ours <= 1.5 * theirs, name


@needs_kernels
def test_gate():
    ours, expected = both(
        'gate', *(images(*s) for s in ((3, 48), (5, 48), (48, 5)))
    )
    for a, b in zip(ours, expected):
        assert_close(a, b, torch.float32)


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('width', [1, 2, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize(
    'top,bottom,strip_rows',
    [
        (1, 1, 6),
        (1, 1, 1),
        (1, 0, 6),
        (1, 0, 2),
        (0, 0, 6),
        (0, 1, 6),
        (0, 1, 1),
    ],
)
@pytest.mark.parametrize('channels', [16, 48])
def test_depthwise_gelu(dtype, width, top, bottom, strip_rows, channels):
    window = Window(
        None if top else images(2, 2, width, channels, dtype=dtype, std=2),
        images(2, strip_rows, width, channels, dtype=dtype, std=2),
        bool(top),
        bool(bottom),
    )
    weight = images(channels, 1, 3, 3, dtype=dtype)
    bias = images(channels, dtype=dtype)
    arguments = (window, weight, bias)
    ours, expected = both('depthwise_gelu', *arguments)
    assert ours.dtype == dtype and ours.shape == window.shape
    assert_close(ours, expected, dtype)
    for values in (bias, None):
        ours, expected = both('depthwise', window, weight, values)
        assert ours.dtype == dtype
        assert_close(ours, expected, dtype)
    grad = images(*window.shape, dtype=dtype)
    ours, expected = both('depthwise_gelu_backward', *arguments, grad)
    names = ('output', 'input', 'weight', 'bias')
    for name, a, b in zip(names, ours, expected):
        rounded = dtype if name in names[:2] else torch.float32
        assert_close(a, b, rounded, name)


@needs_kernels
def test_gelu_everywhere():
    """The absolute error of GELU and of its derivative is at most 2e-6."""
    points = torch.cat(
        [
            torch.linspace(-40, 40, 160001),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.25, -5.25, 1e30, -1e30]),
        ]
    )
    points = torch.cat([points, points.new_zeros(-len(points) % 16)])
    window = points.view(1, 1, -1, 16)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    arguments = (Window(None, window, True, True), weight, torch.zeros(16))
    ours = NativeOps().depthwise_gelu(*arguments)
    x = window.double().requires_grad_()
    expected = nn.functional.gelu(x)
    expected.sum().backward()
    assert (ours - expected)[x.abs() < 1e6].abs().max() < 2e-6
    assert torch.equal(ours[x > 1e6], window[x > 1e6])
    assert (ours[x < -1e6] == 0).all()
    active, grad, *_ = NativeOps().depthwise_gelu_backward(
        *arguments, torch.ones_like(window)
    )
    assert torch.equal(active, ours)
    assert (grad - x.grad).abs().max() < 2e-6


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
def test_infinite_and_missing_numbers(dtype):
    """NaN stays NaN, and infinities are not replaced by finite numbers."""
    x = images(1, 4, 8, 16, dtype=dtype)
    x[0, 1, 2, 3] = float('nan')
    x[0, 3, 7, 5] = float('inf')
    weight, bias = torch.ones(16), torch.zeros(16)
    ours, expected = both('layer_norm', x, weight, bias, 1e-6, dtype)
    assert torch.equal(ours[0].isfinite(), expected[0].isfinite())
    kernel = images(16, 1, 3, 3, dtype=dtype).abs()
    window = Window(None, x, True, True)
    ours, expected = both('depthwise_gelu', window, kernel, bias.to(dtype))
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())
    for number in (float('nan'), 1e30, -1e30):
        point = torch.full((1, 1, 1, 16), number, dtype=dtype)
        at_centre = (Window(None, point, True, True), kernel, bias.to(dtype))
        ours, expected = both(
            'depthwise_gelu_backward', *at_centre, torch.ones_like(point)
        )
        for a, b in zip(ours[:2], expected):
            assert torch.allclose(
                a.double(), b, ROUNDING[dtype], 1e-6, equal_nan=True
            ), number
    out, want = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float64)
    NativeOps().residual(x, x.clone(), torch.rand(1, 16), True, None, out)
    TorchOps().residual(
        x.double(), x.double(), torch.rand(1, 16).double(), True, None, want
    )
    assert torch.equal(out.isfinite(), want.isfinite())
    qkv = x.repeat(1, 1, 1, 3)
    for locality, n in NUM_FACTORS.items():
        sums = torch.zeros(1, 2, n * 8, 9)
        want = sums.double()
        ours, theirs = both_factors(slice(0, 4), (4, 8), locality)
        NativeOps().sum_products(qkv, ours, 2, sums)
        TorchOps().sum_products(qkv.double(), theirs, 2, want)
        assert torch.equal(sums.isfinite(), want.isfinite()), locality


# Head dimensions of VVT-small are 48, 40 and 32; 24 ends with half a vector.
@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize(
    'batch,heads,d,grid,rows',
    [
        (3, 2, 24, (4, 5), (0, 4)),
        (1, 1, 48, (9, 17), (3, 8)),
        (1, 2, 8, (5, 70), (1, 4)),
        (2, 3, 40, (3, 21), (0, 3)),
        (1, 1, 40, (7, 11), (2, 5)),
        (1, 4, 8, (1, 1), (0, 1)),
        (1, 2, 32, (8, 8), (2, 6)),
    ],
)
def test_attention(dtype, locality, clamp, batch, heads, d, grid, rows):
    reduced, wide = heads * d, NUM_FACTORS[locality] * d
    rows = slice(*rows)
    # The strip is a part of an image.
    memory = images(batch, grid[0], grid[1], 3 * reduced, dtype=dtype)
    qkv = memory[:, rows]
    factors, doubled = both_factors(rows, grid, locality)
    sums = images(batch, heads, wide, d + 1)
    expected_sums = sums.double()
    NativeOps().sum_products(qkv, factors, heads, sums)
    TorchOps().sum_products(qkv.double(), doubled, heads, expected_sums)
    assert_close(sums, expected_sums, torch.float32)

    # Sums of keys are positive, and some values are outside the bounds.
    sums[..., -1] = sums[..., -1].abs() + 1
    sums[:, :, ::3, ::2] *= 1e4
    q = qkv[..., :reduced]
    arguments = (q, factors, sums, clamp, 1e-4)
    doubles = (q.double(), doubled, sums.double(), clamp, 1e-4)
    for out_dtype in DTYPES:
        ours = NativeOps().attend(*arguments, out_dtype)
        expected = TorchOps().attend(*doubles, torch.float64)
        assert ours.dtype == out_dtype
        assert_close(ours, expected, out_dtype)

    grad = images(*q.shape, dtype=dtype)
    grads = torch.full_like(memory, float('nan'))[:, rows]
    expected_grads = torch.zeros_like(grads, dtype=torch.float64)
    sums_grad = images(*sums.shape)
    expected_sums_grad = sums_grad.double()
    merged = NativeOps().attend_backward(
        *arguments, grad, grads[..., :reduced], sums_grad
    )
    expected = TorchOps().attend_backward(
        *doubles,
        grad.double(),
        expected_grads[..., :reduced],
        expected_sums_grad,
    )
    assert_close(merged, expected, dtype, 'output')
    assert_close(sums_grad, expected_sums_grad, torch.float32, 'sums')
    of_sums = images(*sums.shape)
    NativeOps().sum_products_backward(qkv, factors, heads, of_sums, grads)
    TorchOps().sum_products_backward(
        qkv.double(), doubled, heads, of_sums.double(), expected_grads
    )
    for name, a, b in zip(
        ('q', 'k', 'v'), grads.chunk(3, -1), expected_grads.chunk(3, -1)
    ):
        assert_close(a, b, dtype, name)


# -- blocks -------------------------------------------------------------------


def build_block(num_heads=2, fr_ratio=1, **attn_cfg):
    block = VVTBlock(48, num_heads, 2, fr_ratio, 1, attn_cfg=attn_cfg)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def run(block, x, grid, cotangent):
    x = x.detach().clone().requires_grad_()
    block.zero_grad()
    out = block(x, grid)
    out.backward(cotangent)
    with torch.no_grad():
        again = block(x, grid)
    return dict(
        output=out.detach(),
        inference=again,
        input=x.grad,
        **{name: p.grad.clone() for name, p in block.named_parameters()},
    )


@needs_kernels
@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
@pytest.mark.parametrize('strip_numbers', [1, 96 * 5 * 3, 10**7])
@pytest.mark.parametrize('products', [True, False])
@pytest.mark.parametrize(
    'heads,fr_ratio,grid', [(2, 1, (7, 5)), (2, 1, (4, 19)), (3, 2, (4, 19))]
)
def test_block_is_not_worse(
    heads,
    fr_ratio,
    grid,
    autocast,
    strip_numbers,
    products,
    monkeypatch,
    one_thread,
):
    """Errors against float64 are at most twice those of PyTorch operations.

    The root mean square over several draws is compared, because a token with
    a very small sum of weights can increase either error. With three heads of
    8 channels, such tokens increase it a hundred times, so there only the
    geometric mean is compared, which is stricter. The 72 channels of q, k and
    v then end with half a vector. Rows of 19 tokens are multiplied separately.
    """
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', strip_numbers)
    monkeypatch.setattr(
        common,
        'has_products',
        lambda dtype: products or dtype is not torch.bfloat16,
    )
    errors = defaultdict(list)
    used = []
    for draw in range(8):
        block = build_block(
            heads, fr_ratio, locality=LOCALITIES[draw % 4], clamp=draw < 4
        )
        x, cotangent = torch.randn(2, 2, math.prod(grid), 48)
        sides = []
        for kind in (NativeOps, TorchOps):
            with (
                monkeypatch.context() as patch,
                torch.autocast(
                    'cpu', torch.bfloat16, enabled=autocast is not None
                ),
            ):
                for module in (attention, mlp):
                    patch.setattr(
                        module,
                        'select_ops',
                        lambda *_, kind=kind: used.append(kind) or kind(),
                    )
                sides.append(run(block, x, grid, cotangent))
        expected = run(block.double(), x.double(), grid, cotangent.double())
        for name, want in expected.items():
            assert sides[0][name].dtype == sides[1][name].dtype, name
            errors[name].append([relative_error(t[name], want) for t in sides])
    assert used.count(NativeOps) == used.count(TorchOps) == 8 * 6
    for name, values in errors.items():
        ours, theirs = torch.tensor(values).log().mean(dim=0).exp()
        assert ours <= 1.5 * theirs, name
        if heads == 2:
            ours, theirs = torch.tensor(values).square().mean(dim=0).sqrt()
            assert ours <= 2 * theirs, name


@pytest.fixture
def large_block(monkeypatch):
    """A block that runs in strips with the kernels."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    torch.manual_seed(0)
    return build_block()


@needs_kernels
def test_overflow_is_visible(large_block):
    """Squares of these tokens overflow: NaN, as in the layers."""
    x = images(1, 35, 48) * 1e20
    out = large_block(x, (7, 5))
    out.sum().backward()
    assert out.isnan().all()
    assert large_block.norm1.weight.grad.isnan().all()


@needs_kernels
def test_lazy_tensors(large_block):
    """Tensors whose memory does not contain their values."""
    x = images(1, 35, 48).requires_grad_()
    cotangent = images(1, 35, 48)
    negative = torch._neg_view(-x)
    assert negative.is_neg()
    out = large_block(x, (7, 5))
    assert_close(large_block(negative, (7, 5)), out, torch.float32)

    def grad(of_output):
        return torch.autograd.grad(out, x, of_output, retain_graph=True)[0]

    assert torch.equal(grad(torch._neg_view(-cotangent)), grad(cotangent))
    zeros = torch._efficientzerotensor(out.shape)
    assert torch.equal(grad(zeros), grad(torch.zeros_like(out)))


@needs_kernels
@pytest.mark.parametrize('convolves', [True, False])
def test_gradients_can_be_modified(convolves, large_block, monkeypatch):
    """In place, with autograd."""
    monkeypatch.setattr(
        common, 'convolves_weight_grads', lambda dtype: convolves
    )
    names, parameters = zip(*large_block.named_parameters())
    out = large_block(images(1, 35, 48), (7, 5))
    grads = torch.autograd.grad(out.sum(), parameters)
    for name, parameter, grad in zip(names, parameters, grads):
        if name[:6] in ('attn.q', 'attn.k', 'attn.v'):
            continue  # autograd splits the gradient of a concatenation
        expected = grad + parameter
        assert torch.equal(grad.add_(parameter), expected), name


@needs_kernels
def test_forward_mode_through_the_backward_pass(large_block):
    x = images(1, 35, 48).requires_grad_()
    out = large_block(x, (7, 5))
    with forward_ad.dual_level():
        ones = torch.ones_like(out)
        torch.autograd.grad(out, x, ones, retain_graph=True)
        with pytest.raises(RuntimeError, match='double backward'):
            torch.autograd.grad(out, x, forward_ad.make_dual(ones, ones))


@needs_kernels
def test_same_result_twice(monkeypatch):
    """The result does not depend on the timing of the threads."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    block = build_block()
    x, cotangent = torch.randn(2, 2, 900, 48)
    first, second = (run(block, x, (30, 30), cotangent) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@needs_kernels
@pytest.mark.parametrize('locality', LOCALITIES)
def test_default_dtype_and_device(locality, monkeypatch):
    """Kernels write float32, also where new tensors are something else."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    block = build_block(locality=locality)
    x, cotangent = torch.randn(2, 2, 35, 48)
    expected = run(block, x, (7, 5), cotangent)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    native_ops._is_accurate.cache_clear()
    try:
        with torch.device('meta'):
            result = run(block, x, (7, 5), cotangent)
    finally:
        torch.set_default_dtype(default)
    for name, want in expected.items():
        assert torch.equal(result[name], want), name


@needs_kernels
def test_number_of_threads(monkeypatch):
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    block = build_block()
    x, cotangent = torch.randn(2, 1, 35, 48)
    expected = run(block, x, (7, 5), cotangent)
    threads = torch.get_num_threads()
    for count in (1, 3, 50):
        torch.set_num_threads(count)
        try:
            result = run(block, x, (7, 5), cotangent)
        finally:
            torch.set_num_threads(threads)
        for name, want in expected.items():
            assert relative_error(result[name], want) < 1e-4, name


# -- selection ----------------------------------------------------------------


class SomeMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def kind(dtype=torch.float32, computed=None, c=48, channels=96, head_dims=8):
    x = torch.zeros(1, 2, 2, c, dtype=dtype)
    return type(select_ops(x, computed or dtype, channels, head_dims))


@needs_kernels
def test_selection():
    assert kind() is kind(torch.bfloat16) is NativeOps
    assert kind(torch.float32, torch.bfloat16) is NativeOps
    assert kind(torch.bfloat16, torch.float32) is NativeOps
    for options in (
        dict(dtype=torch.float64),
        dict(dtype=torch.float16),
        dict(dtype=torch.float16, computed=torch.float32),
        dict(c=20),
        dict(channels=100),
        dict(head_dims=12),
    ):
        assert kind(**options) is TorchOps, options
    with SomeMode():
        assert kind() is TorchOps  # it would not see the kernels


@needs_kernels
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'method',
    [
        'layer_norm',
        'layer_norm_backward',
        'residual',
        'residual_backward',
        'sum_pixels',
        'gate',
        'depthwise',
        'depthwise_gelu',
        'depthwise_gelu_backward',
        'sum_products',
        'sum_products_backward',
        'attend',
        'attend_backward',
    ],
)
def test_wrong_kernels_are_not_used(method, dtype, monkeypatch):
    """Another compiler could make a mistake: it is found at the first use."""
    native_ops._is_accurate.cache_clear()
    state = torch.get_rng_state()
    assert kind(dtype) is NativeOps
    assert torch.equal(torch.get_rng_state(), state)
    kernel = getattr(NativeOps, method)

    def wrong(self, first, *arguments):
        if isinstance(first, Window):
            first = first._replace(strip=first.strip.flip(-1))
        else:
            first = first.flip(-1)
        return kernel(self, first, *arguments)

    messages = []
    monkeypatch.setattr(
        native_ops.logger,
        'warning',
        lambda text, *values: messages.append(text % values),
    )
    monkeypatch.setattr(NativeOps, method, wrong)
    native_ops._is_accurate.cache_clear()
    try:
        assert kind(dtype) is kind(dtype) is TorchOps
    finally:
        native_ops._is_accurate.cache_clear()
    (message,) = messages  # once, not at each call
    assert f'not used in {dtype}' in message


@needs_kernels
def test_flops_counters_see_the_operations(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    block, x = build_block(), torch.randn(1, 35, 48)
    totals = []
    for least in (0, 10**9):
        monkeypatch.setattr(common, 'MIN_ELEMENTS', least)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(x, (7, 5))
        totals.append(counter.get_total_flops())
    assert totals[0] >= totals[1] > 0


# -- compiling ----------------------------------------------------------------

SCRIPT = """
import torch
from mmvvt.ops.native import load
from mmvvt.ops.strips import common
common.MIN_ELEMENTS = 0
from mmvvt.models.vvt import VVTBlock
torch.manual_seed(0)
block, x = VVTBlock(48, 2, 2, 1, 1), torch.randn(1, 35, 48)
with torch.no_grad():
    strips = block(x, (7, 5))
    block.norm1.register_forward_hook(lambda *_: None)
    print('error', float((strips - block(x, (7, 5))).norm()))
print('loaded', load()[0] is not None, '|', load()[1])
"""


def run_script(tmp_path, script=SCRIPT, **environment):
    """Run a block in a new process with a cache of its own.

    The kernels are compiled without optimisation, in a fifth of the time.
    """
    compiler = tmp_path.parent / 'fast-gcc'
    if not compiler.exists():
        compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
        compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            'XDG_CACHE_HOME': str(tmp_path / 'cache'),
            'CXX': str(compiler),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(' ', 1) for line in done.stdout.splitlines())
    assert float(lines['error']) < 1e-4
    # Other packages may print warnings.
    messages = [
        line
        for line in done.stderr.splitlines()
        if 'kernels' in line or 'strips' in line
    ]
    return lines['loaded'], '\n'.join(messages)


def cached(tmp_path):
    return sorted((tmp_path / 'cache' / 'mmvvt' / 'native').iterdir())


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    """A folder whose cache contains the compiled kernels."""
    folder = tmp_path_factory.mktemp('compiled')
    assert run_script(folder) == ('True | ', '')
    return folder


@pytest.fixture
def cached_file(compiled, tmp_path):
    """A copy of the compiled kernels in the cache of this test."""
    shutil.copytree(compiled / 'cache', tmp_path / 'cache')
    (file,) = cached(tmp_path)
    return file


@needs_kernels
def test_compiled_once(cached_file, tmp_path):
    before = cached_file.stat()
    assert not before.st_mode & 0o077
    assert run_script(tmp_path) == ('True | ', '')
    assert cached(tmp_path) == [cached_file]
    assert cached_file.stat().st_mtime_ns == before.st_mtime_ns


@needs_kernels
def test_other_options_of_the_compiler(cached_file, tmp_path):
    """A library that was compiled with other options is not used."""
    assert run_script(tmp_path, CXX='g++ -O1')[0] == 'True | '
    assert len(cached(tmp_path)) == 2


@needs_kernels
def test_changed_header(cached_file, tmp_path):
    """A library that was compiled from another version is not used."""
    folder = tmp_path / 'native'
    shutil.copytree(library.SOURCE.parent, folder)
    with open(folder / 'gelu.h', 'a') as file:
        file.write('// changed\n')
    script = f"""
from pathlib import Path
from mmvvt.ops.native import library
library.SOURCE = Path({str(folder / library.SOURCE.name)!r})
"""
    assert run_script(tmp_path, script + SCRIPT)[0] == 'True | '
    assert len(cached(tmp_path)) == 2


@needs_kernels
def test_sources_are_all_files_that_are_included():
    done = subprocess.run(
        [*library._compiler(), '-MM', str(library.SOURCE)],
        capture_output=True,
        text=True,
        check=True,
    )
    _, files = done.stdout.replace('\\\n', ' ').split(':')
    assert set(map(Path, files.split())) == set(library._sources())


@needs_kernels
def test_second_openmp_library(tmp_path):
    """scikit-learn has a libgomp of its own; that of PyTorch is used."""
    script = 'import sklearn.svm\n' + SCRIPT
    assert run_script(tmp_path, script)[0] == 'True | '

    def dynamic_section(path):
        command = ['readelf', '-d', str(path)]
        return subprocess.run(command, capture_output=True, text=True).stdout

    of_torch = dynamic_section(library._openmp_runtime())
    name = re.search(r'soname: \[(.*)\]', of_torch)[1]
    assert f'[{name}]' in dynamic_section(cached(tmp_path)[0])


@needs_kernels
def test_file_that_others_may_have_written(cached_file, tmp_path):
    cached_file.chmod(0o777)
    cached_file.write_bytes(b'not a library')
    assert run_script(tmp_path)[0] == 'True | '
    assert cached(tmp_path) == [cached_file]
    assert cached_file.stat().st_size > 1000


@needs_kernels
@pytest.mark.parametrize('size', [0, 1000, -100])
def test_damaged_file(size, cached_file, tmp_path):
    """Loading an incomplete file would end the process."""
    complete = cached_file.read_bytes()
    cached_file.write_bytes(complete[:size])
    assert run_script(tmp_path)[0] == 'True | '
    assert cached_file.stat().st_size == len(complete)


@needs_kernels
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'cache').write_text('a file where a folder is expected')
    assert run_script(tmp_path)[0] == 'True | '


@pytest.mark.parametrize(
    'environment,reason',
    [
        (dict(MMVVT_NATIVE='0'), 'MMVVT_NATIVE is 0'),
        (dict(CXX='no-such-compiler'), 'no-such-compiler was not found'),
        (dict(CXX='false'), 'failed'),
        (dict(CXX='g++ "'), "CXX is 'g++ \"': No closing quotation"),
    ],
)
def test_without_kernels(environment, reason, tmp_path):
    """The strips use PyTorch operations, without a message."""
    loaded, messages = run_script(tmp_path, **environment)
    assert loaded.startswith('False') and reason in loaded
    assert messages == ''


@needs_kernels
def test_no_folder_can_be_written(tmp_path):
    """Also no temporary one, as in a container that is read-only."""
    script = """
from mmvvt.ops.native import library
def fail(*arguments, **keywords):
    raise OSError('Read-only file system')
library.tempfile.mkstemp = library.tempfile.TemporaryDirectory = fail
"""
    loaded, messages = run_script(tmp_path, script + SCRIPT)
    assert loaded == 'False | Read-only file system' and messages == ''


def test_user_without_home(monkeypatch):
    """`~` is not a folder to create."""
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
    with pytest.raises(OSError, match='no folder ~/.cache'):
        library._cache_folder()


def test_fork_while_another_thread_compiles():
    with library._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if library._lock.acquire(timeout=1) else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0


@needs_kernels
def test_compiler_whose_messages_are_not_utf8(tmp_path):
    script = tmp_path / 'gcc'
    script.write_bytes(b'#!/bin/sh\necho "\xe9"; exec g++ "$@"\n')
    script.chmod(0o755)
    assert run_script(tmp_path, CXX=str(script))[0] == 'True | '


@needs_kernels
def test_compiler_that_fails(tmp_path):
    """A compiler that reports its version but cannot compile."""
    script = tmp_path / 'broken-gcc'
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        'echo "error: out of memory" >&2; exit 1\n'
    )
    script.chmod(0o755)
    loaded, _ = run_script(tmp_path, CXX=str(script))
    assert loaded.startswith('False') and 'out of memory' in loaded
    assert cached(tmp_path) == []


@needs_kernels
def test_compiles_without_avx512(tmp_path):
    """Other processors use shorter vectors, in the same source."""
    for flags in (['-mno-avx512f'], ['-mno-avx512f', '-mno-avx2', '-mno-avx']):
        done = subprocess.run(
            [
                *library._compiler(),
                *library.FLAGS,
                *flags,
                '-Wall',
                '-Wextra',
                '-Wno-psabi',
                '-Werror',
                '-c',
                str(library.SOURCE),
                '-o',
                str(tmp_path / 'kernels.o'),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
