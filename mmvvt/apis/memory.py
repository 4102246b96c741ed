"""Configuration of the memory allocator of the GNU C library."""

import ctypes
import os

# Parameters of mallopt, from the GNU C library's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Environment variables that configure the same thresholds.
MALLOC_SETTINGS = (
    'MALLOC_MMAP_THRESHOLD_',
    'MALLOC_TRIM_THRESHOLD_',
    'GLIBC_TUNABLES',
)


def keep_freed_memory() -> bool:
    """Let the GNU C library keep the memory of freed tensors for reuse.

    On a CPU, each forward pass and each training step allocates the same
    large tensors again. By default, the library returns large blocks to the
    system when they are freed. Linux then provides new memory page by page
    at the first access, which can take longer than computing the values.
    This function raises both thresholds of the library to their maximum:
    blocks of up to 32 MiB are kept, and up to 2 GiB at the end of the heap.

    The setting applies to the whole process. Therefore only the command-line
    tools call this function; importing the package does not. The times with
    and without it are in ``benchmarks/README.md``. The function has no
    effect with another C library, on GPU memory, or if one of
    :data:`MALLOC_SETTINGS` is set in the environment.

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
