"""Tests of the checks for machines with a GPU, on the CPU."""

import math

import pytest
import torch

from mmvvt.analysis import gpu, kernel_errors
from mmvvt.analysis.kernel_errors import (
    ATTENTION,
    CEILING,
    CONVOLUTION,
    FLOORS,
    Case,
    KernelError,
    attention_errors,
    compare,
    convolution_errors,
    plain_dwconv_gelu,
)
from mmvvt.errors import BackendError


@pytest.fixture
def x():
    return dict(x=torch.randn(64))


def test_errors_are_compared_with_plain_pytorch(x):
    errors = compare(lambda x: x.sin(), lambda x: x.sin(), x)
    assert set(errors) == {'output', 'x'}
    for error, allowed in errors.values():
        assert error <= allowed == FLOORS[torch.float32]
    x['x'] = x['x'].bfloat16()
    # rounded twice as often as plain PyTorch
    for error, allowed in compare(
        lambda x: x.sin(), lambda x: x.sin(), x
    ).values():
        assert allowed == max(2 * error, FLOORS[torch.bfloat16])


@pytest.mark.parametrize(
    'wrong',
    [lambda x: 1.001 * x.sin(), lambda x: x.sin() * torch.nan],
)
def test_wrong_kernel(wrong, x):
    for pair in compare(wrong, lambda x: x.sin(), x).values():
        assert not KernelError('k', 'c', 'float32', 'x', *pair).passed


def test_wrong_gradient_alone(x):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos() * 1.01

    errors = compare(Wrong.apply, lambda x: x.sin(), x)
    passed = {
        name: KernelError('k', 'c', 'float32', name, *pair).passed
        for name, pair in errors.items()
    }
    assert passed == dict(output=True, x=False)


def test_overflow_of_plain_pytorch(x):
    """Where plain float16 overflows, the error of bfloat16 is the measure."""

    def plain(x):
        return (100 * x) ** 3 / 1e6

    x['x'] = x['x'].double().half()
    assert not plain(x['x']).isfinite().all()
    half = compare(plain, plain, x)
    x['x'] = x['x'].bfloat16()
    bfloat16 = compare(plain, plain, x)
    for name, (error, allowed) in half.items():
        assert not error <= allowed, name
        assert allowed < 2 * bfloat16[name][1]


def test_ceiling(x):
    """An error of 100 % is not allowed, even if plain PyTorch has it."""

    def plain(x):
        return x + 2.0**30 - 2.0**30

    _, allowed = compare(plain, plain, x)['output']
    assert allowed == CEILING


@pytest.mark.parametrize('dtype', FLOORS)
def test_cases_of_the_gpu(dtype):
    """The torch backend is exact in the largest cases, in all dtypes.

    Otherwise the inputs would reach the bounds of the clamps, where rounding
    changes the gradients.
    """
    errors = attention_errors(
        Case((33, 47), 1, 1, 32), dtype, 'cpu', backend='torch'
    )
    errors += convolution_errors(
        Case((9, 5), 2, 1, 12), dtype, 'cpu', plain_dwconv_gelu
    )
    assert [e.tensor for e in errors] == [
        *('output', 'q', 'k', 'v'),
        *('output', 'x', 'weight', 'bias'),
    ]
    for e in errors:
        assert e.passed, e


def test_cases_are_complete():
    """Each locality is checked, with clamps and without, and each stage."""
    assert {(c.locality, c.clamp) for c in ATTENTION} == {
        (name, clamp)
        for name in ('sum', 'product', '1d', 'none')
        for clamp in (True, False)
    }
    assert {32, 40, 48, 64, 128} <= {c.width for c in ATTENTION}
    assert {768, 1280, 2048} <= {c.width for c in CONVOLUTION}


def test_kernel_that_cannot_be_launched(monkeypatch):
    """An error in one case does not hide the others."""

    def fail(case, dtype, device):
        raise RuntimeError('out of resources\nshared memory')

    monkeypatch.setattr(kernel_errors, 'attention_errors', fail)
    monkeypatch.setattr(kernel_errors, 'convolution_errors', lambda *_: [])
    errors = kernel_errors.kernel_errors('cpu', small=True)
    assert len(errors) == 3 * len(kernel_errors.SMALL_ATTENTION)
    for e in errors:
        assert not e.passed
        assert e.tensor == (
            'raised RuntimeError: out of resources shared memory'
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason='the kernels run here')
def test_machine_that_cannot_run_the_kernels():
    with pytest.raises(BackendError, match="'triton' cannot run"):
        kernel_errors.kernel_errors('cpu', small=True)


def test_environment_and_what_is_missing(monkeypatch):
    class Properties:
        name = 'Some GPU'
        major, minor = 7, 5
        multi_processor_count = 40
        total_memory = 15 * 2**30

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    found = gpu.environment()
    assert found['GPU'] == found['GPU memory'] == 'N/A'
    assert found['torch'].startswith(torch.__version__.split('+')[0])
    assert any('finds no GPU' in reason for reason in gpu.missing())
    assert not gpu.can_run_kernels()

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Some GPU')
    monkeypatch.setattr(
        torch.cuda, 'get_device_properties', lambda _: Properties
    )
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (7, 5))
    found = gpu.environment()
    assert found['GPU'] == 'Some GPU'
    assert found['compute capability'] == '7.5'
    assert found['GPU memory'] == '15.0 GiB'
    assert found['machine'].startswith('Some GPU, ')
    assert any('8.0 or higher' in reason for reason in gpu.missing())
    assert not gpu.can_run_kernels()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (9, 0))
    if gpu.HAS_TRITON:
        assert gpu.can_run_kernels()
    monkeypatch.setattr(gpu, 'HAS_TRITON', False)
    assert any('Triton is not' in reason for reason in gpu.missing())
    assert not gpu.can_run_kernels()


def test_times_of_operations():
    bandwidth = gpu.copy_bandwidth('cpu', 1 << 16, runs=2)
    assert 0 < bandwidth < math.inf
    rows = gpu.op_times(
        'cpu',
        1e9,
        'tiny',
        batch=2,
        side=33,
        dtype='float32',
        backends=('torch', 'reference'),
        runs=1,
    )
    assert [
        (r.operation, r.mode, r.backend) for r in rows if r.stage == 1
    ] == [
        ('attention', 'forward', 'torch'),
        ('attention', 'forward', 'reference'),
        ('attention', 'train_step', 'torch'),
        ('attention', 'train_step', 'reference'),
        ('convolution', 'forward', 'torch'),
        ('convolution', 'train_step', 'torch'),
    ]
    assert {r.stage for r in rows} == {1, 2, 3, 4}
    # 33 pixels are 9 x 9 tokens at stride 4: q, k, v and the output
    tokens = 2 * 81 * 48 * 4
    assert rows[0].shape == '2 x 81 x 1 x 48'
    assert rows[0].least_bytes == 4 * tokens
    # and in the backward pass q, k, v, the gradient, and three gradients
    assert rows[2].least_bytes == 11 * tokens
    # x and the output, weights and bias
    assert rows[4].least_bytes == 2 * 2 * 81 * 768 * 4 + 768 * 10 * 4
    for r in rows:
        assert r.least_seconds == pytest.approx(r.least_bytes / 1e9)
        assert 0 < r.seconds_p20 <= r.seconds <= r.seconds_p80
    with pytest.raises(ValueError, match='1 or more, got 0 and 1$'):
        gpu.op_times('cpu', 1e9, batch=0, runs=1)
