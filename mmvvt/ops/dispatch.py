"""Available backends and their requirements."""

import importlib.util
import os
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from ..errors import BackendError, UserError

BACKENDS = ('auto', 'reference', 'torch', 'triton')
"""Names of the backends of an operator."""

DEFAULT_BACKEND = os.environ.get('MMVVT_BACKEND', 'auto')
if DEFAULT_BACKEND not in BACKENDS:
    raise UserError(
        f'the environment variable MMVVT_BACKEND must be one of '
        f'{BACKENDS}, got {DEFAULT_BACKEND!r}'
    )

# Importing Triton takes about a second, so only its presence is checked.
HAS_TRITON = importlib.util.find_spec('triton') is not None
# Triton reads this variable once, when it is imported.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_obstacle(tensors: Dict[str, Tensor]) -> Optional[str]:
    """Check whether the Triton kernels support these tensors.

    Args:
        tensors (dict[str, Tensor]): Tensors by name.

    Returns:
        str or None: The reason why the Triton kernels cannot run, or None if
        they can.
    """
    if not HAS_TRITON:
        return 'Triton is not installed'
    if torch.version.hip:
        return (
            'the Triton kernels require an NVIDIA GPU, this is a ROCm build '
            'of PyTorch'
        )
    for name, t in tensors.items():
        if not t.is_cuda and not INTERPRETED:
            return (
                f'Triton requires CUDA tensors, {name} is on {t.device} (with '
                'TRITON_INTERPRET=1 in the environment, the kernels run '
                'slowly on a CPU)'
            )
        if t.is_cuda and torch.cuda.get_device_properties(t.device).major < 8:
            return (
                'the Triton kernels require an NVIDIA GPU with compute '
                f'capability 8.0 (Ampere) or higher, {name} is on {t.device}'
            )
        if t.dtype not in TRITON_DTYPES:
            return (
                f'the Triton kernels support float32, bfloat16 and float16, '
                f'{name} is {t.dtype}'
            )
        if t.numel() == 0:
            return f'the Triton kernels do not support empty tensors: {name}'
    return None


def default_backend(backend: str) -> str:
    """Replace 'auto' by the environment variable ``MMVVT_BACKEND``.

    Args:
        backend (str): One of :data:`BACKENDS`.

    Returns:
        str: One of :data:`BACKENDS`; 'auto' if it was given and the variable
        is not set.

    Raises:
        UserError: If the backend name is unknown.
    """
    if backend not in BACKENDS:
        raise UserError(f'backend must be one of {BACKENDS}, got {backend!r}')
    return DEFAULT_BACKEND if backend == 'auto' else backend


def check_backend(
    backend: str,
    tensors: Optional[Dict[str, Tensor]] = None,
    obstacle: Optional[str] = None,
) -> str:
    """Resolve a backend name and check that the backend can run.

    Args:
        backend (str): One of :data:`BACKENDS`. 'auto' is the environment
            variable ``MMVVT_BACKEND`` if it is set, and 'torch' otherwise. On
            a GPU, the operators do not ask this function about 'auto', but
            :func:`mmvvt.ops.selection.select`, which tries the Triton kernels
            on the user's machine and uses them if they are correct and
            faster. Neither the kernels nor the trial have run on a GPU in the
            tests of this project, only in Triton's interpreter.
        tensors (dict[str, Tensor], optional): Input tensors by name. If None,
            'triton' is only checked for being installed. Defaults to None.
        obstacle (str, optional): Operator-specific reason why the Triton
            kernel cannot run with these arguments. Defaults to None.

    Returns:
        str: 'reference', 'torch' or 'triton'.

    Raises:
        UserError: If the backend name is unknown.
        BackendError: If the backend cannot run. The message gives the reason.
    """
    backend = default_backend(backend)
    if backend == 'auto':
        backend = 'torch'
    if backend != 'triton':
        return backend
    obstacle = triton_obstacle(tensors or {}) or obstacle
    if obstacle is not None:
        raise BackendError(
            f"backend 'triton' cannot run: {obstacle}; use "
            "'auto', 'torch' or 'reference'"
        )
    return backend


def check_grid(
    name: str, shape: Tuple[int, int], tokens: int, tensor_name: str
) -> Tuple[int, int]:
    """Check that a grid matches the number of tokens of a tensor.

    Args:
        name (str): Argument name of the grid, for the error message.
        shape (tuple[int, int]): Grid ``(h, w)``.
        tokens (int): Number of tokens of the tensor.
        tensor_name (str): Name of the tensor, for the error message.

    Returns:
        tuple[int, int]: The grid ``(h, w)``.

    Raises:
        UserError: If the grid is invalid or h * w is not ``tokens``.
    """
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
