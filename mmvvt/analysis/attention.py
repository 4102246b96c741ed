"""Attention maps: how much a query token attends to each key token."""

from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor

from ..models import VicinityAttention
from ..ops.angles import axis_angles

Shape = Tuple[int, int]


class AttentionMap(NamedTuple):
    """Attention of one query token. Each map of a head has the sum 1.

    The sum is smaller only if the weights are not large against ``eps`` of
    the attention, and 0 if all of them are 0.

    Attributes:
        similarity (Tensor): Attention without the vicinity weight, computed
            from ``relu(q) . relu(k)`` alone, of shape ``(heads, h, w)``. For
            softmax attention, it is the attention.
        vicinity (Tensor): Vicinity weight of each key, ``(h, w)``.
        attention (Tensor): Attention of the model, ``(heads, h, w)``.
    """

    similarity: Tensor
    vicinity: Tensor
    attention: Tensor


def vicinity_map(
    query: Tuple[int, int],
    query_shape: Shape,
    key_shape: Shape,
    locality: str,
    like: Tensor,
) -> Tensor:
    """Compute the vicinity weights of one query and all keys.

    Args:
        query (tuple[int, int]): Row and column of the query.
        query_shape (tuple[int, int]): Query grid ``(h, w)``.
        key_shape (tuple[int, int]): Key grid ``(h, w)``.
        locality (str): 'sum', 'product', '1d' or 'none', see
            :func:`mmvvt.ops.vicinity_attention`.
        like (Tensor): Tensor that provides the dtype and device.

    Returns:
        Tensor: Weights of shape ``(h, w)`` of the key grid.
    """

    def cosines(index: int, length: int, key_length: int) -> Tensor:
        angle = axis_angles(length, like.dtype, like.device)[index]
        return (angle - axis_angles(key_length, like.dtype, like.device)).cos()

    if locality == 'none':
        return like.new_ones(key_shape)
    (row, column), (height, width) = query, query_shape
    if locality == '1d':
        keys = key_shape[0] * key_shape[1]
        weights = cosines(row * width + column, height * width, keys)
        return weights.reshape(key_shape)  # (h * w,) -> (h, w)
    rows = cosines(row, height, key_shape[0])[:, None]
    columns = cosines(column, width, key_shape[1])[None, :]
    return rows + columns if locality == 'sum' else rows * columns


@torch.no_grad()
def attention_map(
    attn: VicinityAttention,
    x: Tensor,
    spatial_shape: Shape,
    query: Tuple[int, int],
) -> AttentionMap:
    """Compute the attention of one query token, without the clamps.

    It is one row of the quadratic form, see
    :func:`mmvvt.ops.reference.quadratic_attention`. Only this row is
    computed, so the memory is linear in the number of tokens.

    Args:
        attn (VicinityAttention): Attention layer.
        x (Tensor): Input tokens of the layer, of shape ``(1, N, C)``.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.
        query (tuple[int, int]): Row and column of the query token.

    Returns:
        AttentionMap: Maps in float32 or higher precision.
    """
    layer: Any = attn
    row, column = query
    source, key_shape = layer._reduce_grid(x, spatial_shape)
    index = row * spatial_shape[1] + column
    q = layer.q_proj(x[:, index : index + 1])  # (1, 1, C / fr)
    k = layer.k_proj(source)  # (1, M, C / fr)
    dtype = torch.promote_types(k.dtype, torch.float32)
    q, k = (layer._split_heads(t).to(dtype)[0] for t in (q, k))
    if layer.attention == 'softmax':
        # (heads, M, d) @ (heads, d, 1) -> (heads, M, 1) -> (heads, h, w)
        scores = k @ q.transpose(-2, -1) * k.shape[-1] ** -0.5
        maps = scores.softmax(dim=1).reshape(-1, *key_shape)
        return AttentionMap(maps, maps.new_ones(key_shape), maps)
    q, k = q.relu(), k.relu()
    # (heads, M, d) @ (heads, d, 1) -> (heads, M, 1) -> (heads, h, w)
    similarity = (k @ q.transpose(-2, -1)).reshape(-1, *key_shape)
    vicinity = vicinity_map(
        query, spatial_shape, key_shape, layer.locality, similarity
    )
    weights = similarity * vicinity

    def normalise(t: Tensor) -> Tensor:
        return t / (t.sum(dim=(1, 2), keepdim=True) + layer.eps)

    return AttentionMap(normalise(similarity), vicinity, normalise(weights))
