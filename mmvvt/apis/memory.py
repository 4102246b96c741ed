"""A setting of the C library's memory allocator."""

import ctypes
import os

# Parameters of mallopt, from the GNU C library's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Environment variables with which a user sets the same.
MALLOC_SETTINGS = (
    'MALLOC_MMAP_THRESHOLD_',
    'MALLOC_TRIM_THRESHOLD_',
    'GLIBC_TUNABLES',
)


def keep_freed_memory() -> bool:
    """Let the GNU C library keep the memory of freed tensors for reuse.

    On a CPU, each forward pass and each training step allocates the same
    large tensors again. By default the library returns large blocks to the
    system when they are freed. Linux then provides new memory page by page
    at the first access, which can take longer than computing the values.
    This raises both of the library's thresholds to their maximum: blocks of
    up to 32 MB are kept, and so are up to 2 GB at the end of the heap.

    It is a setting of the whole process, so the package never calls it by
    itself; the tools do. Measured gains are in ``benchmarks/README.md``. It
    has no effect with another C library, on GPU memory, or where one of
    :data:`MALLOC_SETTINGS` is in the environment.

    Returns:
        bool: Whether the thresholds were changed.
    """
    if any(name in os.environ for name in MALLOC_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
