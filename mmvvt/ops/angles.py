"""Cosines and sines of the vicinity angles, built once per grid."""

import math
import threading
from collections import OrderedDict
from typing import Callable, Tuple

import torch
from torch import Tensor

from .autograd import is_transformed

# Products of a query's and a key's factor that each vicinity weight is a sum
# of, and so the copies that the features of a token consist of.
NUM_FACTORS = {'sum': 4, 'product': 4, '1d': 2, 'none': 1}
LOCALITIES = tuple(NUM_FACTORS)

# A table is (h + w) * 2 numbers, or h * w * n, which large grids of the sum
# form do without; multi-scale training meets a few hundred grids, a server
# with free input sizes any number.
MAX_CACHED_TABLES = 256

_cache: 'OrderedDict[tuple, Tuple[Tensor, ...]]' = OrderedDict()
_lock = threading.Lock()


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


def build_axis_factors(
    spatial_shape: Tuple[int, int], dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """Build what :func:`axis_factors` caches.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        dtype (torch.dtype): Type of the tables.
        device (torch.device): Where to build them.

    Returns:
        tuple[Tensor, Tensor]: Cosine and sine of each row's angle, ``(2, h)``,
        and of each column's, ``(2, w)``.
    """
    rows, cols = (axis_angles(n, dtype, device) for n in spatial_shape)
    return (
        torch.stack([rows.cos(), rows.sin()]),
        torch.stack([cols.cos(), cols.sin()]),
    )


def build_token_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tuple[Tensor]:
    """Build what :func:`token_factors` caches, in a tuple."""
    h, w = spatial_shape
    if locality == '1d':
        angles = axis_angles(h * w, dtype, device)
        return (torch.stack([angles.cos(), angles.sin()], dim=1),)
    return (
        combine_factors(
            *build_axis_factors(spatial_shape, dtype, device), locality
        ),
    )


def combine_factors(rows: Tensor, cols: Tensor, locality: str) -> Tensor:
    """Factors of tokens from those of their rows and columns.

    Args:
        rows (Tensor): ``(2, h)``.
        cols (Tensor): ``(2, w)``.
        locality (str): 'sum' or 'product'.

    Returns:
        Tensor: ``(h * w, 4)``.
    """
    grid = (2, rows.shape[1], cols.shape[1])
    rows, cols = rows[:, :, None].expand(grid), cols[:, None].expand(grid)
    if locality == 'sum':
        factors = torch.cat([rows, cols])  # (4, h, w)
    else:
        # (2, 1, h, w) * (2, h, w) -> (2, 2, h, w) -> (4, h, w)
        factors = (rows[:, None] * cols).flatten(0, 1)
    return factors.flatten(1).t().contiguous()  # (h * w, 4)


def _from_cache(
    build: Callable[..., Tuple[Tensor, ...]], *key
) -> Tuple[Tensor, ...]:
    """Return ``build(*key)``, from the cache where it is there.

    The cache keeps the :data:`MAX_CACHED_TABLES` most recently used tables.
    Several threads may use it.
    """
    if is_transformed():
        # A compiler folds the table into its kernel; a cache seen while
        # tracing would only tie the graph to one grid.
        return build(*key)
    with _lock:
        tables = _cache.get((build, *key))
        if tables is not None:
            _cache.move_to_end((build, *key))
            return tables
    # A table made under inference mode could not be saved for a later
    # backward pass.
    with torch.inference_mode(False):
        tables = build(*key)
    if type(tables[0]) is not Tensor:
        return tables  # traced with fake tensors: good for this call only
    with _lock:
        _cache[(build, *key)] = tables
        while len(_cache) > MAX_CACHED_TABLES:
            _cache.popitem(last=False)
    return tables


def axis_factors(
    spatial_shape: Tuple[int, int], dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """What each row and each column of a grid is weighed by, from a cache.

    Arguments and result are those of :func:`build_axis_factors`.
    """
    return _from_cache(build_axis_factors, tuple(spatial_shape), dtype, device)


def token_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tensor:
    """What the copies of each token's features are weighed by, from a cache.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product' or '1d'.
        dtype (torch.dtype): Type of the table.
        device (torch.device): Where to build it.

    Returns:
        Tensor: ``(h * w, n)``; n is 4, for '1d' 2.
    """
    return _from_cache(
        build_token_factors, tuple(spatial_shape), locality, dtype, device
    )[0]
