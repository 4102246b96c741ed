"""Fused depthwise convolution and GELU on tokens."""

from functools import partial
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .autograd import autocast_enabled
from .dispatch import check_backend, check_grid
from .selection import Problem, select, uniform
from .unflatten import unflatten

# The small problem of the trial: batch size, and a grid that no tile of the
# kernels divides. With 2048 channels, the input has 9 MB in float32.
TRIAL_BATCH = 2
TRIAL_GRID = (21, 27)


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


def _layers(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: Tuple[int, int]
) -> Tensor:
    """Compute :func:`dwconv_gelu` with the operations of a model's layers."""
    # Under autocast, the convolution converts its weights at each call.
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    # (B, N, C) -> (B, h, w, C) -> (B, C, h, w), a channels-last view
    x = unflatten(x, 1, spatial_shape).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    # (B, C, h, w) -> (B, h, w, C) -> (B, N, C)
    return F.gelu(x.permute(0, 2, 3, 1).flatten(1, 2))


def _small_problem(
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    channels: int,
) -> Problem:
    """Make the problem on which 'auto' tries the kernel and the layers."""
    tokens = TRIAL_GRID[0] * TRIAL_GRID[1]
    x, weight, bias = uniform(
        -1,
        1,
        (TRIAL_BATCH, tokens, channels),
        (channels, 1, 3, 3),
        (channels,),
    )
    layers = partial(_layers, spatial_shape=TRIAL_GRID)
    return Problem(
        inputs=(
            x.to(device, dtype),
            weight.to(device, weight_dtype),
            bias.to(device, weight_dtype),
        ),
        plain=layers,
        backends=dict(
            torch=layers,
            triton=partial(dwconv_gelu, spatial_shape=TRIAL_GRID),
        ),
    )


def select_dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    """Choose between :func:`dwconv_gelu` and the layers, for 'auto'.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)``.
        weight (Tensor): Weight of shape ``(C, 1, 3, 3)``.
        bias (Tensor): Bias of shape ``(C, )``.

    Returns:
        str: 'triton' for :func:`dwconv_gelu`, 'torch' for the layers; see
        :mod:`mmvvt.ops.selection`.
    """
    dtype, obstacle = x.dtype, None
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif not x.dtype == weight.dtype == bias.dtype:
        obstacle = 'without autocast, the layers require one dtype'
    return select(
        'depthwise convolution and GELU',
        _small_problem,
        dict(dtype=dtype, weight_dtype=weight.dtype, channels=x.shape[-1]),
        dict(x=x, weight=weight, bias=bias),
        obstacle,
    )
