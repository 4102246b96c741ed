r"""Fused depthwise 3x3 convolution, bias and exact GELU over tokens.

The channels of a token are contiguous in memory. A program processes a strip
of the grid, a few columns wide, for a block of channels, from top to bottom.
It keeps three rows in registers, each at three horizontal shifts. Each row is
read from global memory once; the shifted loads hit the cache.

In the backward pass, the input s of the GELU is recomputed. With
:math:`g = dy \, gelu'(s)`, the gradient of the bias is the sum of g, the
gradient of each weight is the sum of g times the shifted input, and the
gradient of the input is the convolution of g with the kernel rotated by 180
degrees. The partial sums for weights and bias are stored separately for each
chunk of strips and added in a fixed order, so the results are bitwise
deterministic.

All arithmetic is float32; g is stored in the dtype of the input.
"""

import math
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import add_chunks, cast, num_programs, on_its_device, split

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
_SIZES = ['h', 'w', 'across', 'down', 'height']

# Size of a strip. Each of 128 threads processes 8 elements of a row, or 4 in
# the backward pass, which keeps ten sums per element. A strip of 16 rows reads
# 18 rows, of which the first and the last also belong to its neighbours.
_COLUMNS = 8
_CHANNELS = 128
_CHANNELS_BACKWARD = 64
_HEIGHT = 16


@triton.jit
def _load_token(
    x_ptr,  # (h * w, C), contiguous, of one image
    row,  # int, row of the grid
    column,  # (COLUMNS,), int32, columns of the grid
    channel,  # (CHANNELS,), int32, channel indices
    h,  # rows of the grid
    w,  # columns of the grid
    C: tl.constexpr,  # number of channels
):
    # Tile of shape (COLUMNS, CHANNELS), 0 outside of the grid
    real = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    token = (row * w + column).to(tl.int64)
    return tl.load(
        x_ptr + token[:, None] * C + channel[None, :],
        mask=real[:, None] & (channel < C)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _load_row(
    x_ptr,  # (h * w, C), contiguous, of one image
    row,  # int, row of the grid
    column,  # (COLUMNS,), int32, columns of the grid
    channel,  # (CHANNELS,), int32, channel indices
    h,  # rows of the grid
    w,  # columns of the grid
    C: tl.constexpr,  # number of channels
):
    """Load a row of the grid, shifted for the left, middle, right weights."""
    return (
        _load_token(x_ptr, row, column - 1, channel, h, w, C),
        _load_token(x_ptr, row, column, channel, h, w, C),
        _load_token(x_ptr, row, column + 1, channel, h, w, C),
    )


@triton.jit
def _load_weights(
    weight_ptr,  # (C, 3, 3), contiguous, floating point
    row: tl.constexpr,  # row of the kernel: 0, 1 or 2
    channel,  # (CHANNELS,), int32, channel indices
    C: tl.constexpr,  # number of channels
    TURN: tl.constexpr,  # whether to rotate the kernel by 180 degrees
):
    """Load a row of the kernel: three tensors of shape ``(1, CHANNELS)``."""
    first: tl.constexpr = 8 - 3 * row if TURN else 3 * row
    step: tl.constexpr = -1 if TURN else 1
    at = weight_ptr + channel * 9 + first
    mask = channel < C
    left = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(at + step, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * step, mask=mask, other=0.0).to(tl.float32)
    return left[None, :], middle[None, :], right[None, :]


@triton.jit
def _strip(item, h, across, down, height, COLUMNS: tl.constexpr):
    """Return image, first row, end row (exclusive) and columns of a strip."""
    image = item // (across * down)
    top = item // across % down * height
    column = item % across * COLUMNS + tl.arange(0, COLUMNS)
    return image.to(tl.int64), top, tl.minimum(top + height, h), column


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    x_ptr,  # (B, h * w, C), contiguous, floating point
    weight_ptr,  # (C, 3, 3), contiguous, floating point
    bias_ptr,  # (C,), floating point
    y_ptr,  # (B, h * w, C), contiguous, dtype of x, output
    h,  # rows of the grid
    w,  # columns of the grid
    across,  # number of strips along the width
    down,  # number of strips along the height
    height,  # rows of a strip
    C: tl.constexpr,  # number of channels
    GELU: tl.constexpr,  # whether to apply bias and GELU
    TURN: tl.constexpr,  # whether to rotate the kernel by 180 degrees
    COLUMNS: tl.constexpr,  # columns of a strip, a power of two
    CHANNELS: tl.constexpr,  # channels of a strip, a power of two
):
    """Compute one strip of the convolution, optionally with bias and GELU."""
    image, top, bottom, column = _strip(
        tl.program_id(0), h, across, down, height, COLUMNS
    )
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += image * h * w * C
    y_ptr += image * h * w * C
    w00, w01, w02 = _load_weights(weight_ptr, 0, channel, C, TURN)
    w10, w11, w12 = _load_weights(weight_ptr, 1, channel, C, TURN)
    w20, w21, w22 = _load_weights(weight_ptr, 2, channel, C, TURN)
    if GELU:
        bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
        bias = bias.to(tl.float32)[None, :]
    a0, a1, a2 = _load_row(x_ptr, top - 1, column, channel, h, w, C)
    b0, b1, b2 = _load_row(x_ptr, top, column, channel, h, w, C)
    for row in range(top, bottom):
        c0, c1, c2 = _load_row(x_ptr, row + 1, column, channel, h, w, C)
        y = (
            a0 * w00
            + a1 * w01
            + a2 * w02
            + b0 * w10
            + b1 * w11
            + b2 * w12
            + c0 * w20
            + c1 * w21
            + c2 * w22
        )
        if GELU:
            y += bias
            y = 0.5 * y * (1 + tl.erf(y * _SQRT_HALF))
        token = (row * w + column).to(tl.int64)
        tl.store(
            y_ptr + token[:, None] * C + channel[None, :],
            cast(y, y_ptr.dtype.element_ty),
            mask=(column < w)[:, None] & (channel < C)[None, :],
        )
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@triton.jit
def _store_sum(
    total,  # (COLUMNS, CHANNELS), float32
    at,  # pointer to (C,), float32, output
    channel,  # (CHANNELS,), int32, channel indices
    C: tl.constexpr,  # number of channels
):
    tl.store(at + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=_SIZES + ['items', 'chunk'])
def _sum_gradient(
    x_ptr,  # (B, h * w, C), contiguous, floating point
    weight_ptr,  # (C, 3, 3), contiguous, floating point
    bias_ptr,  # (C,), floating point
    dy_ptr,  # (B, h * w, C), contiguous, gradient of the output
    g_ptr,  # (B, h * w, C), contiguous, dtype of x, output
    partial_ptr,  # (chunks, 10, C), float32, output
    h,  # rows of the grid
    w,  # columns of the grid
    across,  # number of strips along the width
    down,  # number of strips along the height
    height,  # rows of a strip
    items,  # number of strips in the batch
    chunk,  # strips per program
    C: tl.constexpr,  # number of channels
    COLUMNS: tl.constexpr,  # columns of a strip, a power of two
    CHANNELS: tl.constexpr,  # channels of a strip, a power of two
):
    """Compute g of a chunk of strips (see the module docstring).

    Also computes the partial sums over the chunk of the gradients of the nine
    weights and the bias.
    """
    part = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    w00, w01, w02 = _load_weights(weight_ptr, 0, channel, C, False)
    w10, w11, w12 = _load_weights(weight_ptr, 1, channel, C, False)
    w20, w21, w22 = _load_weights(weight_ptr, 2, channel, C, False)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
    bias = bias.to(tl.float32)[None, :]
    d00 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    d01, d02, d10, d11, d12 = d00, d00, d00, d00, d00
    d20, d21, d22, d_bias = d00, d00, d00, d00
    for item in range(part * chunk, tl.minimum(part * chunk + chunk, items)):
        image, top, bottom, column = _strip(
            item, h, across, down, height, COLUMNS
        )
        start = image * h * w * C
        a0, a1, a2 = _load_row(
            x_ptr + start, top - 1, column, channel, h, w, C
        )
        b0, b1, b2 = _load_row(x_ptr + start, top, column, channel, h, w, C)
        for row in range(top, bottom):
            c0, c1, c2 = _load_row(
                x_ptr + start, row + 1, column, channel, h, w, C
            )
            s = (
                a0 * w00
                + a1 * w01
                + a2 * w02
                + b0 * w10
                + b1 * w11
                + b2 * w12
                + c0 * w20
                + c1 * w21
                + c2 * w22
            ) + bias
            g = _load_token(dy_ptr + start, row, column, channel, h, w, C)
            g *= 0.5 * (1 + tl.erf(s * _SQRT_HALF)) + s * _DENSITY * tl.exp(
                -0.5 * s * s
            )
            d00 += g * a0
            d01 += g * a1
            d02 += g * a2
            d10 += g * b0
            d11 += g * b1
            d12 += g * b2
            d20 += g * c0
            d21 += g * c1
            d22 += g * c2
            d_bias += g
            token = (row * w + column).to(tl.int64)
            tl.store(
                g_ptr + start + token[:, None] * C + channel[None, :],
                cast(g, g_ptr.dtype.element_ty),
                mask=(column < w)[:, None] & (channel < C)[None, :],
            )
            a0, a1, a2 = b0, b1, b2
            b0, b1, b2 = c0, c1, c2
    partial_ptr += part.to(tl.int64) * 10 * C
    _store_sum(d00, partial_ptr, channel, C)
    _store_sum(d01, partial_ptr + C, channel, C)
    _store_sum(d02, partial_ptr + 2 * C, channel, C)
    _store_sum(d10, partial_ptr + 3 * C, channel, C)
    _store_sum(d11, partial_ptr + 4 * C, channel, C)
    _store_sum(d12, partial_ptr + 5 * C, channel, C)
    _store_sum(d20, partial_ptr + 6 * C, channel, C)
    _store_sum(d21, partial_ptr + 7 * C, channel, C)
    _store_sum(d22, partial_ptr + 8 * C, channel, C)
    _store_sum(d_bias, partial_ptr + 9 * C, channel, C)


def _strips(h: int, w: int) -> Tuple[int, int, int]:
    """Return the numbers of strips across and down, and rows per strip."""
    down = triton.cdiv(h, _HEIGHT)
    return triton.cdiv(w, _COLUMNS), down, triton.cdiv(h, down)


def _run_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, h: int, w: int, turn: bool
) -> Tensor:
    """Launch the convolution kernel.

    Args:
        x (Tensor): Input of shape ``(B, N, C)``, or g if ``turn`` is True.
        weight (Tensor): Weights of shape ``(C, 1, 3, 3)``.
        bias (Tensor): Bias of shape ``(C,)``, unused if ``turn`` is True.
        h (int): Rows of the grid.
        w (int): Columns of the grid, N = h * w.
        turn (bool): If False, compute the forward pass with bias and GELU. If
            True, compute the gradient of the input: rotate the kernel by 180
            degrees and omit bias and GELU.

    Returns:
        Tensor: Result of shape ``(B, N, C)``.
    """
    b, _, c = x.shape
    y = x.new_empty(x.shape)
    across, down, height = _strips(h, w)
    _convolve[(b * across * down, triton.cdiv(c, _CHANNELS))](
        x,
        weight,
        bias,
        y,
        h,
        w,
        across,
        down,
        height,
        C=c,
        GELU=not turn,
        TURN=turn,
        COLUMNS=_COLUMNS,
        CHANNELS=_CHANNELS,
    )
    return y


@torch.library.custom_op('mmvvt::dwconv_gelu', mutates_args=())
@on_its_device
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, h: int, w: int
) -> Tensor:
    return _run_convolve(
        x.contiguous(), weight.contiguous(), bias.contiguous(), h, w, False
    )


@_forward.register_fake
def _(x, weight, bias, h, w):
    return x.new_empty(x.shape)


@torch.library.custom_op('mmvvt::dwconv_gelu_backward', mutates_args=())
@on_its_device
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, h: int, w: int
) -> Tuple[Tensor, Tensor, Tensor]:
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    b, _, c = x.shape
    across, down, height = _strips(h, w)
    items, blocks = b * across * down, triton.cdiv(c, _CHANNELS_BACKWARD)
    chunk, chunks = split(items, 1, 4 * num_programs(x.device) // blocks)
    # As in PyTorch, g is stored in the dtype of the input.
    g = x.new_empty(x.shape)
    partial = x.new_empty((chunks, 1, 10 * c), dtype=torch.float32)
    _sum_gradient[(chunks, blocks)](
        x,
        weight,
        bias,
        dy,
        g,
        partial,
        h,
        w,
        across,
        down,
        height,
        items,
        chunk,
        C=c,
        COLUMNS=_COLUMNS,
        CHANNELS=_CHANNELS_BACKWARD,
    )
    sums = add_chunks(partial).view(10, c)
    dx = _run_convolve(g, weight, bias, h, w, True)
    # (9, C) -> (C, 9) -> (C, 1, 3, 3)
    dweight = sums[:9].t().reshape(c, 1, 3, 3).to(weight.dtype)
    return dx, dweight.contiguous(), sums[9].to(bias.dtype, copy=True)


@_backward.register_fake
def _(dy, x, weight, bias, h, w):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.grid = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, dy):
    return (*_backward(dy, *ctx.saved_tensors, *ctx.grid), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def dwconv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: Tuple[int, int]
) -> Tensor:
    """Depthwise 3x3 convolution, bias and exact GELU.

    Args:
        x (Tensor): Input of shape ``(B, N, C)``, float32, bfloat16 or
            float16.
        weight (Tensor): Weights of shape ``(C, 1, 3, 3)``, in any of these
            dtypes.
        bias (Tensor): Bias of shape ``(C,)``, in any of these dtypes.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, N = h * w.

    Returns:
        Tensor: Contiguous tensor of shape ``(B, N, C)``, in the dtype of
        ``x``.
    """
    return _forward(x, weight, bias, *spatial_shape)
