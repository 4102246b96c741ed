"""The MLP branch ``x + MLP(LayerNorm(x))``, computed in strips on CPUs.

The hidden layer has up to 8 times as many channels as the input. Computed in
strips, its activations stay in the CPU caches. The backward pass recomputes
them, which is faster than loading them from memory. If a whole image fits
into one strip, its hidden activations are saved instead.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..autograd import needs_custom_backward, without_autocast
from .common import (
    GradSums,
    RowWindow,
    cut,
    dtype_of_strips,
    incoming_grad,
    linear,
    sum_dtype,
    to_images,
)
from .native_ops import select_ops


class MLPWeights(NamedTuple):
    """Weights of the MLP branch with C channels and D hidden channels.

    Attributes:
        norm_weight (Tensor): LayerNorm weight of shape ``(C, )``.
        norm_bias (Tensor): LayerNorm bias of shape ``(C, )``.
        fc1_weight (Tensor): Weight of shape ``(D, C)``.
        fc1_bias (Tensor): Bias of shape ``(D, )``.
        dwconv_weight (Tensor): Weight of shape ``(D, 1, 3, 3)``.
        dwconv_bias (Tensor): Bias of shape ``(D, )``.
        fc2_weight (Tensor): Weight of shape ``(C, D)``.
        fc2_bias (Tensor): Bias of shape ``(C, )``.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    dwconv_weight: Tensor
    dwconv_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def to(self, dtype: torch.dtype) -> 'MLPWeights':
        """Convert the weights once for all strips; LayerNorm keeps float32."""
        norm = sum_dtype(dtype)
        return MLPWeights(
            *(t.to(norm) for t in self[:2]), *(t.to(dtype) for t in self[2:])
        )


def _forward(
    x: Tensor,
    weights: MLPWeights,
    eps: float,
    scale: Optional[Tensor],
    kept: Optional[list],
    out: Tensor,
) -> Tensor:
    """Compute the MLP branch.

    Args:
        x (Tensor): Images of shape ``(B, h, w, C)``.
        weights (MLPWeights): Weights of the branch, converted to the dtype in
            which the strips are computed.
        eps (float): Epsilon of the LayerNorm.
        scale (Tensor, optional): Per-sample drop-path scale of shape
            ``(B, 1, 1, 1)``.
        kept (list, optional): List to which the hidden activations of images
            that fit into one strip are appended. If None, none are saved.
        out (Tensor): Output tensor of the shape of ``x``. It may be ``x``
            itself, because each row is written after it has been read.

    Returns:
        Tensor: ``out``.
    """
    batch, height, width, _ = x.shape
    hidden_dims = weights.fc1_weight.shape[0]
    dtype = weights.fc1_weight.dtype
    window = RowWindow(height)
    ops = select_ops(x, dtype, hidden_dims)
    for images, strips in cut(batch, height, width, hidden_dims):
        for rows in strips:
            normed, _ = ops.layer_norm(
                x[images, rows],
                weights.norm_weight,
                weights.norm_bias,
                eps,
                dtype,
            )
            hidden = linear(normed, weights.fc1_weight, weights.fc1_bias)
            if kept is not None and len(strips) == 1:
                kept.append(hidden)
            mixed, rows = window.push(hidden, rows)
            active = ops.depthwise_gelu(
                mixed, weights.dwconv_weight, weights.dwconv_bias
            )
            branch = linear(active, weights.fc2_weight, weights.fc2_bias)
            ops.residual(
                x[images, rows],
                branch,
                None,
                False,
                None if scale is None else scale[images],
                out[images, rows],
            )
            # The next strip uses this memory again.
            del hidden, mixed, active, branch
    return out


class _MLPBranch(torch.autograd.Function):
    """MLP branch that recomputes activations in the backward pass."""

    @staticmethod
    def forward(ctx, x, eps, scale, dtype, *weights):
        kept: List[Tensor] = []
        with without_autocast(x):
            out = _forward(
                x,
                MLPWeights(*weights).to(dtype),
                eps,
                scale,
                kept,
                torch.empty_like(x),
            )
        ctx.eps, ctx.dtype = eps, dtype
        ctx.save_for_backward(x, scale, *weights, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = incoming_grad(grad)
        with without_autocast(grad):
            return _MLPBranch._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        x, scale, *saved = ctx.saved_tensors
        number, dtype = len(MLPWeights._fields), ctx.dtype
        weights = MLPWeights(*saved[:number]).to(dtype)
        kept = iter(saved[number:])
        batch, height, width, _ = x.shape
        hidden_dims = weights.fc1_weight.shape[0]
        # Weights that map gradients of outputs to gradients of inputs.
        to_hidden = weights.fc2_weight.t().contiguous()  # (D, C)
        to_tokens = weights.fc1_weight.t().contiguous()  # (C, D)
        flipped = weights.dwconv_weight.flip(-2, -1)

        grad_x = torch.empty_like(x)
        grads = GradSums()
        window, grad_window = RowWindow(height), RowWindow(height)
        ops = select_ops(x, dtype, hidden_dims)
        norm = (weights.norm_weight, weights.norm_bias, ctx.eps)
        for images, strips in cut(batch, height, width, hidden_dims):
            for rows in strips:
                if len(strips) == 1:
                    hidden = next(kept)
                else:
                    normed, _ = ops.layer_norm(x[images, rows], *norm, dtype)
                    hidden = linear(
                        normed, weights.fc1_weight, weights.fc1_bias
                    )
                mixed, rows = window.push(hidden, rows)
                branch_grad = grad[images, rows]  # (b, m, w, C)
                if scale is not None:
                    branch_grad = branch_grad * scale[images]
                branch_grad = branch_grad.to(dtype)
                active, mixed_grad, weight_grad, bias_grad = (
                    ops.depthwise_gelu_backward(
                        mixed,
                        weights.dwconv_weight,
                        weights.dwconv_bias,
                        linear(branch_grad, to_hidden),  # (b, m, w, D)
                    )
                )
                grads.add('fc2_bias', ops.sum_pixels(branch_grad))
                grads.add_product('fc2_weight', branch_grad, active)
                grads.add('dwconv_weight', weight_grad)
                grads.add('dwconv_bias', bias_grad)

                # The input gradient of the convolution is a convolution with
                # the flipped weight. Its window lags one more row behind.
                mixed, rows = grad_window.push(mixed_grad, rows)
                hidden_grad = ops.depthwise(mixed, flipped, None)
                tokens = x[images, rows]
                normed, statistics = ops.layer_norm(tokens, *norm, dtype)
                grads.add('fc1_bias', ops.sum_pixels(hidden_grad))
                grads.add_product('fc1_weight', hidden_grad, normed)
                ops.layer_norm_backward(
                    tokens,
                    linear(hidden_grad, to_tokens),
                    None,
                    grad[images, rows],
                    *norm,
                    statistics,
                    grad_x[images, rows],
                    grads,
                )
        return grad_x, None, None, None, *grads.of(MLPWeights._fields)


def mlp_branch(
    x: Tensor,
    spatial_shape: Tuple[int, int],
    weights: MLPWeights,
    eps: float,
    scale: Optional[Tensor] = None,
    inplace: bool = False,
) -> Tensor:
    """Compute ``x + scale * fc2(gelu(dwconv(fc1(LayerNorm(x)))))`` in strips.

    Double backward is not supported.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)`` on a CPU, in row-major
            order.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.
        weights (MLPWeights): Weights of the branch.
        eps (float): Epsilon of the LayerNorm.
        scale (Tensor, optional): Per-sample drop-path scale of shape
            ``(B, 1, 1)``. If None, the branch is not scaled. Defaults to
            None.
        inplace (bool): Whether to modify ``x`` in place if no gradient is
            recorded. Defaults to False.

    Returns:
        Tensor: Tokens of shape ``(B, N, C)``.

    Raises:
        RuntimeError: In the backward pass, if it runs with
            ``create_graph=True``.
    """
    x, scale = to_images(x, spatial_shape, scale)
    dtype = dtype_of_strips(x)
    if needs_custom_backward(x, *weights):
        out = _MLPBranch.apply(x, eps, scale, dtype, *weights)
    else:
        out = x if inplace else torch.empty_like(x)
        with without_autocast(x):
            out = _forward(x, weights.to(dtype), eps, scale, None, out)
    return out.flatten(1, 2)  # (B, N, C)
