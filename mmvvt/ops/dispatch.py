"""The backends: which there are, and which one can run."""

import importlib.util
import os
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from ..errors import BackendError, UserError

BACKENDS = ('auto', 'reference', 'torch', 'triton')

DEFAULT_BACKEND = os.environ.get('MMVVT_BACKEND', 'auto')
if DEFAULT_BACKEND not in BACKENDS:
    raise UserError(
        f'the environment variable MMVVT_BACKEND must be one of '
        f'{BACKENDS}, got {DEFAULT_BACKEND!r}'
    )

# Looked for, not imported: that takes a second.
HAS_TRITON = importlib.util.find_spec('triton') is not None
# Triton reads the variable when it is imported.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_obstacle(tensors: Dict[str, Tensor]) -> Optional[str]:
    """Why no Triton kernel can take these tensors; None if one can."""
    if not HAS_TRITON:
        return 'Triton is not installed'
    if torch.version.hip:
        return 'the Triton kernels are for NVIDIA, this is a ROCm build'
    for name, t in tensors.items():
        if not t.is_cuda and not INTERPRETED:
            return (
                f'Triton needs CUDA tensors, {name} is on {t.device} '
                '(TRITON_INTERPRET=1 in the environment runs it slowly '
                'on a CPU)'
            )
        if t.is_cuda and torch.cuda.get_device_properties(t.device).major < 8:
            return (
                'the Triton kernels need an NVIDIA GPU of compute '
                f'capability 8.0 (Ampere) or later for {name}'
            )
        if t.dtype not in TRITON_DTYPES:
            return (
                f'the Triton kernels compute in float32, {name} is {t.dtype}'
            )
        if t.numel() == 0:
            return f'a Triton kernel needs something to do, {name} is empty'
    return None


def check_backend(
    backend: str,
    tensors: Optional[Dict[str, Tensor]] = None,
    obstacle: Optional[str] = None,
) -> str:
    """Name of the backend that will run.

    Args:
        backend (str): One of :data:`BACKENDS`. 'auto' stands for the
            environment variable ``MMVVT_BACKEND`` where that is set, and for
            'torch' otherwise. It does not take 'triton' by itself: those
            kernels have been proven in Triton's interpreter and compiled for
            GPUs, but not timed on one yet.
        tensors (dict[str, Tensor], optional): The tensors it is to run on,
            by name. Defaults to None, not known yet: 'triton' only has to be
            installed then.
        obstacle (str, optional): Why the Triton kernel cannot take these
            arguments, if the operation knows a reason. Defaults to None.

    Returns:
        str: 'reference', 'torch' or 'triton'.

    Raises:
        UserError: If there is no such backend.
        BackendError: If it cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise UserError(f'backend must be one of {BACKENDS}, got {backend!r}')
    if backend == 'auto':
        backend = DEFAULT_BACKEND
    if backend == 'auto':
        backend = 'torch'
    if backend != 'triton':
        return backend
    obstacle = _triton_obstacle(tensors or {}) or obstacle
    if obstacle is not None:
        raise BackendError(
            f"backend 'triton' cannot run: {obstacle}; use "
            "'auto', 'torch' or 'reference'"
        )
    return backend


def check_grid(
    name: str, shape: Tuple[int, int], tokens: int, tensor_name: str
) -> Tuple[int, int]:
    """Raise a UserError unless the grid ``(h, w)`` has that many tokens."""
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
        raise UserError(
            f'{name} must be (h, w), both at least 1, got {tuple(shape)}'
        )
    if shape[0] * shape[1] != tokens:
        raise UserError(
            f'{name} {tuple(shape)} has {shape[0] * shape[1]} tokens, '
            f'but {tensor_name} has {tokens}'
        )
    return shape[0], shape[1]
