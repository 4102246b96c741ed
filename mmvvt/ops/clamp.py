"""Magnitude clamp of the official VVT implementation."""

import torch
from torch import Tensor

from .autograd import is_transformed, needs_custom_backward

# Bounds of the official code. The published checkpoints were trained with
# them.
CLAMP_MIN, CLAMP_MAX = 1e-4, 1e4


def clamp_in_place(t: Tensor) -> Tensor:
    """Apply :func:`magnitude_clamp` in place, without autograd support."""
    sign = t.sign()
    return t.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


def mask_clamp_grad(grad: Tensor, t: Tensor) -> Tensor:
    """Compute the gradient of :func:`magnitude_clamp` in place.

    Args:
        grad (Tensor): Gradient of the output, modified in place.
        t (Tensor): Input of the clamp, of the same shape.

    Returns:
        Tensor: ``grad``, set to 0 where ``|t|`` is outside the bounds.
    """
    magnitude = t.abs()
    return grad.mul_(
        (magnitude >= CLAMP_MIN).logical_and_(magnitude <= CLAMP_MAX)
    )


class _MagnitudeClamp(torch.autograd.Function):
    """Autograd function of the clamp that only saves a boolean mask.

    It saves one byte per element for the backward pass, instead of the four
    intermediate tensors that autograd would save.
    """

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        magnitude = t.abs()
        ctx.save_for_backward(
            (magnitude >= CLAMP_MIN) & (magnitude <= CLAMP_MAX)
        )
        return magnitude.clamp_(CLAMP_MIN, CLAMP_MAX).mul_(t.sign())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grad * inside


def magnitude_clamp(t: Tensor, inplace: bool = False) -> Tensor:
    """Clamp the magnitude of each element to [1e-4, 1e4].

    Computes ``sign(t) * clip(|t|, 1e-4, 1e4)``, which is 0 where ``t`` is 0.
    The gradient is 1 where ``1e-4 <= |t| <= 1e4`` and 0 elsewhere. The bounds
    are those of the official code. See :mod:`mmvvt.ops.reference` for the
    reference implementation.

    Args:
        t (Tensor): Floating-point tensor of any shape.
        inplace (bool): Whether to modify ``t`` in place if no gradient is
            recorded. Defaults to False.

    Returns:
        Tensor: Clamped tensor with the shape and dtype of ``t``.
    """
    if is_transformed():
        return t.sign() * t.abs().clamp(CLAMP_MIN, CLAMP_MAX)
    if needs_custom_backward(t):
        return _MagnitudeClamp.apply(t)
    return clamp_in_place(t if inplace else t.clone())
