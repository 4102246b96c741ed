"""Compare the Triton kernels of attention with the reference implementation.

The kernels run on a GPU if there is one, and otherwise in Triton's interpreter
in a separate process (see :func:`test_interpreted`).
"""

import sys

import pytest
import torch

from mmvvt.ops import LOCALITIES, check_backend, reference
from mmvvt.ops import vicinity_attention as attend

from conftest import ROOT, relative_error
from triton_testing import (
    DEVICE,
    INTERPRETED,
    needs_kernels,
    poison,
    run_interpreted,
)

sys.path.append(str(ROOT / 'tests' / 'test_models'))
from test_golden import CASES, TOLERANCE, run_attention  # noqa: E402

# Query and key grids (h, w): square, wide, one row, one column, one token, and
# a different key grid. No grid fills a tile of 16, 32 or 64 tokens.
GRIDS = [
    ((7, 7), None),
    ((5, 14), None),
    ((1, 11), None),
    ((9, 1), None),
    ((1, 1), None),
    ((6, 9), (3, 4)),
    ((3, 4), (6, 9)),
]
HALF = [torch.bfloat16, torch.float16]


def make_inputs(
    query_shape,
    key_shape=None,
    batch=2,
    heads=3,
    d=5,
    dtype=torch.float32,
    scale=1.0,
):
    """Create q, k and v as in a model: views of ``(B, N, heads, d)``."""
    n = query_shape[0] * query_shape[1]
    m = n if key_shape is None else key_shape[0] * key_shape[1]
    return [
        (scale * torch.randn(batch, tokens, heads, d))
        .to(DEVICE, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for tokens in (n, m, m)
    ]


def run(inputs, shape, backend, dtype=None, cotangent=None, **kwargs):
    """Return the output and the gradients by name, in a given dtype."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = attend(*inputs, shape, backend=backend, **kwargs)
    if cotangent is None:
        torch.manual_seed(1)
        cotangent = torch.randn(out.shape)
    grads = torch.autograd.grad(out, inputs, cotangent.to(out))
    return dict(zip(('output', 'q', 'k', 'v'), (out, *grads)))


def compare(inputs, shape, tolerance=1e-5, **kwargs):
    """Compare float32 kernels with the float64 reference."""
    ours = run(inputs, shape, 'triton', **kwargs)
    wants = run(inputs, shape, 'reference', torch.float64, **kwargs)
    for name, want in wants.items():
        assert ours[name].dtype == inputs[0].dtype
        assert relative_error(ours[name].cpu(), want.cpu()) < tolerance, name


@pytest.mark.skipif(INTERPRETED or DEVICE == 'cuda', reason='it is running')
def test_interpreted():
    run_interpreted('test_triton_attention.py')


@needs_kernels
@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize('query_shape,key_shape', GRIDS)
def test_grids(query_shape, key_shape, clamp):
    batch = 2 if key_shape else 1
    inputs = make_inputs(query_shape, key_shape, batch, heads=2)
    # For one token, the gradient of q is proportional to eps, so eps is large.
    compare(inputs, query_shape, key_shape=key_shape, clamp=clamp, eps=1.0)


@needs_kernels
@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize('locality', LOCALITIES)
def test_localities(locality, clamp):
    inputs = make_inputs((6, 9), (3, 4), batch=1, d=8)
    compare(inputs, (6, 9), key_shape=(3, 4), locality=locality, clamp=clamp)


@needs_kernels
@pytest.mark.parametrize('d', [1, 24, 32, 48, 64, 128])
def test_head_dims(d):
    heads = 2 if d < 64 else 1
    inputs = make_inputs((4, 9), batch=1, heads=heads, d=d)
    compare(inputs, (4, 9), eps=1.0)


@needs_kernels
@pytest.mark.parametrize('scale', [0.1, 30.0])
def test_where_clamps_bite(scale):
    compare(make_inputs((5, 7), batch=1, heads=2, scale=scale), (5, 7))


@needs_kernels
def test_each_clamp():
    """Results are equal where each of the four clamps is active."""
    for values, eps in (
        ((1e-3, 100.0, 100.0), 1e-4),
        ((1e-9, 1.0, 1.0), 1e-5),
        ((100.0, 1.0, 10.0), 1e-4),
        ((10.0, 10.0, 1e-6), 1e-4),
    ):
        inputs = [
            torch.full((1, 1, 64, 2), value, device=DEVICE) for value in values
        ]
        ours = attend(*inputs, (8, 8), eps=eps, backend='triton')
        want = attend(
            *(t.double() for t in inputs), (8, 8), eps=eps, backend='reference'
        )
        assert relative_error(ours.cpu(), want.cpu()) < 1e-5, values


@needs_kernels
def test_more_chunks_than_one():
    """Sums over several chunks are correct; the last chunk is shorter."""
    compare(make_inputs((11, 15), batch=1, heads=1), (11, 15))
    compare(make_inputs((11, 15), batch=1, heads=1), (11, 15), clamp=False)


@needs_kernels
def test_normaliser_has_a_gradient():
    """The gradient of the normaliser is correct for equal values."""
    q, k, v = make_inputs((4, 6), batch=1)
    inputs = q, k, torch.ones_like(v)
    shape = dict(clamp=False, eps=1.0, cotangent=torch.ones(q.shape))
    assert run(inputs, (4, 6), 'reference', **shape)['q'].norm() > 1e-3
    compare(inputs, (4, 6), **shape)


@needs_kernels
def test_any_strides():
    """Inputs with arbitrary strides and a gradient with stride 0 work."""

    def gaps():
        wide = torch.randn(2, 3, 2 * 35, 10, device=DEVICE)
        return wide[:, :, ::2, 1::2]

    compare(
        [gaps() for _ in range(3)],
        (5, 7),
        cotangent=torch.ones(1).expand(2, 3, 35, 5),
    )


@needs_kernels
def test_one_projection_for_q_k_v():
    """q, k and v may be views of one tensor."""
    wide = torch.randn(2, 35, 3 * 3 * 8, device=DEVICE)
    inputs = wide.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind()
    compare(inputs, (5, 7))


@needs_kernels
def test_uninitialised_memory_is_written(monkeypatch):
    inputs = make_inputs((5, 14), (3, 4))
    poison(monkeypatch)
    ours = run(inputs, (5, 14), 'triton', key_shape=(3, 4))
    monkeypatch.undo()
    for name, t in ours.items():
        assert t.isfinite().all(), name


@needs_kernels
def test_same_bits_twice():
    inputs = make_inputs((11, 15), batch=1, heads=1)
    first, second = (run(inputs, (11, 15), 'triton') for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@needs_kernels
def test_inference_then_training():
    inputs = make_inputs((3, 5), batch=1)
    with torch.inference_mode():
        out = attend(*inputs, (3, 5), backend='triton')
    again = attend(*inputs, (3, 5), backend='triton')
    again.sum().backward()
    assert torch.equal(out, again)
    assert all(t.grad.isfinite().all() for t in inputs)


@needs_kernels
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('locality', LOCALITIES)
def test_low_precision(dtype, locality):
    """Errors are at most twice those of PyTorch in the same dtype."""
    inputs = make_inputs((8, 12), batch=1, heads=2, d=24, dtype=dtype)
    inputs[2] = inputs[2].abs() + 0.5  # keep values away from the clamps
    kwargs = dict(locality=locality)
    exact = run(inputs, (8, 12), 'reference', torch.float64, **kwargs)
    ours = run(inputs, (8, 12), 'triton', **kwargs)
    plain = [t.detach().requires_grad_() for t in inputs]
    out = reference.linear_attention(*plain, (8, 12), (8, 12), locality, 1e-4)
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape)
    grads = torch.autograd.grad(out, plain, cotangent.to(out))
    for (name, want), theirs in zip(exact.items(), (out, *grads)):
        assert ours[name].dtype == dtype
        error = relative_error(ours[name].cpu(), want.cpu())
        allowed = relative_error(theirs.cpu(), want.cpu())
        # shown by pytest -rP
        print(f'{name}: {error:.1e}, plain {allowed:.1e}')
        assert error <= 2 * allowed, name


@needs_kernels
@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize('dtype', HALF)
def test_no_overflow(dtype, clamp):
    # The key-value sums are 2e7, the maximum of float16 is 65504.
    q, k, v = (
        torch.full((1, 1, 256, 16), value, dtype=dtype, device=DEVICE)
        for value in (300.0, 300.0, 300.0)
    )
    ours = run(
        (q, k, v),
        (16, 16),
        'triton',
        clamp=clamp,
        cotangent=torch.full(q.shape, 1e-3),
    )
    for name, t in ours.items():
        assert t.isfinite().all(), name
    if not clamp:  # the mean of equal values
        torch.testing.assert_close(ours['output'], v, rtol=1e-2, atol=0)


@needs_kernels
def test_nan_is_not_hidden():
    for i in range(3):
        inputs = [t.detach() for t in make_inputs((3, 4), batch=1, heads=1)]
        inputs[i][0, 0, 5, 1] = float('nan')
        assert attend(*inputs, (3, 4), backend='triton').isnan().any()


@needs_kernels
@pytest.mark.parametrize('case', CASES)
def test_golden(golden, case):
    if DEVICE == 'cuda':
        pytest.skip('the golden module is compared on the CPU')
    errors = run_attention(golden, case, torch.float32, 'triton')
    output, grad = TOLERANCE[torch.float32]
    assert errors.pop('output') < output
    for name, error in errors.items():
        assert error < grad, name


@needs_kernels
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_in_one_graph(dynamic):
    inputs = make_inputs((5, 7), batch=2)
    torch._dynamo.reset()
    compiled = torch.compile(
        attend, fullgraph=True, dynamic=dynamic, backend='aot_eager'
    )
    out = compiled(*inputs, (5, 7), backend='triton')
    expected = attend(*inputs, (5, 7), backend='triton')
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    grads = torch.autograd.grad(out.square().sum(), inputs)
    wants = torch.autograd.grad(expected.square().sum(), inputs)
    for name, grad, want in zip('qkv', grads, wants):
        torch.testing.assert_close(grad, want, msg=name)


@needs_kernels
def test_what_the_kernels_refuse():
    for change, reason in (
        (dict(dtype=torch.float64), 'q is torch.float64'),
        (dict(d=129), 'at most 128 channels per head, q has 129'),
        (dict(batch=0), 'empty tensors: q'),
    ):
        inputs = make_inputs((2, 2), **change)
        with pytest.raises(RuntimeError, match=reason):
            attend(*inputs, (2, 2), backend='triton')
        attend(*inputs, (2, 2))
    q, k, v = make_inputs((2, 2))
    with pytest.raises(RuntimeError, match='of the same dtype'):
        attend(q, k.half(), v, (2, 2), backend='triton')


@needs_kernels
def test_triton_runs_where_it_is_asked_for_alone():
    t = torch.zeros(1, 1, 4, 2, device=DEVICE)
    assert check_backend('auto', dict(t=t)) == 'torch'
    assert check_backend('triton', dict(t=t)) == 'triton'
