"""Reference implementation of vicinity attention.

Every fast path is tested against this module.

:func:`quadratic_attention` follows the definition. It computes the weights of
all ``N * M`` pairs of tokens and has no clamps. :func:`linear_attention` is
the linear form with the clamps that the published checkpoints were trained
with. It is not optimised: it stores features of n * d channels, applies each
clamp as a separate operation, and recomputes the tables in each call.
"""

import math
from typing import List, Tuple

import torch
from torch import Tensor

from .clamp import CLAMP_MAX, CLAMP_MIN

Shape = Tuple[int, int]


def _grid_angles(shape: Shape, like: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Compute the row, column and sequence angles of each token.

    Args:
        shape (tuple[int, int]): Grid ``(h, w)``.
        like (Tensor): Tensor that provides the dtype and device.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Angles in radians, each of shape
        ``(h * w,)``.
    """
    h, w = shape
    index = torch.arange(h * w, device=like.device)
    row = torch.div(index, w, rounding_mode='floor')
    # The angles are computed in float32 for every dtype, as in the official
    # code.
    angles = [
        math.pi / 2 * position.float() / length
        for position, length in ((row, h), (index % w, w), (index, h * w))
    ]
    a, b, c = (angle.to(like.dtype) for angle in angles)
    return a, b, c


def vicinity_weight(
    query_shape: Shape, key_shape: Shape, locality: str, like: Tensor
) -> Tensor:
    """Compute the vicinity weight of each query token and key token.

    Args:
        query_shape (tuple[int, int]): Query grid ``(h, w)`` with h * w = N.
        key_shape (tuple[int, int]): Key grid ``(h, w)`` with h * w = M.
        locality (str): 'sum', 'product', '1d' or 'none'.
        like (Tensor): Tensor that provides the dtype and device.

    Returns:
        Tensor: Weights of shape ``(N, M)``, in [0, 2] for 'sum' and in [0, 1]
        otherwise.
    """
    # Query angles (N, 1) and key angles (1, M).
    a_q, b_q, c_q = (t[:, None] for t in _grid_angles(query_shape, like))
    a_k, b_k, c_k = (t[None, :] for t in _grid_angles(key_shape, like))
    if locality == 'sum':
        return (a_q - a_k).cos() + (b_q - b_k).cos()
    if locality == 'product':
        return (a_q - a_k).cos() * (b_q - b_k).cos()
    if locality == '1d':
        return (c_q - c_k).cos()
    return torch.ones_like(a_q * a_k)


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    eps: float,
) -> Tensor:
    """Vicinity attention by its quadratic definition, without clamps.

    Args:
        q (Tensor): Queries of shape ``(B, heads, N, d)``, before the ReLU.
        k (Tensor): Keys of shape ``(B, heads, M, d)``, before the ReLU.
        v (Tensor): Values of shape ``(B, heads, M, d)``.
        query_shape (tuple[int, int]): Query grid ``(h, w)`` with h * w = N.
        key_shape (tuple[int, int]): Key grid ``(h, w)`` with h * w = M.
        locality (str): 'sum', 'product', '1d' or 'none'.
        eps (float): Value added to the sum of weights.

    Returns:
        Tensor: Output of shape ``(B, heads, N, d)``.
    """
    # (B, heads, N, d) @ (B, heads, d, M) -> (B, heads, N, M)
    weight = q.relu() @ k.relu().transpose(-2, -1)
    weight = weight * vicinity_weight(query_shape, key_shape, locality, q)
    return (weight @ v) / (weight.sum(dim=-1, keepdim=True) + eps)


def vicinity_features(t: Tensor, shape: Shape, locality: str) -> Tensor:
    """Compute the features ``F(t)`` of the linear form.

    They satisfy ``F(q_p) . F(k_r) = q_p . k_r * vicinity_weight(p, r)``.

    Args:
        t (Tensor): Queries or keys of shape ``(B, heads, h * w, d)``, after
            the ReLU.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: Features of shape ``(B, heads, h * w, n * d)``, where n is 4
        for 'sum' and 'product', 2 for '1d' and 1 for 'none'.
    """
    # (N,) -> (N, 1)
    a, b, c = (angle[:, None] for angle in _grid_angles(shape, t))
    factors: List[Tensor]
    if locality == 'sum':
        factors = [a.cos(), a.sin(), b.cos(), b.sin()]
    elif locality == 'product':
        factors = [
            a.cos() * b.cos(),
            a.cos() * b.sin(),
            a.sin() * b.cos(),
            a.sin() * b.sin(),
        ]
    elif locality == '1d':
        factors = [c.cos(), c.sin()]
    else:
        return t
    return torch.cat([t * factor for factor in factors], dim=-1)


def magnitude_clamp(t: Tensor) -> Tensor:
    """Clamp magnitudes: ``sign(t) * clip(|t|, 1e-4, 1e4)``.

    Args:
        t (Tensor): Floating-point tensor of any shape.

    Returns:
        Tensor: Clamped tensor with the shape and dtype of ``t``.
    """
    return t.sign() * t.abs().clamp(CLAMP_MIN, CLAMP_MAX)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    eps: float,
) -> Tensor:
    """Linear form with the clamps of the published models.

    The arguments and the result are those of :func:`quadratic_attention`.
    """
    features_q = vicinity_features(q.relu(), query_shape, locality)
    features_k = vicinity_features(k.relu(), key_shape, locality)
    # (B, heads, n*d, M) @ (B, heads, M, d) -> (B, heads, n*d, d)
    kv = magnitude_clamp(features_k.transpose(-2, -1) @ v)
    # (B, heads, n*d) -> (B, heads, n*d, 1). The sum of keys is not clamped.
    key_sum = features_k.sum(dim=-2).unsqueeze(-1)
    normaliser = magnitude_clamp(1 / (features_q @ key_sum + eps))
    numerator = magnitude_clamp(features_q @ kv)  # (B, heads, N, d)
    return magnitude_clamp(numerator * normaliser)
