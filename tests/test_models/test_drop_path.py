"""Stochastic depth in eager mode and in compiled graphs."""

import pytest
import torch
from mmcv.cnn.bricks import DropPath as DropPathOfMmcv
from torch._dynamo.testing import CompileCounterWithBackend

from mmvvt.models.drop_path import DropPath


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, backend='aot_eager', fullgraph=True)


@pytest.mark.parametrize('shape', [(64, 5, 3), (64, 3, 4, 4), (64, 2)])
@pytest.mark.parametrize('rate', [0.0, 0.2, 0.9])
def test_same_as_mmcv(shape, rate):
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    torch.manual_seed(1)
    expected = DropPathOfMmcv(rate)(x)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    for module in (DropPath(rate), compiled(DropPath(rate))):
        torch.manual_seed(1)
        out = module(x)
        (found,) = torch.autograd.grad(out, x, grad)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(found, wanted)


def test_unchanged_in_evaluation():
    x = torch.randn(2, 5, 3)
    assert torch.equal(compiled(DropPath(0.5).eval())(x), x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_nothing_is_doubled_in_half_precision(dtype):
    """A random number just below 1, plus 1, is rounded to 2."""
    x = torch.ones(100_000, 1, dtype=dtype)
    assert torch.equal(compiled(DropPath(0.0))(x), x)


@pytest.mark.skipif(
    torch._dynamo.config.specialize_float,
    reason='this PyTorch makes numbers constants',
)
def test_one_graph_for_all_rates():
    counter = CompileCounterWithBackend('aot_eager')
    for rate in (0.1, 0.0, 0.2, 0.3, 0.4):
        module = DropPath(rate)
        module.compile(backend=counter, fullgraph=True, dynamic=True)
        x = torch.ones(1000, 1, 1, requires_grad=True)
        out = module(x)
        out.sum().backward()
        assert torch.equal(x.grad, out.detach())
        kept = (out > 0).float().mean().item()
        assert kept == pytest.approx(1 - rate, abs=0.06)
        assert out.max().item() == pytest.approx(1 / (1 - rate))
    assert counter.frame_count == 1
