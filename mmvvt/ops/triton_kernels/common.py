"""Utilities shared by the kernels: work splitting, rounding, reduction."""

from functools import wraps
from typing import Callable, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..clamp import CLAMP_MAX, CLAMP_MIN
from ..dispatch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOW = tl.constexpr(CLAMP_MIN)
_HIGH = tl.constexpr(CLAMP_MAX)


def on_its_device(function: Callable) -> Callable:
    """Run a function with the device of its first argument as current device.

    Triton launches kernels on the current device.

    Args:
        function (Callable): Function whose first argument is a tensor.

    Returns:
        Callable: The decorated function.
    """

    @wraps(function)
    def run(t: Tensor, *args):
        with torch.cuda.device_of(t):
            return function(t, *args)

    return run


def num_programs(device: torch.device) -> int:
    """Number of programs that fill the device: one per multiprocessor."""
    if device.type != 'cuda':
        return 4  # interpreter: more than 1, so that tests cover chunks
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(items: int, unit: int, programs: int) -> Tuple[int, int]:
    """Split items into chunks of equal size, a multiple of ``unit``.

    The last chunk may be smaller.

    Args:
        items (int): Number of items, at least 1.
        unit (int): Number of items that a program processes at a time.
        programs (int): Maximum number of chunks. Values below 1 are treated
            as 1.

    Returns:
        tuple[int, int]: Number of items per chunk and number of chunks.
    """
    units = triton.cdiv(items, unit)
    chunk = triton.cdiv(units, max(1, min(programs, units))) * unit
    return chunk, triton.cdiv(items, chunk)


@triton.jit
def round_bits(x, DROP: tl.constexpr):
    """Round float32 values to the nearest ones whose last DROP bits are 0."""
    bits = x.to(tl.int32, bitcast=True) + (1 << (DROP - 1))
    return (bits & -(1 << DROP)).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """Convert to the dtype TYPE, rounding to nearest."""
    if _INTERPRETED and TYPE == tl.bfloat16 and x.dtype == tl.float32:
        x = round_bits(x, 16)  # the interpreter truncates, a GPU rounds
    return x.to(TYPE)


@triton.jit
def inside(x):
    """Return True where x is within the clamp's bounds, False elsewhere.

    The gradient of the clamp is 1 inside the bounds and 0 outside.
    """
    return (tl.abs(x) >= _LOW) & (tl.abs(x) <= _HIGH)


@triton.jit
def clamp(x):
    """Compute ``sign(x) * clip(|x|, 1e-4, 1e4)``; NaN is propagated."""
    size = tl.abs(x)
    size = tl.where(size < _LOW, _LOW, size)
    size = tl.where(size > _HIGH, _HIGH, size)
    return tl.where(x > 0, size, tl.where(x < 0, -size, x))


@triton.jit(do_not_specialize=['chunks', 'groups'])
def _add_chunks(
    partial_ptr,  # (chunks, groups, LENGTH), float32
    sums_ptr,  # (groups, LENGTH), float32, output
    forward_ptr,  # (groups, LENGTH), float32, or None
    chunks,  # number of chunks
    groups,  # number of groups
    LENGTH: tl.constexpr,  # elements per group
    CLAMPED: tl.constexpr,  # number of leading elements that are masked
    MASKED: tl.constexpr,  # whether forward_ptr is used
    BLOCK: tl.constexpr,  # elements per program
    CHUNKS: tl.constexpr,  # chunks loaded at once, a power of two
):
    """Add the partial sums of all chunks (see :func:`add_chunks`)."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < LENGTH
    partial_ptr += group * LENGTH
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, CHUNKS):
        part = (start + tl.arange(0, CHUNKS))[:, None].to(tl.int64)
        numbers = tl.load(
            partial_ptr + part * groups * LENGTH + column[None, :],
            mask=(part < chunks) & mask[None, :],
            other=0.0,
        )
        total += tl.sum(numbers, axis=0)
    if MASKED:
        forward = tl.load(
            forward_ptr + group * LENGTH + column, mask=mask, other=0.0
        )
        total = tl.where((column < CLAMPED) & ~inside(forward), 0.0, total)
    tl.store(sums_ptr + group * LENGTH + column, total, mask=mask)


def add_chunks(
    partial: Tensor, forward: Optional[Tensor] = None, clamped: int = 0
) -> Tensor:
    """Add the partial sums of all chunks in a fixed order.

    Args:
        partial (Tensor): Partial sums of shape ``(chunks, groups, length)``,
            float32.
        forward (Tensor, optional): Sums of the forward pass, of shape
            ``(groups, length)``, if ``partial`` contains their gradients.
            Defaults to None.
        clamped (int): Number of leading elements of each group whose
            gradients are set to 0 where the value in ``forward`` is outside
            the clamp's bounds. Defaults to 0.

    Returns:
        Tensor: Sums of shape ``(groups, length)``, float32.
    """
    chunks, groups, length = partial.shape
    if chunks == 1 and forward is None:
        return partial[0]
    sums = partial.new_empty((groups, length))
    block = 8192 if INTERPRETED else 128  # few programs are faster there
    _add_chunks[(groups, triton.cdiv(length, block))](
        partial,
        sums,
        forward,
        chunks,
        groups,
        LENGTH=length,
        CLAMPED=clamped,
        MASKED=forward is not None,
        BLOCK=block,
        CHUNKS=min(32, triton.next_power_of_2(chunks)),
    )
    return sums
