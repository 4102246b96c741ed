"""The magnitude clamp of the official arithmetic."""

import torch
from torch import Tensor

from .autograd import is_transformed, needs_custom_backward

# Bounds of the official code; published checkpoints were trained with them.
CLAMP_MIN, CLAMP_MAX = 1e-4, 1e4


def clamp_in_place(t: Tensor) -> Tensor:
    """:func:`magnitude_clamp` in place, outside autograd."""
    sign = t.sign()
    return t.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


def mask_clamp_grad(grad: Tensor, t: Tensor) -> Tensor:
    """Gradient of ``t`` from that of :func:`magnitude_clamp`, in place."""
    magnitude = t.abs()
    return grad.mul_(
        (magnitude >= CLAMP_MIN).logical_and_(magnitude <= CLAMP_MAX)
    )


class _MagnitudeClamp(torch.autograd.Function):
    """Keeps one byte an element for the backward pass, not four copies."""

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
    """``sign(t) * clip(|t|, 1e-4, 1e4)``, and 0 where ``t`` is 0.

    Its gradient is 1 where ``1e-4 <= |t| <= 1e4`` and 0 elsewhere. The
    bounds are those of the official code (see :mod:`mmvvt.ops.reference` for
    the same in plain operations).

    Args:
        t (Tensor): Any shape, any floating-point type.
        inplace (bool): Overwrite ``t`` where autograd does not record.
            Defaults to False.

    Returns:
        Tensor: Shape and dtype of ``t``.
    """
    if is_transformed():
        return t.sign() * t.abs().clamp(CLAMP_MIN, CLAMP_MAX)
    if needs_custom_backward(t):
        return _MagnitudeClamp.apply(t)
    return clamp_in_place(t if inplace else t.clone())
