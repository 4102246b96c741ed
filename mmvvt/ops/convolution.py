"""Fused depthwise convolution and GELU on tokens."""

from typing import Tuple

import torch
from torch import Tensor

from ..errors import UserError
from .autograd import autocast_enabled
from .dispatch import check_backend, check_grid


def dwconv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: Tuple[int, int]
) -> Tensor:
    """Apply a depthwise 3x3 convolution followed by the exact GELU.

    The convolution has padding 1 and a bias. The forward and backward passes
    are fused Triton kernels for NVIDIA GPUs.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)`` in row-major order, in
            float32, bfloat16 or float16.
        weight (Tensor): Weight of shape ``(C, 1, 3, 3)``, in one of these
            dtypes.
        bias (Tensor): Bias of shape ``(C, )``, in one of these dtypes.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.

    Returns:
        Tensor: Output of shape ``(B, N, C)``, in the autocast dtype if
        autocast is enabled, and in the dtype of ``x`` otherwise.

    Raises:
        UserError: If the shapes do not match.
        BackendError: If the Triton kernel cannot run with these arguments.
    """
    if x.dim() != 3:
        raise UserError(f'x must be (B, N, C), got shape {tuple(x.shape)}')
    channels = x.shape[-1]
    if weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
        raise UserError(
            f'weight and bias must be ({channels}, 1, 3, 3) and ({channels},) '
            f'for x {tuple(x.shape)}, got {tuple(weight.shape)} and '
            f'{tuple(bias.shape)}'
        )
    spatial_shape = check_grid('spatial_shape', spatial_shape, x.shape[1], 'x')
    check_backend('triton', dict(x=x, weight=weight, bias=bias))
    from .triton_kernels import dwconv_gelu as kernels

    if autocast_enabled(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return kernels.dwconv_gelu(x, weight, bias, spatial_shape)
