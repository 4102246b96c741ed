"""Measurement of the memory of a process, and limits for it."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch

from ..errors import UserError

# Limit and use of the memory of a container in bytes, and the field of its
# statistics with the cached files that can be dropped: version 2 and version 1
# of control groups.
CONTROL_GROUPS = (
    (
        '/sys/fs/cgroup',
        'memory.max',
        'memory.current',
        'inactive_file',
    ),
    (
        '/sys/fs/cgroup/memory',
        'memory.limit_in_bytes',
        'memory.usage_in_bytes',
        'total_inactive_file',
    ),
)


def _read_kib(path: str, field: str, what: str) -> float:
    """Read a field of a file of /proc, in GiB."""
    try:
        with open(path, encoding='utf-8') as file:
            found = re.search(rf'^{field}:\s+(\d+) kB$', file.read(), re.M)
    except OSError:
        found = None
    if found is None:
        raise UserError(f'{what} can be measured on Linux only')
    return int(found[1]) / 2**20


def resident_gib() -> float:
    """Return the memory that the process uses now, in GiB.

    Raises:
        UserError: If the system is not Linux.
    """
    return _read_kib('/proc/self/status', 'VmRSS', 'the memory of a process')


def available_gib() -> float:
    """Return the memory that new processes can use without swapping, in GiB.

    This is what the system reports as available. In a container with a
    smaller limit, it is the part of the limit that is not in use.

    Raises:
        UserError: If the system is not Linux.
    """
    available = _read_kib('/proc/meminfo', 'MemAvailable', 'available memory')
    for folder, limit_name, usage_name, field in CONTROL_GROUPS:
        try:
            limit, usage = (
                int(Path(folder, name).read_text(encoding='utf-8'))
                for name in (limit_name, usage_name)
            )
            statistics = Path(folder, 'memory.stat').read_text('utf-8')
        except (OSError, ValueError):  # 'max' means that there is no limit
            continue
        cached = re.search(rf'^{field} (\d+)$', statistics, re.M)
        usage -= int(cached[1]) if cached else 0
        available = min(available, (limit - usage) / 2**30)
    return available


@contextmanager
def memory_limit(gib: float) -> Iterator[None]:
    """Limit the memory of this process in a block.

    The size of the address space may grow by the limit less the memory that
    the process uses at the start of the block. An allocation beyond fails
    in this process, and the system does not have to end one.

    Args:
        gib (float): Limit in GiB. It includes the libraries.

    Raises:
        MemoryError: If the process uses more than the limit at the start.
        UserError: If the system is not Linux.
    """
    import resource

    used = resident_gib()
    if used >= gib:
        raise MemoryError(f'{used:.2f} GiB in use, limit {gib:.2f} GiB')
    size = _read_kib('/proc/self/status', 'VmSize', 'the memory of a process')
    allowed = int((size + gib - used) * 2**30)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            allowed = min(allowed, other)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Parts of the messages of errors that PyTorch, its libraries and the C++
# library raise if an allocation fails.
NO_MEMORY = (
    'out of memory',
    "can't allocate memory",
    'cannot allocate memory',
    'not enough memory',
    'bad_alloc',
    'bad allocation',
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error was raised because an allocation failed."""
    return isinstance(error, MemoryError) or any(
        part in str(error).lower() for part in NO_MEMORY
    )


def peak_memory_gib() -> float:
    """Return the peak memory in GiB.

    With a GPU, this is the peak memory of the tensors on it since the
    statistics of PyTorch were last reset. Without a GPU, it is the peak
    resident memory of the process since it started, including libraries and
    weights.

    Returns:
        float: Peak memory in GiB.

    Raises:
        UserError: If there is no GPU and the system is not Linux.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return _read_kib(
        '/proc/self/status', 'VmHWM', 'the peak memory of a process'
    )
