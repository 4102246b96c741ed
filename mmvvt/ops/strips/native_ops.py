"""Operations of the strips as compiled kernels.

The kernels are in ``mmvvt/ops/native``. They compute chains of operations in
one pass over the memory, in float32.
"""

import ctypes
import functools
import logging
import math
from contextlib import nullcontext
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..angles import separate_factors, token_factors
from ..native import load
from .common import GradSums, Window, has_kernels, sum_dtype
from .torch_ops import TorchOps

logger = logging.getLogger('mmvvt')

# Rows of fewer tokens are not multiplied separately.
MIN_ROW_WIDTH = 16

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
    mmvvt_sum_tokens='pbpiin',
    mmvvt_gate='pppppiiin',
    mmvvt_depthwise='pipibbppbpiiiin',
    mmvvt_depthwise_gelu_backward='pipibbppppppiiiin',
    mmvvt_sum_products='ppbipiiiiiiippn',
    mmvvt_sum_products_backward='ppbipppiiiiiiippn',
    mmvvt_attend='pbipbfpbiiiiiiippn',
    mmvvt_attend_backward='pbipbfppppiiiiiiippn',
)


@functools.lru_cache(maxsize=None)
def _kernel(name: str) -> Any:
    library: Any = load()[0]
    function = getattr(library, name)
    function.restype = None
    function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    return function


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors are passed as pointers to their memory."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    # Recording takes longer than a kernel on a small grid.
    profiled = torch.autograd._profiler_enabled()
    with record_function(name) if profiled else nullcontext():
        _kernel(name)(*values, torch.get_num_threads())


def _is_half(t: Tensor) -> bool:
    return t.dtype is torch.bfloat16


def _floats(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _zeros(*shape: int) -> Tensor:
    """Memory that a kernel adds to, whatever the default dtype and device."""
    return torch.zeros(shape, dtype=torch.float32, device='cpu')


class Factors(NamedTuple):
    """Vicinity factors of a strip.

    Attributes:
        of_rows (Tensor): Table of shape ``(m, n, g)``.
        of_columns (Tensor): Table of shape ``(w, g)``. The factors of the
            token in row i and column j are ``of_rows[i] @ of_columns[j]``.
    """

    of_rows: Tensor
    of_columns: Tensor


def _sizes(images: int, heads: int, head_dims: int, factors: Factors) -> tuple:
    """Last arguments of the kernels of the attention."""
    of_rows, of_columns = factors
    rows, n, g = of_rows.shape
    return (
        *(images, rows, len(of_columns), heads, n, g, head_dims),
        *(of_rows, of_columns),
    )


def _of_window(window: Window) -> tuple:
    """First arguments of the kernels of the depthwise convolution."""
    above, strip, top, _ = window
    above_rows = 0 if above is None else above.shape[1]
    return above, above_rows, strip, strip.shape[1], top, _is_half(strip)


class NativeOps(TorchOps):
    """Operations on strips; :class:`TorchOps` describes the methods."""

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
        residual_grad: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        statistics: Any,
        out: Tensor,
        grads: GradSums,
    ) -> None:
        images, rows, width, channels = x.shape
        weight_grad, bias_grad = _zeros(channels), _zeros(channels)
        _call(
            'mmvvt_layer_norm_backward',
            x,
            _is_half(x),
            grad,
            _is_half(grad),
            mean_grad,
            residual_grad,
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

    def sum_pixels(self, x: Tensor) -> Tensor:
        sums = _zeros(x.shape[-1])
        _call(
            'mmvvt_sum_tokens',
            x,
            _is_half(x),
            sums,
            math.prod(x.shape[:-1]),
            x.shape[-1],
        )
        return sums

    def gate(
        self, mean: Tensor, squeeze: Tensor, excite: Tensor
    ) -> Tuple[Tensor, Tensor]:
        images, channels = mean.shape
        hidden, gate = _zeros(images, len(squeeze)), _zeros(images, channels)
        _call(
            'mmvvt_gate',
            mean,
            _floats(squeeze),
            _floats(excite),
            hidden,
            gate,
            images,
            channels,
            len(squeeze),
        )
        return hidden, gate

    def depthwise(
        self, window: Window, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        if window.top and window.bottom:
            # Without rows to join, oneDNN is faster.
            return super().depthwise(window, weight, bias)
        out = self.workspace.take('mixed', window.strip, *window.shape)
        self._convolve(window, weight, bias, False, out)
        return out

    def depthwise_gelu(
        self, window: Window, weight: Tensor, bias: Tensor
    ) -> Tensor:
        out = self.workspace.take('active', window.strip, *window.shape)
        self._convolve(window, weight, bias, True, out)
        return out

    def _convolve(
        self,
        window: Window,
        weight: Tensor,
        bias: Optional[Tensor],
        gelu: bool,
        out: Tensor,
    ) -> None:
        channels = out.shape[-1]
        _call(
            'mmvvt_depthwise',
            *_of_window(window),
            # (D, 1, 3, 3) -> (D, 9) -> (9, D)
            _floats(weight.flatten(1).t()),
            _zeros(channels) if bias is None else _floats(bias),
            gelu,
            out,
            *out.shape,
        )

    def depthwise_gelu_backward(
        self, window: Window, weight: Tensor, bias: Tensor, grad: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        active = self.workspace.take('active', grad, *grad.shape)
        mixed_grad = self.workspace.take('mixed_grad', grad, *grad.shape)
        channels = grad.shape[-1]
        sums = _zeros(10, channels)
        _call(
            'mmvvt_depthwise_gelu_backward',
            *_of_window(window),
            # (D, 1, 3, 3) -> (D, 9) -> (9, D)
            _floats(weight.flatten(1).t()),
            _floats(bias),
            grad,
            active,
            mixed_grad,
            sums,
            *grad.shape,
        )
        # (9, D) -> (D, 9) -> (D, 1, 3, 3), not as views, see weight_grad
        weight_grad = sums[:9].t().reshape(channels, 1, 3, 3).clone()
        return active, mixed_grad, weight_grad, sums[9].clone()

    def factors(
        self,
        rows: slice,
        spatial_shape: Tuple[int, int],
        locality: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Factors:
        if (
            locality in ('sum', 'product')
            and spatial_shape[1] >= MIN_ROW_WIDTH
        ):
            of_rows, of_columns = separate_factors(
                spatial_shape, locality, torch.float32, device
            )
            return Factors(of_rows[rows], of_columns)
        # All tokens of the strip are one row.
        tokens = slice(
            *(i * spatial_shape[1] for i in (rows.start, rows.stop))
        )
        if locality == 'none':
            factors = _zeros(tokens.stop - tokens.start, 1) + 1
        else:
            factors = token_factors(
                spatial_shape, locality, torch.float32, device
            )[tokens]
        unit = torch.eye(factors.shape[1], dtype=torch.float32, device=device)
        return Factors(unit[None], factors)

    def sum_products(
        self, qkv: Tensor, factors: Factors, num_heads: int, sums: Tensor
    ) -> None:
        _, k, v = qkv.chunk(3, dim=-1)
        _call(
            'mmvvt_sum_products',
            k,
            v,
            _is_half(qkv),
            qkv.stride(2),
            sums,
            *_sizes(len(qkv), num_heads, k.shape[-1] // num_heads, factors),
        )

    def sum_products_backward(
        self,
        qkv: Tensor,
        factors: Factors,
        num_heads: int,
        sums_grad: Tensor,
        out: Tensor,
    ) -> None:
        _, k, v = qkv.chunk(3, dim=-1)
        _, k_out, v_out = out.chunk(3, dim=-1)
        _call(
            'mmvvt_sum_products_backward',
            k,
            v,
            _is_half(qkv),
            qkv.stride(2),
            sums_grad,
            k_out,
            v_out,
            *_sizes(len(qkv), num_heads, k.shape[-1] // num_heads, factors),
        )

    def attend(
        self,
        q: Tensor,
        factors: Factors,
        sums: Tensor,
        clamp: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        merged = self.workspace.take('merged', q, *q.shape, dtype=dtype)
        _call(
            'mmvvt_attend',
            q,
            _is_half(q),
            q.stride(2),
            sums,
            clamp,
            eps,
            merged,
            _is_half(merged),
            *_sizes(len(q), sums.shape[1], sums.shape[3] - 1, factors),
        )
        return merged

    def attend_backward(
        self,
        q: Tensor,
        factors: Factors,
        sums: Tensor,
        clamp: bool,
        eps: float,
        grad: Tensor,
        q_grad: Tensor,
        sums_grad: Tensor,
    ) -> Tensor:
        merged = self.workspace.take('merged', q, *q.shape)
        _call(
            'mmvvt_attend_backward',
            q,
            _is_half(q),
            q.stride(2),
            sums,
            clamp,
            eps,
            grad,
            merged,
            q_grad,
            sums_grad,
            *_sizes(len(q), sums.shape[1], sums.shape[3] - 1, factors),
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

    x, weight, bias = numbers(1, 1, 3, 17, 48), *numbers(2, 2, 48)
    norm = (weight.to(sums_of), bias.to(sums_of), 1e-6)
    normed, statistics = ops.layer_norm(x, *norm, dtype)
    grads, x_grad = GradSums(), torch.zeros_like(x)
    ops.layer_norm_backward(
        x, numbers(3, *x.shape), None, x, *norm, statistics, x_grad, grads
    )
    window = Window(numbers(9, 1, 2, 17, 48), x, False, True)
    conv = (window, numbers(4, 48, 1, 3, 3), bias)
    grad = numbers(5, *window.shape)
    active = ops.depthwise_gelu(*conv).clone()
    mixed = ops.depthwise(*conv).clone()
    conv_grads = ops.depthwise_gelu_backward(*conv, grad)

    # Two heads of 24 channels
    qkv = numbers(6, 1, 3, 17, 144)
    factors = ops.factors(slice(0, 3), (3, 17), 'sum', sums_of, x.device)
    sums = x.new_zeros(1, 2, 96, 25, dtype=sums_of)
    ops.sum_products(qkv, factors, 2, sums)
    attend = (qkv[..., :48], factors, sums, True, 1e-4)
    merged = ops.attend(*attend, dtype).clone()
    qkv_grad, sums_grad = torch.zeros_like(qkv), torch.zeros_like(sums)
    ops.attend_backward(
        *attend, numbers(7, *x.shape), qkv_grad[..., :48], sums_grad
    )
    ops.sum_products_backward(qkv, factors, 2, sums_grad, qkv_grad)

    layers = numbers(8, 12, 48), numbers(10, 48, 12)
    mean = 4 * numbers(12, 1, 48).to(sums_of)
    hidden, gate = ops.gate(mean, *(t.to(sums_of) for t in layers))
    gate_grad = torch.zeros_like(gate)
    gated = (gate, True, None)
    out = torch.zeros_like(x)
    branch_grads = ops.residual_backward(x, merged, *gated, gate_grad)
    ops.residual(x, merged.clone(), *gated, out)
    return [
        *(normed, x_grad, *grads.of(('norm_weight', 'norm_bias')), active),
        *(mixed, *conv_grads, sums, merged, qkv_grad, sums_grad),
        *(hidden, gate, gate_grad, *branch_grads, out, ops.sum_pixels(x)),
    ]


@functools.lru_cache(maxsize=None)
def _is_accurate(dtype: torch.dtype) -> bool:
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
        and _is_accurate(dtype)
    ):
        return NativeOps()
    return TorchOps()
