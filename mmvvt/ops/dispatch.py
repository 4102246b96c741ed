"""Vicinity attention: checks its arguments, picks a backend, calls it."""

import importlib.util
import os
from contextlib import nullcontext
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from . import linear, reference

LOCALITIES = ('sum', 'product', '1d', 'none')
BACKENDS = ('auto', 'reference', 'torch', 'triton')

DEFAULT_BACKEND = os.environ.get('MMVVT_BACKEND', 'auto')
if DEFAULT_BACKEND not in BACKENDS:
    raise ValueError(f'the environment variable MMVVT_BACKEND must be one of '
                     f'{BACKENDS}, got {DEFAULT_BACKEND!r}')


# Looked for, not imported: that takes a second.
HAS_TRITON = importlib.util.find_spec('triton') is not None
# Triton reads the variable when it is imported.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_HEAD_DIM = 128


def _triton_obstacle(tensors: Dict[str, Tensor]) -> Optional[str]:
    """Why no Triton kernel can take these tensors; None if one can."""
    if not HAS_TRITON:
        return 'Triton is not installed'
    if torch.version.hip:
        return 'the Triton kernels are for NVIDIA, this is a ROCm build'
    for name, t in tensors.items():
        if not t.is_cuda and not INTERPRETED:
            return (f'Triton needs CUDA tensors, {name} is on {t.device} '
                    '(TRITON_INTERPRET=1 in the environment runs it slowly '
                    'on a CPU)')
        if t.is_cuda and torch.cuda.get_device_properties(t.device).major < 8:
            return ('the Triton kernels need an NVIDIA GPU of compute '
                    f'capability 8.0 (Ampere) or later for {name}')
        if t.dtype not in TRITON_DTYPES:
            return (f'the Triton kernels compute in float32, {name} is '
                    f'{t.dtype}')
        if t.numel() == 0:
            return f'a Triton kernel needs something to do, {name} is empty'
    return None


def check_backend(backend: str,
                  tensors: Optional[Dict[str, Tensor]] = None,
                  obstacle: Optional[str] = None) -> str:
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
        ValueError: If there is no such backend.
        RuntimeError: If it cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f'backend must be one of {BACKENDS}, got {backend!r}')
    if backend == 'auto':
        backend = DEFAULT_BACKEND
    if backend == 'auto':
        backend = 'torch'
    if backend != 'triton':
        return backend
    obstacle = _triton_obstacle(tensors or {}) or obstacle
    if obstacle is not None:
        raise RuntimeError(f"backend 'triton' cannot run: {obstacle}; use "
                           "'auto', 'torch' or 'reference'")
    return backend


def check_grid(name: str, shape: Tuple[int, int], tokens: int,
               tensor_name: str) -> Tuple[int, int]:
    """Raise a ValueError unless the grid ``(h, w)`` has that many tokens."""
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
        raise ValueError(f'{name} must be (h, w), both at least 1, '
                         f'got {tuple(shape)}')
    if shape[0] * shape[1] != tokens:
        raise ValueError(
            f'{name} {tuple(shape)} has {shape[0] * shape[1]} tokens, '
            f'but {tensor_name} has {tokens}')
    return shape[0], shape[1]


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, locality: str) -> None:
    if locality not in LOCALITIES:
        raise ValueError(
            f'locality must be one of {LOCALITIES}, got {locality!r}')
    for name, t in (('q', q), ('k', k), ('v', v)):
        if t.dim() != 4:
            raise ValueError(f'{name} must be (B, heads, tokens, d), '
                             f'got shape {tuple(t.shape)}')
        if not t.is_floating_point():
            raise ValueError(f'{name} must be floating point, got {t.dtype}')
    if k.shape != v.shape:
        raise ValueError(f'k and v must have one shape, got k '
                         f'{tuple(k.shape)} and v {tuple(v.shape)}')
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f'q {tuple(q.shape)} and k {tuple(k.shape)} must agree in '
            f'(B, heads, ., d)')


def _attention_obstacle(q: Tensor, k: Tensor, v: Tensor) -> Optional[str]:
    """What, beyond the device and the types, the Triton kernels cannot do."""
    if q.shape[-1] > TRITON_HEAD_DIM:
        return (f'the Triton kernels take heads of up to {TRITON_HEAD_DIM} '
                f'channels, q has {q.shape[-1]}')
    if not q.dtype == k.dtype == v.dtype:
        return (f'the Triton kernels take q, k and v of one type, got '
                f'{q.dtype}, {k.dtype} and {v.dtype}')
    return None


def vicinity_attention(q: Tensor,
                       k: Tensor,
                       v: Tensor,
                       spatial_shape: Tuple[int, int],
                       *,
                       key_shape: Optional[Tuple[int, int]] = None,
                       locality: str = 'sum',
                       clamp: bool = True,
                       eps: float = 1e-4,
                       backend: str = 'auto') -> Tensor:
    r"""Attention that is linear in the tokens and prefers near neighbours.

    Token p gets :math:`\sum_r w_{pr} v_r / (\sum_r w_{pr} + eps)` with
    :math:`w_{pr} = relu(q_p) \cdot relu(k_r) \, g(p, r)`, where :math:`g` is

    - 'sum': :math:`\cos(a_p - a_r) + \cos(b_p - b_r)`, in all published
      models;
    - 'product': :math:`\cos(a_p - a_r) \cos(b_p - b_r)`;
    - '1d': :math:`\cos(c_p - c_r)`;
    - 'none': 1

    and :math:`a = \pi/2 \cdot row/h`, :math:`b = \pi/2 \cdot col/w`,
    :math:`c = \pi/2 \cdot index/N`. From *Vicinity Vision Transformer*
    (arXiv 2206.10552); the clamps are those of its official code.

    Args:
        q (Tensor): ``(B, heads, N, d)``, before any activation.
        k (Tensor): ``(B, heads, M, d)``, before any activation.
        v (Tensor): ``(B, heads, M, d)``.
        spatial_shape (tuple[int, int]): Query grid ``(h, w)``, h * w = N,
            tokens in row-major order.
        key_shape (tuple[int, int], optional): Key grid, h * w = M. Defaults
            to None, the query grid.
        locality (str): 'sum', 'product', '1d' or 'none'. Defaults to 'sum'.
        clamp (bool): Limit the magnitudes of key-value sums, normaliser,
            numerator and output to [1e-4, 1e4], as the published checkpoints
            need. Defaults to True.
        eps (float): Added to the sum of weights. Defaults to 1e-4.
        backend (str): 'reference' is for reading and testing: the quadratic
            definition where ``clamp`` is False, the plain linear form where
            it is True. 'torch' is the linear form in stock operations,
            'triton' in fused kernels for NVIDIA GPUs (float32, bfloat16 or
            float16, d up to 128). 'auto' takes the environment variable
            ``MMVVT_BACKEND``, or 'torch'. Defaults to 'auto'.

    Returns:
        Tensor: ``(B, heads, N, d)`` in the dtype of ``q``. Sums run in
        float32 at least, whatever autocast says.

    Raises:
        ValueError: If shapes, grids or names do not fit.
        RuntimeError: If the backend cannot run, with the reason.
    """
    _check_arguments(q, k, v, locality)
    query_shape = check_grid('spatial_shape', spatial_shape, q.shape[2], 'q')
    if key_shape is None:
        key_shape = check_grid('spatial_shape', query_shape, k.shape[2], 'k')
    else:
        key_shape = check_grid('key_shape', key_shape, k.shape[2], 'k')
    backend = check_backend(backend, dict(q=q, k=k, v=v),
                            _attention_obstacle(q, k, v))
    if backend == 'triton':
        from .triton_kernels import attention
        return attention.linear_attention(q, k, v, query_shape, key_shape,
                                          locality, clamp, eps)

    device_type = q.device.type
    autocast_on = torch.is_autocast_enabled(device_type)
    with torch.autocast(
            device_type, enabled=False) if autocast_on else nullcontext():
        if backend == 'torch':
            return linear.linear_attention(q, k, v, query_shape, key_shape,
                                           locality, clamp, eps)
        dtype = q.dtype
        accumulate = torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(accumulate) for t in (q, k, v))
        if clamp:
            out = reference.linear_attention(q, k, v, query_shape, key_shape,
                                             locality, eps)
        else:
            out = reference.quadratic_attention(q, k, v, query_shape,
                                                key_shape, locality, eps)
        return out.to(dtype)
