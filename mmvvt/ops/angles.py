"""Cosines and sines of the vicinity angles, built once per grid."""

import math
from collections import OrderedDict
from typing import Tuple

import torch
from torch import Tensor

# A table is (h + w) * 2 numbers, or h * w * 2 for '1d'; multi-scale training
# meets a few hundred grids, a server with free input sizes any number.
MAX_CACHED_TABLES = 256

_cache: 'OrderedDict[tuple, Tuple[Tensor, ...]]' = OrderedDict()


def axis_angles(length: int, dtype: torch.dtype, device) -> Tensor:
    """Angles ``pi / 2 * index / length`` along one axis.

    Args:
        length (int): Number of rows, columns or tokens.
        dtype (torch.dtype): A floating-point type.
        device (torch.device): Where to build them.

    Returns:
        Tensor: ``(length,)``, in radians, within [0, pi / 2).
    """
    # The official code takes the angle in float32, in this order, in a model
    # of any dtype. Its gradients cannot be met to 1e-7 without: where the sum
    # of weights is small they magnify the angle's rounding a thousandfold.
    index = torch.arange(length, device=device, dtype=torch.float32)
    return (math.pi / 2 * index / length).to(dtype)


def build_angle_tables(spatial_shape: Tuple[int, int], sequence: bool,
                       dtype: torch.dtype, device) -> Tuple[Tensor, ...]:
    """Build what :func:`angle_tables` caches.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        sequence (bool): True for one angle along the flattened sequence,
            False for one along the rows and one along the columns.
        dtype (torch.dtype): Type of the tables.
        device (torch.device): Where to build them.

    Returns:
        tuple[Tensor]: ``(cos c, sin c)``, each ``(h * w, 1)``, for a
        sequence; else ``(cos a, sin a, cos b, sin b)``, the first two
        ``(h, 1, 1)``, the last two ``(1, w, 1)``: they broadcast over
        ``(h, w, d)``.
    """
    h, w = spatial_shape
    if sequence:
        angle = axis_angles(h * w, dtype, device)[:, None]  # (N, 1)
        return angle.cos(), angle.sin()
    rows = axis_angles(h, dtype, device)[:, None, None]  # (h, 1, 1)
    cols = axis_angles(w, dtype, device)[None, :, None]  # (1, w, 1)
    return rows.cos(), rows.sin(), cols.cos(), cols.sin()


def angle_tables(spatial_shape: Tuple[int, int], sequence: bool,
                 dtype: torch.dtype, device) -> Tuple[Tensor, ...]:
    """Vicinity tables of a grid, from a cache.

    Arguments and result are those of :func:`build_angle_tables`. The cache
    keeps the :data:`MAX_CACHED_TABLES` grids used last.
    """
    if torch.compiler.is_compiling():
        # The compiler folds the table into its kernel; a cache seen while
        # tracing would only tie the graph to one grid.
        return build_angle_tables(spatial_shape, sequence, dtype, device)
    key = (*spatial_shape, sequence, dtype, device)
    tables = _cache.get(key)
    if tables is None:
        # A table made under inference mode could not be saved for a later
        # backward pass.
        with torch.inference_mode(False):
            tables = build_angle_tables(spatial_shape, sequence, dtype,
                                        device)
        if type(tables[0]) is not Tensor:
            return tables  # traced with fake tensors: good for this call only
        _cache[key] = tables
        if len(_cache) > MAX_CACHED_TABLES:
            _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    return tables
