"""Vicinity attention written to be read: what every fast path is held to.

:func:`quadratic_attention` is the oracle. It follows the definition, token
pair by token pair, and so needs ``N * M`` weights; it has no clamps.
:func:`linear_attention` is the plain linear form with the clamps that the
published checkpoints were trained with: features four times as wide, each
clamp a pass of its own, tables made anew at each call.
"""

import math
from typing import List, Tuple

import torch
from torch import Tensor

from .clamp import CLAMP_MAX, CLAMP_MIN

Shape = Tuple[int, int]


def _grid_angles(shape: Shape, like: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Row, column and sequence angle of each token, each ``(h * w,)``."""
    h, w = shape
    index = torch.arange(h * w, device=like.device)
    row = torch.div(index, w, rounding_mode='floor')
    # In float32 for every dtype, as the official code does it.
    angles = [
        math.pi / 2 * position.float() / length
        for position, length in ((row, h), (index % w, w), (index, h * w))
    ]
    a, b, c = (angle.to(like.dtype) for angle in angles)
    return a, b, c


def vicinity_weight(
    query_shape: Shape, key_shape: Shape, locality: str, like: Tensor
) -> Tensor:
    """Preference of each query token for each key token by their distance.

    Args:
        query_shape (tuple[int, int]): Query grid, N = h * w.
        key_shape (tuple[int, int]): Key grid, M = h * w.
        locality (str): 'sum', 'product', '1d' or 'none'.
        like (Tensor): Gives dtype and device.

    Returns:
        Tensor: ``(N, M)``, from 0 to 2 for 'sum', from 0 to 1 else.
    """
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
    """The definition, without clamps.

    Args:
        q (Tensor): ``(B, heads, N, d)`` before the ReLU.
        k (Tensor): ``(B, heads, M, d)`` before the ReLU.
        v (Tensor): ``(B, heads, M, d)``.
        query_shape (tuple[int, int]): Query grid, N = h * w.
        key_shape (tuple[int, int]): Key grid, M = h * w.
        locality (str): 'sum', 'product', '1d' or 'none'.
        eps (float): Added to the sum of weights.

    Returns:
        Tensor: ``(B, heads, N, d)``.
    """
    weight = q.relu() @ k.relu().transpose(-2, -1)  # (B, heads, N, M)
    weight = weight * vicinity_weight(query_shape, key_shape, locality, q)
    return (weight @ v) / (weight.sum(dim=-1, keepdim=True) + eps)


def vicinity_features(t: Tensor, shape: Shape, locality: str) -> Tensor:
    """``F(t)`` with ``F(q_p) . F(k_r) = q_p . k_r * vicinity weight``.

    Args:
        t (Tensor): ``(B, heads, h * w, d)`` after the ReLU.
        shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        Tensor: ``(B, heads, h * w, n * d)``; n is 4 for 'sum' and 'product',
        2 for '1d', 1 for 'none'.
    """
    a, b, c = (angle[:, None] for angle in _grid_angles(shape, t))  # (N, 1)
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
    """``sign(t) * clip(|t|, 1e-4, 1e4)``, one operation after the other.

    Args:
        t (Tensor): Any shape.

    Returns:
        Tensor: Shape and dtype of ``t``.
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
    """The plain linear form, with the clamps of the published models.

    Arguments and result are those of :func:`quadratic_attention`.
    """
    features_q = vicinity_features(q.relu(), query_shape, locality)
    features_k = vicinity_features(k.relu(), key_shape, locality)
    # (B, heads, n*d, M) @ (B, heads, M, d) -> (B, heads, n*d, d)
    kv = magnitude_clamp(features_k.transpose(-2, -1) @ v)
    # (B, heads, n*d) -> (B, heads, n*d, 1): the sum of keys is not clamped
    key_sum = features_k.sum(dim=-2).unsqueeze(-1)
    normaliser = magnitude_clamp(1 / (features_q @ key_sum + eps))
    numerator = magnitude_clamp(features_q @ kv)  # (B, heads, N, d)
    return magnitude_clamp(numerator * normaliser)
