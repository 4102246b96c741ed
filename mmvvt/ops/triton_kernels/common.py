"""What the kernels share: how work is cut, rounding, sums of chunks."""

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
    """Run on the device of the first argument; Triton takes the current."""

    @wraps(function)
    def run(t: Tensor, *args):
        with torch.cuda.device_of(t):
            return function(t, *args)

    return run


def num_programs(device: torch.device) -> int:
    """Programs that fill the device once: one for each multiprocessor."""
    if device.type != 'cuda':
        return 4  # the interpreter: enough that chunks get tested
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(items: int, unit: int, programs: int) -> Tuple[int, int]:
    """Cut items into equal chunks of whole units.

    Args:
        items (int): At least 1.
        unit (int): Items that a program takes at a time.
        programs (int): Chunks wanted; there may be fewer, never none.

    Returns:
        tuple[int, int]: Items of a chunk, number of chunks.
    """
    units = triton.cdiv(items, unit)
    chunk = triton.cdiv(units, max(1, min(programs, units))) * unit
    return chunk, triton.cdiv(items, chunk)


@triton.jit
def round_bits(x, DROP: tl.constexpr):
    """Round a float32 to the nearest one whose last DROP bits are 0."""
    bits = x.to(tl.int32, bitcast=True) + (1 << (DROP - 1))
    return (bits & -(1 << DROP)).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """Round to a type."""
    if _INTERPRETED and TYPE == tl.bfloat16 and x.dtype == tl.float32:
        x = round_bits(x, 16)  # the interpreter drops bits; a GPU rounds
    return x.to(TYPE)


@triton.jit
def inside(x):
    """Where the clamp has a gradient."""
    return (tl.abs(x) >= _LOW) & (tl.abs(x) <= _HIGH)


@triton.jit
def clamp(x):
    """``sign(x) * clip(|x|, 1e-4, 1e4)``; NaN stays NaN."""
    size = tl.abs(x)
    size = tl.where(size < _LOW, _LOW, size)
    size = tl.where(size > _HIGH, _HIGH, size)
    return tl.where(x > 0, size, tl.where(x < 0, -size, x))


@triton.jit(do_not_specialize=['chunks', 'groups'])
def _add_chunks(
    partial_ptr,
    sums_ptr,
    forward_ptr,
    chunks,
    groups,
    LENGTH: tl.constexpr,
    CLAMPED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
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
    """Add the chunks' sums, always in one order.

    Args:
        partial (Tensor): ``(chunks, groups, length)``, float32.
        forward (Tensor, optional): ``(groups, length)``, sums of a forward
            pass, if these are their gradients. Defaults to None.
        clamped (int): The first ``clamped`` numbers of each group become 0
            where the clamp held the forward pass's number. Defaults to 0.

    Returns:
        Tensor: ``(groups, length)``.
    """
    chunks, groups, length = partial.shape
    if chunks == 1 and forward is None:
        return partial[0]
    sums = partial.new_empty((groups, length))
    block = 8192 if INTERPRETED else 128  # there, few programs are fast
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
