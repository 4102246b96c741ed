"""The 'torch' backend: linear vicinity attention in PyTorch operations.

The forward pass consists of two linear maps. The backward pass is computed
with the same two maps:

- :func:`sum_tokens` sums the products ``k_r^T v_r`` over all tokens, once for
  each factor of the vicinity weight;
- :func:`spread_sums` multiplies each token by these sums.

Only q, k, v and the sums are saved for the backward pass. The other
activations are recomputed: at high resolution this is as fast as loading
saved activations, and it saves memory.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .angles import axis_factors, token_factors
from .autograd import (
    is_transformed,
    needs_custom_backward,
    without_autocast,
)
from .clamp import CLAMP_MAX, CLAMP_MIN, magnitude_clamp, mask_clamp_grad
from .unflatten import unflatten

Shape = Tuple[int, int]

# Maximum number of tokens for which locality 'sum' uses a single matrix
# product of wide features. See docs/speed.md for the measurements.
WIDE_TOKENS = 144


def _is_separable(shape: Shape, locality: str) -> bool:
    """Check whether to sum separately over rows and columns.

    On small grids, the launch overhead of an operation exceeds its
    computation time, so a single product of wide features is faster. The grid
    size is not inspected while compiling or tracing, because this would
    specialise the graph to the grid.
    """
    return locality == 'sum' and (
        is_transformed() or shape[0] * shape[1] > WIDE_TOKENS
    )


def _features(t: Tensor, shape: Shape, locality: str) -> Tensor:
    """Multiply tokens by their n factors.

    Args:
        t (Tensor): Queries or keys of shape ``(B, heads, N, d)``.
        shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: Features of shape ``(B, heads, N, n * d)``.
    """
    if locality == 'none':
        return t
    factors = token_factors(shape, locality, t.dtype, t.device)  # (N, n)
    # (B, heads, N, 1, d) * (N, n, 1) -> (B, heads, N, n, d)
    # -> (B, heads, N, n * d)
    return (t.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def sum_tokens(k: Tensor, v: Tensor, shape: Shape, locality: str) -> Tensor:
    """Compute ``sum_r factor_r * k_r^T v_r`` for each vicinity factor.

    With locality 'sum', the factors are the cosine and sine of the row angle
    and of the column angle. The products ``k_r^T v_r`` are therefore summed
    over each row and over each column (two products instead of four), and the
    resulting ``h + w`` matrices are then multiplied by the factors. The other
    localities and small grids use a single product with keys of n * d
    channels.

    Args:
        k (Tensor): Keys of shape ``(B, heads, h * w, d)``.
        v (Tensor): Values of shape ``(B, heads, h * w, e)``.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: Sums of shape ``(B, heads, n, d, e)``, where n is 4 for 'sum'
        and 'product', 2 for '1d' and 1 for 'none'.
    """
    if not _is_separable(shape, locality):
        # (B, heads, n * d, N) @ (B, heads, N, e) -> (B, heads, n * d, e)
        sums = _features(k, shape, locality).transpose(-2, -1) @ v
        # (B, heads, n * d, e) -> (B, heads, n, d, e)
        return unflatten(sums, -2, (-1, k.shape[-1]))
    to_rows, to_cols = axis_factors(shape, k.dtype, k.device)
    k = unflatten(k, -2, shape)  # (B, heads, h, w, d)
    v = unflatten(v, -2, shape)  # (B, heads, h, w, e)
    per_row = k.transpose(-2, -1) @ v  # (B, heads, h, d, e)
    k, v = k.transpose(-3, -2), v.transpose(-3, -2)  # (B, heads, w, h, .)
    per_col = k.transpose(-2, -1) @ v  # (B, heads, w, d, e)
    # Rows: (2, h) @ (B, heads, h, d * e) -> (B, heads, 2, d * e)
    # Columns: (2, w) @ (B, heads, w, d * e) -> (B, heads, 2, d * e)
    # Concatenated: (B, heads, 4, d * e)
    sums = torch.cat(
        [to_rows @ per_row.flatten(-2), to_cols @ per_col.flatten(-2)], dim=-2
    )
    # (B, heads, 4, d * e) -> (B, heads, 4, d, e)
    return unflatten(sums, -1, per_row.shape[-2:])


def spread_sums(
    q: Tensor, sums: Tensor, shape: Shape, locality: str
) -> Tensor:
    """Compute ``sum_n factor_pn * q_p sums_n`` for each token p.

    With locality 'sum', the sums are first combined into one matrix per row
    and one matrix per column. The other localities and small grids use a
    single product with queries of n * d channels.

    Args:
        q (Tensor): Queries of shape ``(B, heads, h * w, d)``.
        sums (Tensor): Sums of shape ``(B, heads, n, d, e)``, as returned by
            :func:`sum_tokens`.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: Output of shape ``(B, heads, h * w, e)``.
    """
    if not _is_separable(shape, locality):
        # (B, heads, N, n * d) @ (B, heads, n * d, e) -> (B, heads, N, e)
        return _features(q, shape, locality) @ sums.flatten(-3, -2)
    to_rows, to_cols = axis_factors(shape, q.dtype, q.device)
    # (B, heads, 4, d, e) -> (B, heads, 4, d * e)
    # -> two tensors of shape (B, heads, 2, d * e)
    row_sums, col_sums = sums.flatten(-2).chunk(2, dim=-2)
    matrix = sums.shape[-2:]
    # Rows: (h, 2) @ (B, heads, 2, d * e) -> (B, heads, h, d, e)
    # Columns: (w, 2) @ (B, heads, 2, d * e) -> (B, heads, w, d, e)
    of_rows = unflatten(to_rows.t() @ row_sums, -1, matrix)
    of_cols = unflatten(to_cols.t() @ col_sums, -1, matrix)
    q = unflatten(q, -2, shape)  # (B, heads, h, w, d)
    by_col = q.transpose(-3, -2) @ of_cols  # (B, heads, w, h, e)
    out = q @ of_rows + by_col.transpose(-3, -2)  # (B, heads, h, w, e)
    return out.flatten(-3, -2)  # (B, heads, h * w, e)


def clamp_sums(sums: Tensor, clamp: bool) -> Tensor:
    """Clamp the key-value sums.

    Args:
        sums (Tensor): Sums of shape ``(..., d + 1)``. The last column holds
            the sums of keys and is not clamped.
        clamp (bool): Whether to apply the clamp.

    Returns:
        Tensor: Tensor of the same shape. If ``clamp`` is False, ``sums``.
    """
    if not clamp:
        return sums
    return torch.cat([magnitude_clamp(sums[..., :-1]), sums[..., -1:]], dim=-1)


def divide(products: Tensor, clamp: bool, eps: float) -> Tensor:
    """Divide the numerator by the sum of weights.

    Args:
        products (Tensor): Tensor of shape ``(..., d + 1)`` with the numerator
            in the first d columns and the sum of weights in the last column.
            If ``clamp`` is True, it may be modified in place when no gradient
            is recorded.
        clamp (bool): Whether to clamp the numerator, the normaliser and the
            result.
        eps (float): Value added to the sum of weights.

    Returns:
        Tensor: Quotient of shape ``(..., d)``.
    """
    numerator = products[..., :-1]
    normaliser = (products[..., -1:] + eps).reciprocal()
    if not clamp:
        return numerator * normaliser
    out = magnitude_clamp(numerator, inplace=True) * magnitude_clamp(
        normaliser, inplace=True
    )
    return magnitude_clamp(out, inplace=True)


def divide_backward(
    grad: Tensor, products: Tensor, clamp: bool, eps: float
) -> Tuple[Tensor, Tensor]:
    """Compute the gradient of :func:`divide` and recompute its result.

    Args:
        grad (Tensor): Gradient of the quotient, of shape ``(..., d)``,
            modified in place.
        products (Tensor): Input of :func:`divide`, of shape ``(..., d + 1)``.
        clamp (bool): Whether :func:`divide` applied the clamps.
        eps (float): Value added to the sum of weights.

    Returns:
        tuple[Tensor, Tensor]: Gradient of ``products``, of shape
        ``(..., d + 1)``, and the quotient before the last clamp, of shape
        ``(..., d)``.
    """
    numerator = products[..., :-1]
    normaliser = (products[..., -1:] + eps).reciprocal()
    if not clamp:
        factor_grad = (grad * numerator).sum(dim=-1, keepdim=True)
        out = numerator * normaliser
        grad.mul_(normaliser)
    else:
        top = magnitude_clamp(numerator)
        # No weight is negative, so the sum of weights is not negative and the
        # sign of the normaliser does not need to be restored.
        factor = normaliser.clamp(CLAMP_MIN, CLAMP_MAX)
        out = top * factor
        mask_clamp_grad(grad, out)
        factor_grad = mask_clamp_grad(
            (grad * top).sum(dim=-1, keepdim=True), normaliser
        )
        mask_clamp_grad(grad.mul_(factor), numerator)
    normaliser_grad = factor_grad.mul_(normaliser.square()).neg_()
    return torch.cat([grad, normaliser_grad], dim=-1), out


def _prepare(q: Tensor, k: Tensor, v: Tensor) -> Tuple[Tensor, ...]:
    """Apply the ReLU to q and k, and append a column of ones to v.

    The column of ones extends v from ``(B, heads, M, d)`` to
    ``(B, heads, M, d + 1)``. The products with v then also contain the sum of
    keys, which gives the denominator. All tensors are converted to float32 or
    higher precision.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(accumulate) for t in (q, k, v))
    return q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    clamp: bool,
    eps: float,
) -> Tuple[Tensor, Tensor]:
    """Compute the output and the key-value sums before the clamp.

    The arguments are those of :func:`linear_attention`.

    Returns:
        tuple[Tensor, Tensor]: Output of shape ``(B, heads, N, d)`` and sums
        of shape ``(B, heads, n, d, d + 1)``.
    """
    dtype = q.dtype
    q, k, v = _prepare(q, k, v)
    sums = sum_tokens(k, v, key_shape, locality)
    products = spread_sums(q, clamp_sums(sums, clamp), query_shape, locality)
    return divide(products, clamp, eps).to(dtype), sums


def _grads(
    grad: Tensor,
    inputs: Sequence[Tensor],
    sums: Tensor,
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    clamp: bool,
    eps: float,
) -> Tuple[Tensor, ...]:
    """Compute the gradients of q, k and v.

    Args:
        grad (Tensor): Gradient of the output, ``(B, heads, N, d)``.
        inputs (Sequence[Tensor]): The tensors q, k and v before the ReLU.
        sums (Tensor): Key-value sums before the clamp, as returned by
            :func:`_forward`.
        query_shape (tuple[int, int]): Query grid ``(h, w)``.
        key_shape (tuple[int, int]): Key grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Whether the clamps were applied.
        eps (float): Value added to the sum of weights.

    Returns:
        tuple[Tensor, ...]: Gradients with the shapes and dtypes of
        ``inputs``.
    """
    q, k, v = _prepare(*inputs)
    clamped = clamp_sums(sums, clamp)
    products = spread_sums(q, clamped, query_shape, locality)
    # divide_backward modifies the gradient in place, so it is copied first.
    products_grad, _ = divide_backward(
        grad.to(q.dtype, copy=True), products, clamp, eps
    )
    # Transpose the sums: (B, heads, n, d, d + 1) -> (B, heads, n, d + 1, d)
    q_grad = spread_sums(
        products_grad, clamped.transpose(-2, -1), query_shape, locality
    ).mul_(q > 0)
    sums_grad = sum_tokens(q, products_grad, query_shape, locality)
    if clamp:
        mask_clamp_grad(sums_grad[..., :-1], sums[..., :-1])
    k_grad = spread_sums(
        v, sums_grad.transpose(-2, -1), key_shape, locality
    ).mul_(k > 0)
    v_grad = spread_sums(k, sums_grad[..., :-1], key_shape, locality)
    return tuple(
        g.to(t.dtype) for g, t in zip((q_grad, k_grad, v_grad), inputs)
    )


def _differentiable_grads(
    grad: Tensor, inputs: Sequence[Tensor], settings: tuple
) -> Tuple[Optional[Tensor], ...]:
    """Compute the gradients with autograd to support double backward.

    Args:
        grad (Tensor): Gradient of the output, ``(B, heads, N, d)``.
        inputs (Sequence[Tensor]): The tensors q, k and v before the ReLU.
        settings (tuple): The other arguments of :func:`_forward`.

    Returns:
        tuple[Tensor or None, ...]: Gradients of q, k and v. None for tensors
        that do not require a gradient.
    """
    q, k, v = inputs
    out, _ = _forward(q, k, v, *settings)
    wanted = [t for t in inputs if t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(grads) if t.requires_grad else None for t in inputs)


class _LinearAttention(torch.autograd.Function):
    """Linear attention that recomputes activations in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, sums = _forward(q, k, v, *settings)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        # Access saved_tensors only once: under activation checkpointing, a
        # second access fails.
        *inputs, sums = ctx.saved_tensors
        # The backward pass may be called inside an autocast context. Disable
        # autocast, so that the sums are not accumulated in lower precision.
        with without_autocast(grad):
            if torch.is_grad_enabled():
                grads = _differentiable_grads(grad, inputs, ctx.settings)
            else:
                grads = _grads(grad, inputs, sums, *ctx.settings)
        return (*grads, *[None] * len(ctx.settings))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    clamp: bool,
    eps: float,
) -> Tensor:
    """Linear vicinity attention, computed in float32 or higher precision.

    Args:
        q (Tensor): Queries of shape ``(B, heads, N, d)``, before the ReLU.
        k (Tensor): Keys of shape ``(B, heads, M, d)``, before the ReLU.
        v (Tensor): Values of shape ``(B, heads, M, d)``.
        query_shape (tuple[int, int]): Query grid ``(h, w)`` with h * w = N.
        key_shape (tuple[int, int]): Key grid ``(h, w)`` with h * w = M.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Whether to apply the clamps of the published models.
        eps (float): Value added to the sum of weights.

    Returns:
        Tensor: Output of shape ``(B, heads, N, d)`` in the dtype of ``q``.
    """
    arguments = (q, k, v, query_shape, key_shape, locality, clamp, eps)
    if needs_custom_backward(q, k, v):
        return _LinearAttention.apply(*arguments)
    return _forward(*arguments)[0]
