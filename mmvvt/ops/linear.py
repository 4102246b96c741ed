"""The ``torch`` backend: linear vicinity attention in stock operations.

The sum form never builds the features of four times the width. Its weight
is ``cos(a_p - a_r) + cos(b_p - b_r)``: the first term depends on the rows of
the two tokens alone, the second on their columns alone. So
``sum_r k_r^T v_r`` is taken once over each row and once over each column
(two products instead of four), the ``h + w`` small matrices are combined
with the cosines and sines, and the way back to the tokens goes through one
matrix per row and one per column.
"""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .angles import angle_tables
from .clamp import magnitude_clamp

Shape = Tuple[int, int]


def _clamp_kv(kv: Tensor, clamp: bool) -> Tensor:
    """Clamp all but the last column, which holds the sums of keys."""
    if not clamp:
        return kv
    return torch.cat([magnitude_clamp(kv[..., :-1]), kv[..., -1:]], dim=-1)


def _sum_form(q: Tensor, k: Tensor, v: Tensor, query_shape: Shape,
              key_shape: Shape, clamp: bool) -> Tensor:
    """Numerator and denominator of the sum form.

    Args:
        q (Tensor): ``(B, heads, N, d)`` after the ReLU.
        k (Tensor): ``(B, heads, M, d)`` after the ReLU.
        v (Tensor): ``(B, heads, M, e)``, its last column 1.
        query_shape (tuple[int, int]): Query grid.
        key_shape (tuple[int, int]): Key grid.
        clamp (bool): Clamp the key-value sums.

    Returns:
        Tensor: ``(B, heads, N, e)``, the denominator in its last column.
    """
    d, e = q.shape[-1], v.shape[-1]
    tables = angle_tables(key_shape, False, k.dtype, k.device)
    cos_a, sin_a, cos_b, sin_b = (t.flatten() for t in tables)
    to_rows = torch.stack([cos_a, sin_a])  # (2, h)
    to_cols = torch.stack([cos_b, sin_b])  # (2, w)

    k = k.unflatten(-2, key_shape)  # (B, heads, h, w, d)
    v = v.unflatten(-2, key_shape)  # (B, heads, h, w, e)
    per_row = k.transpose(-2, -1) @ v  # (B, heads, h, d, e)
    k, v = k.transpose(-3, -2), v.transpose(-3, -2)  # (B, heads, w, h, .)
    per_col = k.transpose(-2, -1) @ v  # (B, heads, w, d, e)
    kv_rows = to_rows @ per_row.flatten(-2)  # (B, heads, 2, d * e)
    kv_cols = to_cols @ per_col.flatten(-2)  # (B, heads, 2, d * e)
    # (B, heads, 2, d * e) -> (B, heads, 2, d, e), clamped -> (..., d * e)
    kv_rows = _clamp_kv(kv_rows.unflatten(-1, (d, e)), clamp).flatten(-2)
    kv_cols = _clamp_kv(kv_cols.unflatten(-1, (d, e)), clamp).flatten(-2)

    if query_shape != key_shape:
        tables = angle_tables(query_shape, False, q.dtype, q.device)
        cos_a, sin_a, cos_b, sin_b = (t.flatten() for t in tables)
        to_rows = torch.stack([cos_a, sin_a])
        to_cols = torch.stack([cos_b, sin_b])
    # (h, 2) @ (B, heads, 2, d * e) -> (B, heads, h, d, e), columns likewise
    from_rows = (to_rows.t() @ kv_rows).unflatten(-1, (d, e))
    from_cols = (to_cols.t() @ kv_cols).unflatten(-1, (d, e))
    q = q.unflatten(-2, query_shape)  # (B, heads, h, w, d)
    by_col = q.transpose(-3, -2) @ from_cols  # (B, heads, w, h, e)
    out = q @ from_rows + by_col.transpose(-3, -2)  # (B, heads, h, w, e)
    return out.flatten(-3, -2)  # (B, heads, N, e)


def _factors(shape: Shape, locality: str, like: Tensor) -> Tuple[Tensor, ...]:
    """What each copy of the features is multiplied by, each ``(h * w, 1)``."""
    if locality == '1d':
        return angle_tables(shape, True, like.dtype, like.device)
    cos_a, sin_a, cos_b, sin_b = angle_tables(shape, False, like.dtype,
                                              like.device)
    # (h, 1, 1) * (1, w, 1) -> (h, w, 1) -> (h * w, 1)
    return tuple((t * s).flatten(0, 1) for t in (cos_a, sin_a)
                 for s in (cos_b, sin_b))


def _factored_form(q: Tensor, k: Tensor, v: Tensor, query_shape: Shape,
                   key_shape: Shape, clamp: bool, locality: str) -> Tensor:
    """Numerator and denominator of the other forms, one factor at a time.

    Arguments and result are those of :func:`_sum_form`.
    """
    if locality == 'none':
        return q @ _clamp_kv(k.transpose(-2, -1) @ v, clamp)
    out = None
    for to_query, to_key in zip(
            _factors(query_shape, locality, q),
            _factors(key_shape, locality, k)):
        kv = _clamp_kv((k * to_key).transpose(-2, -1) @ v, clamp)
        part = (q * to_query) @ kv  # (B, heads, N, e)
        out = part if out is None else out + part
    return out


def linear_attention(q: Tensor, k: Tensor, v: Tensor, query_shape: Shape,
                     key_shape: Shape, locality: str, clamp: bool,
                     eps: float) -> Tensor:
    """Linear vicinity attention.

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
        Tensor: ``(B, heads, N, d)``.
    """
    # (B, heads, M, d) -> (B, heads, M, d + 1): the column of ones makes the
    # same products give the sum of keys, and so the denominator.
    v = F.pad(v, (0, 1), value=1.)
    q, k = q.relu(), k.relu()
    if locality == 'sum':
        out = _sum_form(q, k, v, query_shape, key_shape, clamp)
    else:
        out = _factored_form(q, k, v, query_shape, key_shape, clamp, locality)
    numerator, normaliser = out[..., :-1], 1 / (out[..., -1:] + eps)
    if not clamp:
        return numerator * normaliser
    return magnitude_clamp(
        magnitude_clamp(numerator) * magnitude_clamp(normaliser))
