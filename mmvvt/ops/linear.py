"""The ``torch`` backend: linear vicinity attention in stock operations.

Two maps make it, and their gradients are the same two maps again:

- :func:`sum_tokens` sums the products ``k_r^T v_r`` of all tokens, once for
  each factor of the vicinity weight;
- :func:`spread_sums` multiplies each token with those sums.

The backward pass keeps q, k, v and the sums, and computes the rest again: at
high resolution fetching it would take as long, and its memory is wanted.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .angles import axis_factors, token_factors
from .autograd import is_transformed, needs_custom_backward
from .clamp import CLAMP_MAX, CLAMP_MIN, magnitude_clamp, mask_clamp_grad

Shape = Tuple[int, int]

# Tokens up to which the sum form takes one wide product, too: measured, see
# docs/speed.md.
WIDE_TOKENS = 144


def _is_separable(shape: Shape, locality: str) -> bool:
    """Whether to sum by rows and columns.

    On a small grid the products take less time than starting them does, and
    one wide product is the shorter way. Compilers would tie their graph to
    the grid by looking at its size.
    """
    return locality == 'sum' and (
        is_transformed() or shape[0] * shape[1] > WIDE_TOKENS
    )


def _features(t: Tensor, shape: Shape, locality: str) -> Tensor:
    """``(B, heads, N, d)`` to ``(B, heads, N, n * d)``."""
    if locality == 'none':
        return t
    factors = token_factors(shape, locality, t.dtype, t.device)  # (N, n)
    # (B, heads, N, 1, d) * (N, n, 1) -> (B, heads, N, n, d)
    return (t.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def sum_tokens(k: Tensor, v: Tensor, shape: Shape, locality: str) -> Tensor:
    """``sum_r factor_r * k_r^T v_r`` for each factor of the vicinity weight.

    The factors of the sum form are cosine and sine of the row's angle, and
    of the column's. So the products are summed over each row and over each
    column (two products instead of four), and the ``h + w`` small matrices
    then combined. Other forms, and small grids, take one product of keys that
    are n times as wide.

    Args:
        k (Tensor): ``(B, heads, h * w, d)``.
        v (Tensor): ``(B, heads, h * w, e)``.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: ``(B, heads, n, d, e)``; n is 4 for 'sum' and 'product', 2 for
        '1d', 1 for 'none'.
    """
    if not _is_separable(shape, locality):
        # (B, heads, n * d, e) -> (B, heads, n, d, e)
        sums = _features(k, shape, locality).transpose(-2, -1) @ v
        return sums.unflatten(-2, (-1, k.shape[-1]))
    to_rows, to_cols = axis_factors(shape, k.dtype, k.device)
    k = k.unflatten(-2, shape)  # (B, heads, h, w, d)
    v = v.unflatten(-2, shape)  # (B, heads, h, w, e)
    per_row = k.transpose(-2, -1) @ v  # (B, heads, h, d, e)
    k, v = k.transpose(-3, -2), v.transpose(-3, -2)  # (B, heads, w, h, .)
    per_col = k.transpose(-2, -1) @ v  # (B, heads, w, d, e)
    # (2, h) @ (B, heads, h, d * e) -> (B, heads, 2, d * e), columns likewise
    sums = torch.cat(
        [to_rows @ per_row.flatten(-2), to_cols @ per_col.flatten(-2)], dim=-2
    )
    return sums.unflatten(-1, per_row.shape[-2:])  # (B, heads, 4, d, e)


def spread_sums(
    q: Tensor, sums: Tensor, shape: Shape, locality: str
) -> Tensor:
    """``sum_n factor_pn * q_p sums_n`` for each token p.

    In the sum form each row has a matrix, and each column; other forms, and
    small grids, as there.

    Args:
        q (Tensor): ``(B, heads, h * w, d)``.
        sums (Tensor): ``(B, heads, n, d, e)``.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: ``(B, heads, h * w, e)``.
    """
    if not _is_separable(shape, locality):
        return _features(q, shape, locality) @ sums.flatten(-3, -2)
    to_rows, to_cols = axis_factors(shape, q.dtype, q.device)
    # (B, heads, 4, d, e) -> twice (B, heads, 2, d * e)
    row_sums, col_sums = sums.flatten(-2).chunk(2, dim=-2)
    matrix = sums.shape[-2:]
    # (h, 2) @ (B, heads, 2, d * e) -> (B, heads, h, d, e), columns likewise
    of_rows = (to_rows.t() @ row_sums).unflatten(-1, matrix)
    of_cols = (to_cols.t() @ col_sums).unflatten(-1, matrix)
    q = q.unflatten(-2, shape)  # (B, heads, h, w, d)
    by_col = q.transpose(-3, -2) @ of_cols  # (B, heads, w, h, e)
    out = q @ of_rows + by_col.transpose(-3, -2)  # (B, heads, h, w, e)
    return out.flatten(-3, -2)  # (B, heads, h * w, e)


def clamp_sums(sums: Tensor, clamp: bool) -> Tensor:
    """Clamp all but the last column, which holds the sums of keys."""
    if not clamp:
        return sums
    return torch.cat([magnitude_clamp(sums[..., :-1]), sums[..., -1:]], dim=-1)


def divide(products: Tensor, clamp: bool, eps: float) -> Tensor:
    """Numerator over denominator.

    Args:
        products (Tensor): ``(..., d + 1)``: the numerator, and in the last
            column the sum of weights. Overwritten where autograd does not
            record.
        clamp (bool): Clamp the numerator, the normaliser and the result.
        eps (float): Added to the sum of weights.

    Returns:
        Tensor: ``(..., d)``.
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
    """Gradient of the products of :func:`divide`, and its result again.

    Args:
        grad (Tensor): ``(..., d)``, overwritten.
        products (Tensor): ``(..., d + 1)``.
        clamp (bool): As there.
        eps (float): As there.

    Returns:
        tuple[Tensor, Tensor]: ``(..., d + 1)``, and ``(..., d)`` before the
        last clamp.
    """
    numerator = products[..., :-1]
    normaliser = (products[..., -1:] + eps).reciprocal()
    if not clamp:
        factor_grad = (grad * numerator).sum(dim=-1, keepdim=True)
        out = numerator * normaliser
        grad.mul_(normaliser)
    else:
        top = magnitude_clamp(numerator)
        # No weight is negative, so neither is their sum.
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
    """Queries and keys after the ReLU, and values with a column of ones.

    The column, ``(B, heads, M, d)`` to ``(B, heads, M, d + 1)``, makes the
    same products give the sum of keys, and so the denominator.
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
    """The output, and the sums before their clamp."""
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
    """Gradients of q, k and v."""
    q, k, v = _prepare(*inputs)
    clamped = clamp_sums(sums, clamp)
    products = spread_sums(q, clamped, query_shape, locality)
    # A copy, as it is overwritten and not ours.
    products_grad, _ = divide_backward(
        grad.to(q.dtype, copy=True), products, clamp, eps
    )
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
    """The same by autograd, for gradients of gradients."""
    wanted = [t for t in inputs if t.requires_grad]
    grads = iter(
        torch.autograd.grad(
            _forward(*inputs, *settings)[0], wanted, grad, create_graph=True
        )
    )
    return tuple(next(grads) if t.requires_grad else None for t in inputs)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, sums = _forward(q, k, v, *settings)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        # Once: checkpointing hands them out no second time.
        *inputs, sums = ctx.saved_tensors
        # Called inside autocast, it must not reach the sums here either.
        with torch.autocast(grad.device.type, enabled=False):
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
    """Linear vicinity attention, computed in float32 at least.

    Args:
        q (Tensor): ``(B, heads, N, d)`` before the ReLU.
        k (Tensor): ``(B, heads, M, d)`` before the ReLU.
        v (Tensor): ``(B, heads, M, d)``.
        query_shape (tuple[int, int]): Query grid, N = h * w.
        key_shape (tuple[int, int]): Key grid, M = h * w.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Apply the clamps of the published models.
        eps (float): Added to the sum of weights.

    Returns:
        Tensor: ``(B, heads, N, d)`` in the dtype of ``q``.
    """
    arguments = (q, k, v, query_shape, key_shape, locality, clamp, eps)
    if needs_custom_backward(q, k, v):
        return _LinearAttention.apply(*arguments)
    return _forward(*arguments)[0]
