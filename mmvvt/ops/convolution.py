"""Depthwise convolution over tokens with its activation, in one kernel."""

from typing import Tuple

import torch
from torch import Tensor

from ..errors import UserError
from .dispatch import check_backend, check_grid


def dwconv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: Tuple[int, int]
) -> Tensor:
    """Depthwise 3x3 convolution with padding 1, bias, and exact GELU.

    One fused Triton kernel for NVIDIA GPUs, forward and backward.

    Args:
        x (Tensor): ``(B, N, C)``, tokens in row-major order; float32,
            bfloat16 or float16.
        weight (Tensor): ``(C, 1, 3, 3)``, of one of these types.
        bias (Tensor): ``(C, )``, of one of these types.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.

    Returns:
        Tensor: ``(B, N, C)`` in the dtype of ``x``, or in that of autocast
        where it is on.

    Raises:
        UserError: If shapes do not fit.
        BackendError: If the kernel cannot run, with the reason.
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

    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return kernels.dwconv_gelu(x, weight, bias, spatial_shape)
