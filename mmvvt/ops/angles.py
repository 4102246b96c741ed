"""Cosine and sine factors of the vicinity weights, cached per grid."""

import math
import threading
from collections import OrderedDict
from typing import Callable, Tuple

import torch
from torch import Tensor

from .autograd import is_transformed

# Number n of factors per token. Each vicinity weight is a sum of n products of
# a query factor and a key factor, so the features of a token have n * d
# channels.
NUM_FACTORS = {'sum': 4, 'product': 4, '1d': 2, 'none': 1}
LOCALITIES = tuple(NUM_FACTORS)
"""Names of the localities of the attention."""

# A table has (h + w) * 2 elements, or h * w * n elements. Large grids with
# locality 'sum' only use the smaller one. Multi-scale training uses a few
# hundred grids; inference with arbitrary input sizes has no such limit, so
# the size of the cache is bounded.
MAX_CACHED_TABLES = 256

_cache: 'OrderedDict[tuple, Tuple[Tensor, ...]]' = OrderedDict()
_lock = threading.Lock()


def axis_angles(length: int, dtype: torch.dtype, device) -> Tensor:
    """Compute the angles ``pi / 2 * index / length`` along one axis.

    Args:
        length (int): Number of rows, columns or tokens.
        dtype (torch.dtype): Floating-point type of the result.
        device (torch.device): Device of the result.

    Returns:
        Tensor: Angles of shape ``(length,)``, in radians, in [0, pi / 2).
    """
    # As in the official code, the angles are computed in float32 and with this
    # order of operations for every dtype. This is required to match its
    # gradients to 1e-7: where the sum of weights is small, the gradients
    # amplify the rounding error of the angles by a factor of about 1000.
    index = torch.arange(length, device=device, dtype=torch.float32)
    return (math.pi / 2 * index / length).to(dtype)


def build_axis_factors(
    spatial_shape: Tuple[int, int], dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """Build the tables that :func:`axis_factors` caches.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        dtype (torch.dtype): Data type of the tables.
        device (torch.device): Device of the tables.

    Returns:
        tuple[Tensor, Tensor]: Cosine and sine of the row angles, of shape
        ``(2, h)``, and of the column angles, of shape ``(2, w)``.
    """
    rows, cols = (axis_angles(n, dtype, device) for n in spatial_shape)
    return (
        torch.stack([rows.cos(), rows.sin()]),
        torch.stack([cols.cos(), cols.sin()]),
    )


def build_token_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tuple[Tensor]:
    """Build the table that :func:`token_factors` caches.

    The arguments are those of :func:`token_factors`.

    Returns:
        tuple[Tensor]: A tuple with one table of shape ``(h * w, n)``.
    """
    h, w = spatial_shape
    if locality == '1d':
        angles = axis_angles(h * w, dtype, device)
        return (torch.stack([angles.cos(), angles.sin()], dim=1),)
    return (
        combine_factors(
            *build_axis_factors(spatial_shape, dtype, device), locality
        ),
    )


def build_separate_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """Build the tables that :func:`separate_factors` caches.

    The arguments and the result are those of :func:`separate_factors`.
    """
    h = spatial_shape[0]
    rows, cols = build_axis_factors(spatial_shape, dtype, device)
    if locality == 'sum':
        # Columns: 1, cosine, sine. The first two factors are those of the row.
        of_rows = rows.new_zeros(h, 4, 3)
        of_rows[:, :2, 0] = rows.t()  # (2, h) -> (h, 2)
        of_rows[:, 2, 1] = of_rows[:, 3, 2] = 1
        cols = torch.cat([torch.ones_like(cols[:1]), cols])
    else:
        # Columns: cosine, sine. Each is multiplied by both factors of the row.
        of_rows = rows.new_zeros(h, 4, 2)
        for i in range(4):
            of_rows[:, i, i % 2] = rows[i // 2]
    return of_rows, cols.t().contiguous()  # (g, w) -> (w, g)


def combine_factors(rows: Tensor, cols: Tensor, locality: str) -> Tensor:
    """Compute the factors of each token from its row and column factors.

    Args:
        rows (Tensor): Row factors of shape ``(2, h)``.
        cols (Tensor): Column factors of shape ``(2, w)``.
        locality (str): 'sum' or 'product'.

    Returns:
        Tensor: Token factors of shape ``(h * w, 4)``.
    """
    # (2, h) -> (2, h, w) and (2, w) -> (2, h, w)
    grid = (2, rows.shape[1], cols.shape[1])
    rows, cols = rows[:, :, None].expand(grid), cols[:, None].expand(grid)
    if locality == 'sum':
        factors = torch.cat([rows, cols])  # (4, h, w)
    else:
        # (2, 1, h, w) * (2, h, w) -> (2, 2, h, w) -> (4, h, w)
        factors = (rows[:, None] * cols).flatten(0, 1)
    # (4, h, w) -> (4, h * w) -> (h * w, 4)
    return factors.flatten(1).t().contiguous()


def _from_cache(
    build: Callable[..., Tuple[Tensor, ...]], *key
) -> Tuple[Tensor, ...]:
    """Return ``build(*key)``, using a cache.

    The cache keeps the :data:`MAX_CACHED_TABLES` most recently used results
    and is thread-safe.

    Args:
        build (Callable): Function that builds the tables.
        *key: Hashable arguments of ``build``.

    Returns:
        tuple[Tensor, ...]: The tables. They must not be modified in place.
    """
    if is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        # A compiler fuses the computation of the table into its kernel.
        # Reading the cache while tracing would specialise the graph to one
        # grid, and a dispatch mode may require its own kind of tensors.
        return build(*key)
    entry = (build, *key)
    with _lock:
        tables = _cache.get(entry)
        if tables is not None:
            _cache.move_to_end(entry)
            return tables
    # Inference tensors cannot be saved for a backward pass, so inference mode
    # is disabled while a cached table is built.
    with torch.inference_mode(False):
        tables = build(*key)
    if type(tables[0]) is not Tensor:
        return tables  # fake tensors from tracing must not be cached
    with _lock:
        _cache[entry] = tables
        while len(_cache) > MAX_CACHED_TABLES:
            _cache.popitem(last=False)
    return tables


def axis_factors(
    spatial_shape: Tuple[int, int], dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """Return the cached cosine and sine factors of the rows and columns.

    The arguments and the result are those of :func:`build_axis_factors`.
    """
    rows, cols = _from_cache(
        build_axis_factors, tuple(spatial_shape), dtype, device
    )
    return rows, cols


def token_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tensor:
    """Return the cached cosine and sine factors of each token.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum', 'product' or '1d'.
        dtype (torch.dtype): Data type of the table.
        device (torch.device): Device of the table.

    Returns:
        Tensor: Factors of shape ``(h * w, n)``, where n is 4 for 'sum' and
        'product' and 2 for '1d'.
    """
    return _from_cache(
        build_token_factors, tuple(spatial_shape), locality, dtype, device
    )[0]


def separate_factors(
    spatial_shape: Tuple[int, int], locality: str, dtype: torch.dtype, device
) -> Tuple[Tensor, Tensor]:
    """Return cached tables that separate rows and columns.

    The n factors of the token in row i and column j, see
    :func:`token_factors`, are ``of_rows[i] @ of_columns[j]``. Sums over the
    tokens of a row need g blocks of features instead of n: 3 instead of 4 for
    'sum', 2 instead of 4 for 'product'.

    Args:
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.
        locality (str): 'sum' or 'product'.
        dtype (torch.dtype): Data type of the tables.
        device (torch.device): Device of the tables.

    Returns:
        tuple[Tensor, Tensor]: Tables of shapes ``(h, n, g)`` and ``(w, g)``.
    """
    of_rows, of_columns = _from_cache(
        build_separate_factors, tuple(spatial_shape), locality, dtype, device
    )
    return of_rows, of_columns
