"""Measurement of peak memory on the GPU or the CPU."""

import torch

from ..errors import UserError


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
    try:
        with open('/proc/self/status', encoding='utf-8') as file:
            line = next(line for line in file if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        raise UserError(
            'the peak memory of a process can be measured on Linux only'
        ) from None
    return int(line.split()[1]) / 2**20  # KiB to GiB
