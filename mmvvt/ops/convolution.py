"""Depthwise convolution over tokens, with its activation."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_backend, check_grid


def dwconv_gelu(x: Tensor,
                weight: Tensor,
                bias: Tensor,
                spatial_shape: Tuple[int, int],
                backend: str = 'auto') -> Tensor:
    """Depthwise 3x3 convolution with padding 1, bias, and exact GELU.

    Args:
        x (Tensor): ``(B, N, C)``, tokens in row-major order.
        weight (Tensor): ``(C, 1, 3, 3)``.
        bias (Tensor): ``(C, )``.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.
        backend (str): 'torch' and 'reference' are stock operations, 'triton'
            one fused kernel for NVIDIA GPUs. 'auto' takes the environment
            variable ``MMVVT_BACKEND``, or 'torch'. Defaults to 'auto'.

    Returns:
        Tensor: ``(B, N, C)`` in the dtype of ``x``, or in that of autocast
        where it is on.

    Raises:
        ValueError: If shapes do not fit, or there is no such backend.
        RuntimeError: If the backend cannot run, with the reason.
    """
    if x.dim() != 3:
        raise ValueError(f'x must be (B, N, C), got shape {tuple(x.shape)}')
    channels = x.shape[-1]
    if weight.shape != (channels, 1, 3, 3) or bias.shape != (channels, ):
        raise ValueError(
            f'weight and bias must be ({channels}, 1, 3, 3) and ({channels},) '
            f'for x {tuple(x.shape)}, got {tuple(weight.shape)} and '
            f'{tuple(bias.shape)}')
    spatial_shape = check_grid('spatial_shape', spatial_shape, x.shape[1], 'x')
    backend = check_backend(backend, dict(x=x, weight=weight, bias=bias))
    if backend == 'triton':
        from .triton_kernels import dwconv_gelu as kernels
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return kernels.dwconv_gelu(x, weight, bias, spatial_shape)
    # (B, N, C) -> (B, h, w, C) -> (B, C, h, w), channels last: no copy
    x = x.unflatten(1, spatial_shape).permute(0, 3, 1, 2)
    x = F.gelu(F.conv2d(x, weight, bias, padding=1, groups=channels))
    # (B, C, h, w) -> (B, h, w, C) -> (B, N, C)
    return x.permute(0, 2, 3, 1).flatten(1, 2)
