"""Peak memory of this process, or of the GPU's tensors."""

import torch

from ..errors import UserError


def peak_memory_gib() -> float:
    """Peak memory since the process started, in GiB.

    With a GPU: of the tensors on it (since PyTorch's statistics were last
    reset). Without one: resident memory of the whole process, with libraries
    and weights.

    Returns:
        float: GiB.

    Raises:
        UserError: Without a GPU, on a system other than Linux.
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
