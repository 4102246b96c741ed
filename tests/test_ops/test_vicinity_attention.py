"""Compare the linear forms with the quadratic reference."""

import sys
import threading

import pytest
import torch

from mmvvt.ops import LOCALITIES, angles, linear, reference
from mmvvt.ops import vicinity_attention as attend

from conftest import relative_error, run_tool

# Query and key grids (h, w): square, wide, one row, one column, one token, and
# a different key grid
GRIDS = [
    ((7, 7), None),
    ((5, 13), None),
    ((1, 11), None),
    ((9, 1), None),
    ((1, 1), None),
    ((6, 9), (3, 4)),
]


def make_inputs(query_shape, key_shape, heads=3, d=5, batch=2, scale=1.0):
    n = query_shape[0] * query_shape[1]
    m = n if key_shape is None else key_shape[0] * key_shape[1]
    return [
        (
            torch.randn(batch, heads, tokens, d, dtype=torch.float64) * scale
        ).requires_grad_()
        for tokens in (n, m, m)
    ]


def oracle(q, k, v, query_shape, key_shape, locality):
    return reference.quadratic_attention(
        q, k, v, query_shape, key_shape or query_shape, locality, 1e-4
    )


@pytest.fixture(params=['rows and columns', 'one wide product'])
def both_forms(request, monkeypatch):
    """Run a test with the forms for large and for small grids."""
    if request.param == 'rows and columns':
        monkeypatch.setattr(linear, 'WIDE_TOKENS', 0)


@pytest.mark.usefixtures('both_forms')
@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('query_shape,key_shape', GRIDS)
def test_linear_equals_quadratic(query_shape, key_shape, locality):
    q, k, v = make_inputs(query_shape, key_shape)
    expected = oracle(q, k, v, query_shape, key_shape, locality)
    cotangent = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), cotangent)

    out = attend(
        q,
        k,
        v,
        query_shape,
        key_shape=key_shape,
        locality=locality,
        clamp=False,
        backend='torch',
    )
    grads = torch.autograd.grad(out, (q, k, v), cotangent)
    assert relative_error(out, expected) < 1e-10
    for name, grad, want in zip('qkv', grads, expected_grads):
        assert relative_error(grad, want) < 1e-10, name


@pytest.mark.parametrize('locality', LOCALITIES)
def test_oracle_by_hand(locality):
    """The reference equals the definition for two tokens."""
    import math

    q = torch.tensor([[[[2.0], [3.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[5.0], [7.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[1.0], [-1.0]]]], dtype=torch.float64)
    # a grid of 2 x 1: row angles 0 and pi / 4, column angle 0
    far = {
        'sum': math.cos(math.pi / 4) + 1,
        'product': math.cos(math.pi / 4),
        '1d': math.cos(math.pi / 4),
        'none': 1.0,
    }[locality]
    near = 2.0 if locality == 'sum' else 1.0
    weights = [[2 * 5 * near, 2 * 7 * far], [3 * 5 * far, 3 * 7 * near]]
    expected = [(w[0] - w[1]) / (w[0] + w[1] + 1e-4) for w in weights]
    out = attend(
        q, k, v, (2, 1), locality=locality, clamp=False, backend='reference'
    )
    # the angles are computed in float32
    torch.testing.assert_close(
        out.flatten(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=1e-7,
    )


@pytest.mark.usefixtures('both_forms')
@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('scale', [0.1, 1.0, 1e2])
def test_clamped_forms_agree(locality, scale):
    """Results are equal for small and large values that are clamped."""
    q, k, v = make_inputs((6, 9), (3, 4), scale=scale)
    results = {}
    for backend in ('reference', 'torch'):
        out = attend(
            q,
            k,
            v,
            (6, 9),
            key_shape=(3, 4),
            locality=locality,
            backend=backend,
        )
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        results[backend] = (out, *grads)
    for name, ours, plain in zip(
        ('output', 'q', 'k', 'v'), results['torch'], results['reference']
    ):
        assert relative_error(ours, plain) < 1e-9, name


@pytest.mark.usefixtures('both_forms')
def test_normaliser_has_a_gradient():
    """The gradient of the normaliser is correct for equal values."""
    q, k, _ = make_inputs((4, 6), None)
    v = torch.ones_like(k)
    out = attend(q, k, v, (4, 6), clamp=False, eps=1.0, backend='torch')
    expected = reference.quadratic_attention(
        q, k, v, (4, 6), (4, 6), 'sum', 1.0
    )
    grads = torch.autograd.grad(out.sum(), (q, k))
    wants = torch.autograd.grad(expected.sum(), (q, k))
    for grad, want in zip(grads, wants):
        assert want.norm() > 1e-3
        assert relative_error(grad, want) < 1e-10


@pytest.mark.usefixtures('both_forms')
@pytest.mark.parametrize('locality', LOCALITIES)
def test_gradcheck(locality):
    q, k, v = make_inputs((2, 3), None, heads=1, d=2, batch=1)

    def f(q, k, v):
        # Avoid inputs close to 0, where the ReLU is not differentiable.
        return attend(
            q.abs() + 0.1,
            k.abs() + 0.1,
            v,
            (2, 3),
            locality=locality,
            backend='torch',
        )

    assert torch.autograd.gradcheck(f, (q, k, v))


@pytest.mark.usefixtures('both_forms')
@pytest.mark.parametrize('key_shape', [None, (3, 2)])
@pytest.mark.parametrize('locality', LOCALITIES)
def test_gradients_have_gradients(locality, key_shape):
    q, k, v = make_inputs((4, 5), key_shape)
    results = {}
    for backend in ('reference', 'torch'):
        out = attend(
            q,
            k,
            v,
            (4, 5),
            key_shape=key_shape,
            locality=locality,
            backend=backend,
        )
        # without the gradient of k
        grads = torch.autograd.grad(out.sin().sum(), (q, v), create_graph=True)
        again = torch.autograd.grad(
            sum(g.square().sum() for g in grads), (q, k, v)
        )
        results[backend] = (*grads, *again)
    for ours, plain in zip(results['torch'], results['reference']):
        assert plain.norm() > 0
        assert relative_error(ours, plain) < 1e-9


@pytest.mark.parametrize('wanted', ['q', 'k', 'v', 'qv'])
def test_gradients_of_some_inputs(wanted):
    inputs = dict(zip('qkv', (t.detach() for t in make_inputs((4, 5), None))))
    for name in wanted:
        inputs[name].requires_grad_()
    for create_graph in (False, True):
        grads = [
            torch.autograd.grad(
                attend(**inputs, spatial_shape=(4, 5), backend=backend)
                .sin()
                .sum(),
                [inputs[name] for name in wanted],
                create_graph=create_graph,
            )
            for backend in ('torch', 'reference')
        ]
        for ours, plain in zip(*grads):
            assert relative_error(ours, plain) < 1e-10


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('locality', LOCALITIES)
def test_keeps_its_inputs_and_small_sums(locality, dtype):
    q, k, v = (
        t.detach().to(dtype).requires_grad_()
        for t in make_inputs((16, 16), None)
    )
    inputs = {t.data_ptr() for t in (q, k, v)}
    kept = []

    def pack(t):
        if t.data_ptr() not in inputs:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attend(q, k, v, (16, 16), locality=locality, backend='torch')
    out.float().sum().backward()
    # (B, heads, n, d, d + 1)
    copies = {'sum': 4, 'product': 4, '1d': 2, 'none': 1}[locality]
    assert kept == [2 * 3 * copies * 5 * 6]
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == dtype


def test_backward_leaves_the_gradient_it_is_given():
    q, k, v = make_inputs((4, 5), None)
    out = attend(q, k, v, (4, 5), backend='torch')
    cotangent = torch.randn_like(out)
    before = cotangent.clone()
    torch.autograd.grad(out, (q, k, v), cotangent)
    assert torch.equal(cotangent, before)


def test_backward_inside_autocast():
    q, k, v = (
        t.detach().float().requires_grad_() for t in make_inputs((9, 12), None)
    )
    expected = torch.autograd.grad(
        attend(q, k, v, (9, 12), backend='torch').sum(), (q, k, v)
    )
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = attend(q, k, v, (9, 12), backend='torch')
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, want in zip(grads, expected):
        assert torch.equal(grad, want)


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize('locality', LOCALITIES)
def test_low_precision(dtype, locality):
    """Errors are at most twice those of the reference in the same dtype."""
    q, k, v = (t.detach().to(dtype) for t in make_inputs((16, 20), None))
    exact = reference.linear_attention(
        q.double(), k.double(), v.double(), (16, 20), (16, 20), locality, 1e-4
    )
    plain = reference.linear_attention(
        q, k, v, (16, 20), (16, 20), locality, 1e-4
    )
    ours = attend(q, k, v, (16, 20), locality=locality, backend='torch')
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('clamp', [True, False])
def test_no_overflow_at_a_million_tokens(dtype, clamp):
    shape = (1, 1, 1024 * 1024, 4)
    # The sums of keys are 1e8, the maximum of float16 is 65504.
    q, k = (torch.full(shape, 100.0, dtype=dtype) for _ in range(2))
    v = torch.randn(shape).to(dtype)
    out = attend(q, k, v, (1024, 1024), clamp=clamp, backend='torch')
    assert out.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_sums(dtype):
    q, k, v = (t.detach().float() for t in make_inputs((9, 12), None))
    expected = attend(q, k, v, (9, 12), backend='torch')
    with torch.autocast('cpu', dtype=dtype):
        out = attend(q, k, v, (9, 12), backend='torch')
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize('locality', ['sum', 'product'])
@pytest.mark.parametrize('grid', [(5, 7), (1, 3), (4, 1)])
def test_separate_factors(locality, grid):
    """Factors of a row times those of a column are those of the token."""
    options = (grid, locality, torch.float64, torch.device('cpu'))
    of_rows, of_columns = angles.separate_factors(*options)
    # (h, 1, n, g) @ (w, g, 1) -> (h, w, n, 1) -> (h * w, n)
    factors = (of_rows[:, None] @ of_columns[..., None]).flatten(0, 1)
    expected = angles.token_factors(*options)
    assert relative_error(factors.squeeze(-1), expected) < 1e-15


@pytest.mark.parametrize(
    'shape,table',
    [((12, 12), 'build_token_factors'), ((12, 13), 'build_axis_factors')],
)
def test_small_grids_take_the_wide_product(shape, table, monkeypatch):
    monkeypatch.setattr(angles, '_cache', type(angles._cache)())
    attend(*make_inputs(shape, None), shape, backend='torch')
    assert [key[0] for key in angles._cache] == [getattr(angles, table)]


@pytest.mark.usefixtures('both_forms')
def test_tables_are_built_once(monkeypatch):
    built = []
    for name in ('build_axis_factors', 'build_token_factors'):
        build = getattr(angles, name)
        monkeypatch.setattr(
            angles, name, lambda *a, build=build: built.append(a) or build(*a)
        )
    monkeypatch.setattr(angles, '_cache', type(angles._cache)())
    q, k, v = make_inputs((4, 5), None)
    attend(q, k, v, (4, 5), backend='torch')
    of_a_call = len(built)
    assert of_a_call > 0
    for _ in range(3):
        attend(q, k, v, (4, 5), backend='torch').sum().backward()
    assert len(built) == of_a_call
    attend(q.float(), k.float(), v.float(), (4, 5), backend='torch')
    assert len(built) == 2 * of_a_call  # different dtype
    q, k, v = make_inputs((5, 4), None)
    attend(q, k, v, (5, 4), backend='torch')
    assert len(built) == 3 * of_a_call  # different grid


def test_table_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(angles, '_cache', type(angles._cache)())
    monkeypatch.setattr(angles, 'MAX_CACHED_TABLES', 4)
    for h in range(1, 10):
        angles.axis_factors((h, 1), torch.float32, torch.device('cpu'))
    assert [key[1] for key in angles._cache] == [(h, 1) for h in range(6, 10)]


def test_table_cache_serves_many_threads(monkeypatch):
    """Threads can use the cache while others remove its entries."""
    monkeypatch.setattr(angles, '_cache', type(angles._cache)())
    monkeypatch.setattr(angles, 'MAX_CACHED_TABLES', 2)
    errors = []

    def look_up(first):
        try:
            for i in range(500):
                h = (first + i) % 5 + 1
                rows, cols = angles.axis_factors(
                    (h, 2), torch.float32, torch.device('cpu')
                )
                assert rows.shape == (2, h) and cols.shape == (2, 2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up, args=(i,)) for i in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len(angles._cache) <= 2


@pytest.mark.usefixtures('both_forms')
def test_tables_made_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(angles, '_cache', type(angles._cache)())
    q, k, v = make_inputs((3, 5), None)
    for locality in LOCALITIES:
        with torch.inference_mode():
            attend(q, k, v, (3, 5), locality=locality, backend='torch')
        out = attend(q, k, v, (3, 5), locality=locality, backend='torch')
        out.sum().backward()
        # Double backward saves the tables for the backward pass.
        out = attend(q, k, v, (3, 5), locality=locality, backend='torch')
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        grad.sum().backward()
    assert q.grad.isfinite().all()


def test_one_graph_serves_small_and_large_grids():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(
        attend, fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((8, 12), (20, 30), (9, 11)):
        compiled(*make_inputs(shape, None), shape, backend='torch')
    assert counter.frame_count == 1


@pytest.mark.parametrize('locality', LOCALITIES)
def test_compiles_in_one_graph(locality):
    q, k, v = make_inputs((5, 7), None)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
    out = compiled(q, k, v, (5, 7), locality=locality)
    expected = attend(q, k, v, (5, 7), locality=locality)
    assert relative_error(out, expected) < 1e-12
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wants = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for name, grad, want in zip('qkv', grads, wants):
        assert relative_error(grad, want) < 1e-9, name


@pytest.mark.parametrize('skipped', range(4))
def test_each_clamp_of_the_op_matters(skipped, monkeypatch):
    """Without any one of the clamps, the output changes."""
    n = 64
    inputs = {
        # key-value sums above 1e4
        0: (
            torch.full((1, 1, n, 2), 1e-3),
            torch.full((1, 1, n, 2), 100.0),
            torch.full((1, 1, n, 2), 100.0),
        ),
        # sum of weights close to 0: the normaliser is 1 / eps = 1e5
        1: (
            torch.full((1, 1, n, 2), 1e-9),
            torch.ones(1, 1, n, 2),
            torch.ones(1, 1, n, 2),
        ),
        # numerator above 1e4, key-value sums below 1e4
        2: (
            torch.full((1, 1, n, 2), 100.0),
            torch.ones(1, 1, n, 2),
            torch.full((1, 1, n, 2), 10.0),
        ),
        # output below 1e-4
        3: (
            torch.full((1, 1, n, 2), 10.0),
            torch.full((1, 1, n, 2), 10.0),
            torch.full((1, 1, n, 2), 1e-6),
        ),
    }[skipped]
    eps = 1e-5 if skipped == 1 else 1e-4

    def run():
        return reference.linear_attention(*inputs, (8, 8), (8, 8), 'sum', eps)

    ours = attend(*inputs, (8, 8), eps=eps, backend='torch')
    torch.testing.assert_close(ours, run())
    clamp, calls = reference.magnitude_clamp, []

    def skip_one(t):
        calls.append(t)
        return t if len(calls) - 1 == skipped else clamp(t)

    monkeypatch.setattr(reference, 'magnitude_clamp', skip_one)
    assert relative_error(run(), ours) > 1e-3
    assert len(calls) == 4


def test_backend_module_is_the_one_that_runs(monkeypatch):
    q, k, v = make_inputs((2, 2), None)
    ran = []
    for module, name in (
        (linear, 'linear_attention'),
        (reference, 'linear_attention'),
        (reference, 'quadratic_attention'),
    ):
        monkeypatch.setattr(
            module,
            name,
            lambda *a, tag=f'{module.__name__}.{name}', **k: ran.append(tag)
            or a[0],
        )
    attend(q, k, v, (2, 2))
    attend(q, k, v, (2, 2), backend='reference')
    attend(q, k, v, (2, 2), backend='reference', clamp=False)
    assert ran == [
        'mmvvt.ops.linear.linear_attention',
        'mmvvt.ops.reference.linear_attention',
        'mmvvt.ops.reference.quadratic_attention',
    ]


@pytest.mark.parametrize(
    'change,message',
    [
        (
            dict(spatial_shape=(3, 4)),
            r'spatial_shape \(3, 4\) has 12 tokens, but '
            'q has 6',
        ),
        (
            dict(key_shape=(2, 2)),
            r'key_shape \(2, 2\) has 4 tokens, but k has 6',
        ),
        (dict(spatial_shape=(0, 6)), 'spatial_shape must be .* at least 1'),
        (dict(locality='2d'), "locality must be one of .*, got '2d'"),
        (dict(backend='cuda'), "backend must be one of .*, got 'cuda'"),
        (
            dict(q=torch.zeros(6, 4)),
            r'q must be \(B, heads, tokens, d\), got '
            r'shape \(6, 4\)',
        ),
        (dict(v=torch.zeros(1, 2, 6, 5)), 'k and v must have the same shape'),
        (dict(q=torch.zeros(1, 2, 6, 5)), 'must have the same B, heads and d'),
        (
            dict(v=torch.zeros(1, 2, 6, 4).long()),
            'v must be floating point, got torch.int64',
        ),
    ],
)
def test_bad_input(change, message):
    arguments = dict(
        q=torch.zeros(1, 2, 6, 4),
        k=torch.zeros(1, 2, 6, 4),
        v=torch.zeros(1, 2, 6, 4),
        spatial_shape=(2, 3),
    )
    with pytest.raises(ValueError, match=message):
        attend(**{**arguments, **change})


def test_backend_that_cannot_run_says_why():
    t = torch.zeros(1, 1, 4, 2)
    with pytest.raises(RuntimeError, match='Triton.*use .*torch'):
        attend(t, t, t, (2, 2), backend='triton')


def test_default_backend_from_the_environment():
    code = 'from mmvvt.ops import check_backend; print(check_backend("auto"))'
    done = run_tool('-c', code, env={'MMVVT_BACKEND': 'reference'})
    assert done.stdout.split()[-1] == 'reference'
    done = run_tool('-c', code, env={'MMVVT_BACKEND': 'fast'})
    assert done.returncode != 0
    assert 'MMVVT_BACKEND must be one of' in done.stdout
    assert "got 'fast'" in done.stdout


@pytest.mark.parametrize('grid', [(2, 2), (20, 20)])
def test_empty_batch(grid):
    """Small grids and large ones, which are summed by rows and columns."""
    tokens = grid[0] * grid[1]
    inputs = [
        torch.randn(0, 2, tokens, 4, requires_grad=True) for _ in range(3)
    ]
    out = attend(*inputs, grid, backend='torch')
    out.sum().backward()
    assert out.shape == (0, 2, tokens, 4)
    assert inputs[0].grad.shape == (0, 2, tokens, 4)
