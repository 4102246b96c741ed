"""Operations of the strips as compiled kernels.

The kernels are in ``mmvvt/ops/native/kernels.cpp``. They compute chains of
operations in one pass over the memory, in float32.
"""

import ctypes
import functools
import logging
import math
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ..native import load
from .common import GradSums, has_kernels, sum_dtype
from .torch_ops import TorchOps

logger = logging.getLogger('mmvvt')

# Arguments of the kernels: pointer, flag, float, 64-bit and 32-bit integer.
_TYPES = dict(
    p=ctypes.c_void_p,
    b=ctypes.c_bool,
    f=ctypes.c_float,
    i=ctypes.c_int64,
    n=ctypes.c_int,
)
_SIGNATURES = dict(
    mmvvt_layer_norm='pbppfpbpiiin',
    mmvvt_layer_norm_backward='pbpbpppfpppiiin',
    mmvvt_residual='pbpbpbppiiin',
    mmvvt_residual_backward='pbpbpbppppiiin',
    mmvvt_depthwise_gelu='pbipppiiiiin',
    mmvvt_depthwise_gelu_backward='pbippppppiiiiin',
    mmvvt_sum_products='ppbippiiiiin',
    mmvvt_sum_products_backward='ppbippppiiiiin',
    mmvvt_attend='pbippbfpbiiiiin',
    mmvvt_attend_backward='pbippbfppppiiiiin',
)


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors are passed as pointers to their memory."""
    library: Any = load()[0]
    function = getattr(library, name)
    if function.argtypes is None:
        function.restype = None
        function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    function(
        *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments),
        torch.get_num_threads(),
    )


def _is_half(t: Tensor) -> bool:
    return t.dtype is torch.bfloat16


def _floats(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _zeros(*shape: int) -> Tensor:
    """Memory that a kernel adds to, whatever the default dtype and device."""
    return torch.zeros(shape, dtype=torch.float32, device='cpu')


def _factors(factors: Optional[Tensor], tokens: int) -> Tensor:
    """Factors ``(p, n)``; without a locality, there is one factor of 1."""
    return _zeros(tokens, 1) + 1 if factors is None else factors


class NativeOps(TorchOps):
    """Operations on strips; :class:`TorchOps` describes the methods.

    The depthwise convolution without GELU is inherited: oneDNN is as fast.
    """

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        sums: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Any]:
        out = self.workspace.take('normed', x, *x.shape, dtype=dtype)
        images, rows, width, channels = x.shape
        _call(
            'mmvvt_layer_norm',
            x,
            _is_half(x),
            _floats(weight),
            _floats(bias),
            eps,
            out,
            _is_half(out),
            sums,
            images,
            rows * width,
            channels,
        )
        return out, None

    def layer_norm_backward(
        self,
        x: Tensor,
        grad: Tensor,
        mean_grad: Optional[Tensor],
        shortcut: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        statistics: Any,
        out: Tensor,
        grads: GradSums,
    ) -> None:
        images, rows, width, channels = x.shape
        weight_grad, bias_grad = _zeros(2, channels)
        _call(
            'mmvvt_layer_norm_backward',
            x,
            _is_half(x),
            grad,
            _is_half(grad),
            mean_grad,
            shortcut,
            _floats(weight),
            eps,
            out,
            weight_grad,
            bias_grad,
            images,
            rows * width,
            channels,
        )
        grads.add('norm_weight', weight_grad)
        grads.add('norm_bias', bias_grad)

    def residual(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Optional[Tensor],
        clamp: bool,
        scale: Optional[Tensor],
        out: Tensor,
    ) -> None:
        images, rows, width, channels = x.shape
        _call(
            'mmvvt_residual',
            x,
            _is_half(x),
            branch,
            _is_half(branch),
            gate,
            clamp,
            scale,
            out,
            images,
            rows * width,
            channels,
        )

    def residual_backward(
        self,
        grad: Tensor,
        branch: Tensor,
        gate: Tensor,
        clamp: bool,
        scale: Optional[Tensor],
        gate_grad: Tensor,
    ) -> Tuple[Tensor, Tensor]:
        images, rows, width, channels = grad.shape
        out = self.workspace.take('branch_grad', branch, *branch.shape)
        bias_grad = _zeros(channels)
        _call(
            'mmvvt_residual_backward',
            grad,
            _is_half(grad),
            branch,
            _is_half(branch),
            gate,
            clamp,
            scale,
            out,
            gate_grad,
            bias_grad,
            images,
            rows * width,
            channels,
        )
        return out, bias_grad

    def depthwise_gelu(
        self, window: Tensor, weight: Tensor, bias: Tensor, padding: int
    ) -> Tensor:
        images, rows, width, channels = window.shape
        rows += 2 * padding - 2
        out = self.workspace.take(
            'active', window, images, rows, width, channels
        )
        _call(
            'mmvvt_depthwise_gelu',
            window,
            _is_half(window),
            window.stride(0),
            # (D, 1, 3, 3) -> (D, 9) -> (9, D)
            _floats(weight.flatten(1).t()),
            _floats(bias),
            out,
            images,
            rows,
            width,
            channels,
            padding,
        )
        return out

    def depthwise_gelu_backward(
        self,
        window: Tensor,
        weight: Tensor,
        bias: Tensor,
        padding: int,
        grad: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        images, rows, width, channels = grad.shape
        active = self.workspace.take('active', grad, *grad.shape)
        mixed_grad = self.workspace.take('mixed_grad', grad, *grad.shape)
        sums = _zeros(10, channels)
        _call(
            'mmvvt_depthwise_gelu_backward',
            window,
            _is_half(window),
            window.stride(0),
            # (D, 1, 3, 3) -> (D, 9) -> (9, D)
            _floats(weight.flatten(1).t()),
            _floats(bias),
            grad,
            active,
            mixed_grad,
            sums,
            images,
            rows,
            width,
            channels,
            padding,
        )
        # (9, D) -> (D, 9) -> (D, 1, 3, 3)
        weight_grad = sums[:9].t().reshape(channels, 1, 3, 3)
        return active, mixed_grad, weight_grad, sums[9]

    def sum_products(
        self,
        qkv: Tensor,
        factors: Optional[Tensor],
        num_heads: int,
        sums: Tensor,
    ) -> None:
        images, rows, width, channels = qkv.shape
        factors = _factors(factors, rows * width)
        _, k, v = qkv.chunk(3, dim=-1)
        _call(
            'mmvvt_sum_products',
            k,
            v,
            _is_half(qkv),
            qkv.stride(2),
            factors,
            sums,
            images,
            rows * width,
            num_heads,
            factors.shape[1],
            channels // 3 // num_heads,
        )

    def sum_products_backward(
        self,
        qkv: Tensor,
        factors: Optional[Tensor],
        num_heads: int,
        sums_grad: Tensor,
        out: Tensor,
    ) -> None:
        images, rows, width, channels = qkv.shape
        factors = _factors(factors, rows * width)
        _, k, v = qkv.chunk(3, dim=-1)
        _, k_out, v_out = out.chunk(3, dim=-1)
        _call(
            'mmvvt_sum_products_backward',
            k,
            v,
            _is_half(qkv),
            qkv.stride(2),
            factors,
            sums_grad,
            k_out,
            v_out,
            images,
            rows * width,
            num_heads,
            factors.shape[1],
            channels // 3 // num_heads,
        )

    def attend(
        self,
        q: Tensor,
        factors: Optional[Tensor],
        sums: Tensor,
        clamp: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        images, rows, width, channels = q.shape
        factors = _factors(factors, rows * width)
        merged = self.workspace.take('merged', q, *q.shape, dtype=dtype)
        _call(
            'mmvvt_attend',
            q,
            _is_half(q),
            q.stride(2),
            factors,
            sums,
            clamp,
            eps,
            merged,
            _is_half(merged),
            images,
            rows * width,
            sums.shape[1],
            factors.shape[1],
            channels // sums.shape[1],
        )
        return merged

    def attend_backward(
        self,
        q: Tensor,
        factors: Optional[Tensor],
        sums: Tensor,
        clamp: bool,
        eps: float,
        grad: Tensor,
        q_grad: Tensor,
        sums_grad: Tensor,
    ) -> Tensor:
        images, rows, width, channels = q.shape
        factors = _factors(factors, rows * width)
        merged = self.workspace.take('merged', q, *q.shape)
        _call(
            'mmvvt_attend_backward',
            q,
            _is_half(q),
            q.stride(2),
            factors,
            sums,
            clamp,
            eps,
            grad,
            merged,
            q_grad,
            sums_grad,
            images,
            rows * width,
            sums.shape[1],
            factors.shape[1],
            channels // sums.shape[1],
        )
        return merged


def _results(ops: TorchOps, dtype: torch.dtype) -> List[Tensor]:
    """Run all operations on a small problem without random numbers."""
    sums_of = sum_dtype(dtype)

    def numbers(seed: int, *shape: int, dtype=dtype) -> Tensor:
        index = torch.arange(
            math.prod(shape), dtype=torch.float64, device='cpu'
        )
        # Rounded to bfloat16, so that all dtypes contain the same numbers.
        values = torch.sin(index * (seed + 1.1)).bfloat16()
        return values.to(dtype).view(shape)

    x, weight, bias = numbers(1, 1, 3, 5, 48), *numbers(2, 2, 48)
    norm = (weight.to(sums_of), bias.to(sums_of), 1e-6)
    normed, statistics = ops.layer_norm(x, *norm, dtype)
    grads, x_grad = GradSums(), torch.zeros_like(x)
    ops.layer_norm_backward(
        x, numbers(3, *x.shape), None, x, *norm, statistics, x_grad, grads
    )
    conv = (numbers(4, 48, 1, 3, 3), bias, 1)
    active = ops.depthwise_gelu(x, *conv).clone()
    conv_grads = ops.depthwise_gelu_backward(x, *conv, numbers(5, *x.shape))

    # Two heads of 24 channels, two factors per token
    qkv, factors = numbers(6, 1, 3, 5, 144), numbers(7, 15, 2).abs()
    factors = factors.to(sums_of)
    sums = x.new_zeros(1, 2, 48, 25, dtype=sums_of)
    ops.sum_products(qkv, factors, 2, sums)
    attend = (qkv[..., :48], factors, sums, True, 1e-4)
    merged = ops.attend(*attend, dtype).clone()
    qkv_grad, sums_grad = torch.zeros_like(qkv), torch.zeros_like(sums)
    ops.attend_backward(
        *attend, numbers(8, *x.shape), qkv_grad[..., :48], sums_grad
    )
    ops.sum_products_backward(qkv, factors, 2, sums_grad, qkv_grad)

    gate = numbers(9, 1, 48).to(sums_of)
    gate_grad = torch.zeros_like(gate)
    gated = (gate, True, None)
    out = torch.zeros_like(x)
    branch_grads = ops.residual_backward(x, merged, *gated, gate_grad)
    ops.residual(x, merged.clone(), *gated, out)
    return [
        *(normed, x_grad, *grads.of(('norm_weight', 'norm_bias')), active),
        *(*conv_grads, sums, merged, qkv_grad, sums_grad),
        *(gate_grad, *branch_grads, out),
    ]


@functools.lru_cache(maxsize=None)
def _is_right(dtype: torch.dtype) -> bool:
    """Compare the kernels with PyTorch operations in float64, once.

    The kernels are compiled by a compiler that was never tested with them.
    """
    bound = 1e-4 if dtype is torch.float32 else 0.05
    with torch.no_grad():
        ours = _results(NativeOps(), dtype)
        expected = _results(TorchOps(), torch.float64)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, expected)]
    if all(error < bound for error in errors):
        return True
    logger.warning(
        'the compiled kernels are not used in %s, because their results '
        'differ from those of PyTorch (relative errors %s); please report '
        'this with the version of g++',
        dtype,
        ', '.join(f'{error:.1e}' for error in errors),
    )
    return False


def select_ops(
    x: Tensor, dtype: torch.dtype, channels: int, head_dims: int = 8
) -> TorchOps:
    """Select the implementation of the operations on strips.

    Args:
        x (Tensor): Tokens ``(B, h, w, C)`` on a CPU.
        dtype (torch.dtype): Dtype in which the strips are computed.
        channels (int): Number of channels of the widest activation.
        head_dims (int): Number of channels of a head. Defaults to 8.

    Returns:
        TorchOps: NativeOps if :func:`~.common.has_kernels` is True,
        ``head_dims`` is a multiple of 8, and the kernels gave the right
        results for a small problem.
    """
    if (
        head_dims % 8 == 0
        and has_kernels(x, dtype, channels)
        and _is_right(dtype)
    ):
        return NativeOps()
    return TorchOps()
