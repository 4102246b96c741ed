"""Vicinity attention: argument checks and dispatch to a backend."""

from functools import partial
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..errors import UserError
from . import linear, reference
from .angles import LOCALITIES
from .autograd import without_autocast
from .dispatch import check_backend, check_grid, default_backend
from .selection import Problem, select, uniform

TRITON_HEAD_DIM = 128  # maximum number of channels per head

# The small problem of the trial: batch size, heads, and a grid that no tile
# of the kernels divides. With d = 128, an input has 3 MB in float32, and the
# features of the float64 reference have 26 MB.
TRIAL_SIZE = (4, 2)
TRIAL_GRID = (27, 29)


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, locality: str) -> None:
    if locality not in LOCALITIES:
        raise UserError(
            f'locality must be one of {LOCALITIES}, got {locality!r}'
        )
    for name, t in (('q', q), ('k', k), ('v', v)):
        if t.dim() != 4:
            raise UserError(
                f'{name} must be (B, heads, tokens, d), '
                f'got shape {tuple(t.shape)}'
            )
        if not t.is_floating_point():
            raise UserError(f'{name} must be floating point, got {t.dtype}')
    if k.shape != v.shape:
        raise UserError(
            f'k and v must have the same shape, got k '
            f'{tuple(k.shape)} and v {tuple(v.shape)}'
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise UserError(
            f'q and k must have the same B, heads and d in '
            f'(B, heads, tokens, d), got q {tuple(q.shape)} and k '
            f'{tuple(k.shape)}'
        )


def _attention_obstacle(q: Tensor, k: Tensor, v: Tensor) -> Optional[str]:
    """Check head dimension and dtypes for the Triton kernels.

    Returns:
        str or None: The reason why the kernels do not support these tensors,
        or None if they do.
    """
    if q.shape[-1] > TRITON_HEAD_DIM:
        return (
            f'the Triton kernels support at most {TRITON_HEAD_DIM} channels '
            f'per head, q has {q.shape[-1]}'
        )
    if not q.dtype == k.dtype == v.dtype:
        return (
            f'the Triton kernels require q, k and v of the same dtype, got '
            f'{q.dtype}, {k.dtype} and {v.dtype}'
        )
    return None


def _small_problem(
    device: torch.device,
    dtype: torch.dtype,
    d: int,
    locality: str,
    clamp: bool,
) -> Problem:
    """Make the problem on which 'auto' tries the backends."""
    tokens = TRIAL_GRID[0] * TRIAL_GRID[1]
    shape = (*TRIAL_SIZE, tokens, d)
    # 20 % of the queries and keys are negative. At this scale, and with
    # positive values, no clamp is active, because gradients are not continuous
    # at the bounds of the clamps, where each backend rounds differently.
    q, k = uniform(-0.1, 0.4, shape, shape)
    (v,) = uniform(0.5, 1.5, shape)
    # About as large as the sum of weights: if it is small, the two terms of
    # the gradient of q nearly cancel out, which hides errors.
    eps = 0.03 * tokens * d
    return Problem(
        inputs=tuple(t.to(device, dtype) for t in (q, k, v)),
        # Without active clamps, it is the same function if clamp is False.
        plain=partial(
            reference.linear_attention,
            query_shape=TRIAL_GRID,
            key_shape=TRIAL_GRID,
            locality=locality,
            eps=eps,
        ),
        backends={
            name: partial(
                vicinity_attention,
                spatial_shape=TRIAL_GRID,
                locality=locality,
                clamp=clamp,
                eps=eps,
                backend=name,
            )
            for name in ('torch', 'triton')
        },
    )


def vicinity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spatial_shape: Tuple[int, int],
    *,
    key_shape: Optional[Tuple[int, int]] = None,
    locality: str = 'sum',
    clamp: bool = True,
    eps: float = 1e-4,
    backend: str = 'auto',
) -> Tensor:
    r"""Vicinity attention, a linear attention with a 2D locality bias.

    The output of token p is
    :math:`\sum_r w_{pr} v_r / (\sum_r w_{pr} + eps)` with
    :math:`w_{pr} = relu(q_p) \cdot relu(k_r) \, g(p, r)`. The vicinity weight
    :math:`g` depends on ``locality``:

    - 'sum': :math:`\cos(a_p - a_r) + \cos(b_p - b_r)`, used by all published
      models;
    - 'product': :math:`\cos(a_p - a_r) \cos(b_p - b_r)`;
    - '1d': :math:`\cos(c_p - c_r)`;
    - 'none': 1.

    The angles, in radians, are :math:`a = \pi/2 \cdot row/h`,
    :math:`b = \pi/2 \cdot col/w` and :math:`c = \pi/2 \cdot index/N`. The time
    and memory of the linear form grow linearly with the number of tokens.

    The method is from `Vicinity Vision Transformer
    <https://arxiv.org/abs/2206.10552>`_. The clamps follow its official code.

    Args:
        q (Tensor): Queries of shape ``(B, heads, N, d)``, before the ReLU.
        k (Tensor): Keys of shape ``(B, heads, M, d)``, before the ReLU.
        v (Tensor): Values of shape ``(B, heads, M, d)``.
        spatial_shape (tuple[int, int]): Query grid ``(h, w)`` with
            h * w = N. Tokens are in row-major order.
        key_shape (tuple[int, int], optional): Key grid ``(h, w)`` with
            h * w = M. If None, the query grid is used. Defaults to None.
        locality (str): 'sum', 'product', '1d' or 'none'. Defaults to 'sum'.
        clamp (bool): Whether to clamp the magnitudes of the key-value sums,
            normaliser, numerator and output to [1e-4, 1e4]. The published
            checkpoints require it. Defaults to True.
        eps (float): Value added to the sum of weights for numerical
            stability. Defaults to 1e-4.
        backend (str): 'reference' is the unoptimised implementation used for
            testing: the quadratic definition if ``clamp`` is False, and the
            linear form if it is True. 'torch' is the linear form in standard
            PyTorch operations. 'triton' is the linear form in fused kernels
            for NVIDIA GPUs (float32, bfloat16 or float16, d up to 128).
            'auto' uses the environment variable ``MMVVT_BACKEND`` if it is
            set. Otherwise, it uses the faster of 'triton' and 'torch' on a
            GPU, see :mod:`mmvvt.ops.selection`, and 'torch' on other devices.
            Defaults to 'auto'.

    Returns:
        Tensor: Output of shape ``(B, heads, N, d)`` in the dtype of ``q``.
        Sums are accumulated in float32 or higher precision, also under
        autocast.

    Raises:
        UserError: If a shape, grid, dtype, locality or backend name is
            invalid.
        BackendError: If the backend cannot run with these arguments.
    """
    _check_arguments(q, k, v, locality)
    query_shape = check_grid('spatial_shape', spatial_shape, q.shape[2], 'q')
    if key_shape is None:
        key_shape = check_grid('spatial_shape', query_shape, k.shape[2], 'k')
    else:
        key_shape = check_grid('key_shape', key_shape, k.shape[2], 'k')
    tensors = dict(q=q, k=k, v=v)
    obstacle = _attention_obstacle(q, k, v)
    if default_backend(backend) == 'auto':
        backend = select(
            'vicinity attention',
            _small_problem,
            dict(dtype=q.dtype, d=q.shape[-1], locality=locality, clamp=clamp),
            tensors,
            obstacle,
        )
    else:
        backend = check_backend(backend, tensors, obstacle)
    if backend == 'triton':
        from .triton_kernels import attention

        return attention.linear_attention(
            q, k, v, query_shape, key_shape, locality, clamp, eps
        )

    with without_autocast(q):
        if backend == 'torch':
            return linear.linear_attention(
                q, k, v, query_shape, key_shape, locality, clamp, eps
            )
        dtype = q.dtype
        accumulate = torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(accumulate) for t in (q, k, v))
        if clamp:
            out = reference.linear_attention(
                q, k, v, query_shape, key_shape, locality, eps
            )
        else:
            out = reference.quadratic_attention(
                q, k, v, query_shape, key_shape, locality, eps
            )
        return out.to(dtype)
