"""Tests of the values and gradients of the magnitude clamp."""

import pytest
import torch

from mmvvt.ops import magnitude_clamp, reference

# Zero, and points below, at and above each bound
POINTS = [0.0, 1e-9, 9e-5, 1e-4, 2e-4, 1.0, 9e3, 1e4, 1.1e4, 1e30]


@pytest.mark.parametrize('clamp', [magnitude_clamp, reference.magnitude_clamp])
def test_values_and_gradient(clamp):
    positive = torch.tensor(POINTS, dtype=torch.float64)
    t = torch.cat([positive, -positive]).requires_grad_()
    out = clamp(t)
    out.sum().backward()
    inside = (t.abs() >= 1e-4) & (t.abs() <= 1e4)
    expected = t.sign() * t.abs().clip(1e-4, 1e4)
    assert torch.equal(out, expected)
    compared = torch.full_like(t, True, dtype=torch.bool)
    if clamp is reference.magnitude_clamp:
        # The gradient of torch.clamp at a bound is 1 in PyTorch 2.11 and 0 in
        # PyTorch 2.14.
        compared = (t.abs() != 1e-4) & (t.abs() != 1e4)
    assert torch.equal(t.grad[compared], inside.double()[compared])
    assert (out[t == 0] == 0).all()


@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32]
)
def test_keeps_the_dtype(dtype):
    t = torch.tensor([1e-5, 3.0, -6e4], dtype=dtype)
    out = magnitude_clamp(t)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, torch.tensor([1e-4, 3.0, -1e4], dtype=dtype)
    )


def test_does_not_change_its_input():
    t = torch.tensor([1e-5, 3e4])
    magnitude_clamp(t)
    assert torch.equal(t, torch.tensor([1e-5, 3e4]))


def test_inplace_only_where_autograd_does_not_record():
    t = torch.tensor([1e-5, 3e4])
    assert magnitude_clamp(t, inplace=True) is t
    assert torch.equal(t, torch.tensor([1e-4, 1e4]))
    t = torch.tensor([1e-5, 3e4], requires_grad=True)
    magnitude_clamp(t, inplace=True)
    assert torch.equal(t, torch.tensor([1e-5, 3e4]))
