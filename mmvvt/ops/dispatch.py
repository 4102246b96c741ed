"""Vicinity attention: checks its arguments, picks a backend, calls it."""

import os
from contextlib import nullcontext
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import linear, reference

LOCALITIES = ('sum', 'product', '1d', 'none')
BACKENDS = ('auto', 'reference', 'torch', 'triton')

DEFAULT_BACKEND = os.environ.get('MMVVT_BACKEND', 'auto')
if DEFAULT_BACKEND not in BACKENDS:
    raise ValueError(f'the environment variable MMVVT_BACKEND must be one of '
                     f'{BACKENDS}, got {DEFAULT_BACKEND!r}')


def check_backend(backend: str) -> str:
    """Name of the backend that will run.

    Args:
        backend (str): One of :data:`BACKENDS`. 'auto' stands for the
            environment variable ``MMVVT_BACKEND`` where that is set, and for
            the fastest one that can run otherwise.

    Returns:
        str: 'reference' or 'torch'.

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
    if backend == 'triton':
        raise RuntimeError(
            "backend 'triton' cannot run: this version of mmvvt has no Triton "
            "kernels; use 'auto', 'torch' or 'reference'")
    return backend


def _check_grid(name: str, shape: Tuple[int, int], tokens: int,
                tensor_name: str) -> Tuple[int, int]:
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
            it is True. 'torch' is the linear form in stock operations.
            'auto' takes the environment variable ``MMVVT_BACKEND``, or the
            fastest backend that can run. Defaults to 'auto'.

    Returns:
        Tensor: ``(B, heads, N, d)`` in the dtype of ``q``. Sums run in
        float32 at least, whatever autocast says.

    Raises:
        ValueError: If shapes, grids or names do not fit.
        RuntimeError: If the backend cannot run, with the reason.
    """
    _check_arguments(q, k, v, locality)
    query_shape = _check_grid('spatial_shape', spatial_shape, q.shape[2], 'q')
    if key_shape is None:
        key_shape = _check_grid('spatial_shape', query_shape, k.shape[2], 'k')
    else:
        key_shape = _check_grid('key_shape', key_shape, k.shape[2], 'k')
    backend = check_backend(backend)

    dtype = q.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    device_type = q.device.type
    autocast_on = torch.is_autocast_enabled(device_type)
    with torch.autocast(
            device_type, enabled=False) if autocast_on else nullcontext():
        q, k, v = (t.to(accumulate) for t in (q, k, v))
        if backend == 'torch':
            out = linear.linear_attention(q, k, v, query_shape, key_shape,
                                          locality, clamp, eps)
        elif clamp:
            out = reference.linear_attention(q, k, v, query_shape, key_shape,
                                             locality, eps)
        else:
            out = reference.quadratic_attention(q, k, v, query_shape,
                                                key_shape, locality, eps)
    return out.to(dtype)
