"""The attention branch ``x + attention(LayerNorm(x))`` in strips on CPUs.

The forward pass visits the strips twice. The first pass accumulates the
key-value sums, and the second pass multiplies the queries by these sums. The
features of n * d channels per head stay in the CPU caches. Only the
projections and the outputs of the output projection are saved for the
backward pass; recomputing the other activations is faster than storing them.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..angles import NUM_FACTORS
from ..autograd import needs_custom_backward, without_autocast
from ..clamp import mask_clamp_grad
from .common import (
    GradSums,
    all_strips,
    dtype_of_strips,
    incoming_grad,
    linear,
    sum_dtype,
    to_images,
)
from .native_ops import select_ops


class AttentionWeights(NamedTuple):
    """Weights of the attention branch.

    C is the number of channels, R the number of channels after the reduction,
    and S the number of hidden channels of the gate.

    Attributes:
        norm_weight (Tensor): LayerNorm weight of shape ``(C, )``.
        norm_bias (Tensor): LayerNorm bias of shape ``(C, )``.
        qkv_weight (Tensor): Weight of the query, key and value projections,
            in this order, of shape ``(3 * R, C)``.
        qkv_bias (Tensor): Bias of shape ``(3 * R, )``.
        out_weight (Tensor): Weight of the output projection, ``(C, R)``.
        out_bias (Tensor): Bias of shape ``(C, )``.
        squeeze_weight (Tensor): First layer of the gate, ``(S, C)``.
        excite_weight (Tensor): Second layer of the gate, ``(C, S)``.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    squeeze_weight: Tensor
    excite_weight: Tensor

    def to(self, dtype: torch.dtype) -> 'AttentionWeights':
        """Convert once for all strips; LayerNorm and gate keep float32."""
        sums = sum_dtype(dtype)
        return AttentionWeights(
            *(t.to(sums) for t in self[:2]),
            *(t.to(dtype) for t in self[2:6]),
            *(t.to(sums) for t in self[6:]),
        )


class AttentionSettings(NamedTuple):
    """Settings of the attention branch.

    Attributes:
        num_heads (int): Number of heads, each with d = R / num_heads
            channels.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Whether to apply the clamps of the published models.
        eps (float): Value added to the sum of weights.
        norm_eps (float): Epsilon of the LayerNorm.
    """

    num_heads: int
    locality: str
    clamp: bool
    eps: float
    norm_eps: float


def _forward(
    x: Tensor,
    weights: AttentionWeights,
    settings: AttentionSettings,
    scale: Optional[Tensor],
    keep: bool,
):
    """Compute the attention branch.

    Args:
        x (Tensor): Images of shape ``(B, h, w, C)``.
        weights (AttentionWeights): Weights of the branch, converted to the
            dtype in which the strips are computed.
        settings (AttentionSettings): Settings of the branch.
        scale (Tensor, optional): Per-sample drop-path scale of shape
            ``(B, 1, 1, 1)``.
        keep (bool): Whether to save tensors for a backward pass.

    Returns:
        tuple: Output of shape ``(B, h, w, C)`` and a tuple for the backward
        pass: the key-value sums before the clamp,
        ``(B, heads, n * d, d + 1)``; the sum of the normalised tokens,
        ``(B, C)``; and two lists with a tensor for each strip, the
        projections, ``(b, m, w, 3 * R)``, and the outputs of the output
        projection, ``(b, m, w, C)``. The lists are only valid if ``keep`` is
        True.
    """
    batch, height, width, _ = x.shape
    heads, clamp = settings.num_heads, settings.clamp
    reduced_dims = weights.out_weight.shape[1]
    head_dims = reduced_dims // heads
    feature_dims = NUM_FACTORS[settings.locality] * head_dims
    dtype = weights.out_weight.dtype
    # The strip size accounts for two tensors with the width of the features.
    strips = all_strips(batch, height, width, 2 * heads * feature_dims)

    out = torch.empty_like(x)
    ops = select_ops(x, dtype, x.shape[-1], head_dims)
    of_grid = ((height, width), settings.locality, sum_dtype(dtype), x.device)
    factors = [ops.factors(rows, *of_grid) for _, rows in strips]
    sums = x.new_zeros(
        batch, heads, feature_dims, head_dims + 1, dtype=sum_dtype(dtype)
    )
    token_sum = sums.new_zeros(batch, x.shape[-1])
    projected: List[Tensor] = []
    for (images, rows), of_tokens in zip(strips, factors):
        normed, _ = ops.layer_norm(
            x[images, rows],
            weights.norm_weight,
            weights.norm_bias,
            settings.norm_eps,
            dtype,
            token_sum[images],
        )
        qkv = linear(normed, weights.qkv_weight, weights.qkv_bias)
        ops.sum_products(qkv, of_tokens, heads, sums[images])
        # If a backward pass follows, the queries, keys and values are saved.
        # Otherwise only the queries are needed, and those of several strips
        # are stored in the memory of the output until the second pass
        # overwrites them.
        if not keep and len(strips) > 1:
            queries = out[images, rows, :, :reduced_dims]
            qkv = queries.copy_(qkv[..., :reduced_dims])
        projected.append(qkv)
    _, gate = ops.gate(token_sum / (height * width), *weights[6:])

    # The outputs of the output projection are saved, because the gradient
    # masks of the following clamps depend on them.
    branches: List[Tensor] = []
    for (images, rows), qkv, of_tokens in zip(strips, projected, factors):
        merged = ops.attend(
            qkv[..., :reduced_dims],
            of_tokens,
            sums[images],
            clamp,
            settings.eps,
            dtype,
        )
        branch = linear(merged, weights.out_weight, weights.out_bias)
        if keep:
            branches.append(branch)
        ops.residual(
            x[images, rows],
            branch,
            gate[images],
            clamp,
            None if scale is None else scale[images],
            out[images, rows],
        )
    return out, (sums, token_sum, projected, branches)


class _AttentionBranch(torch.autograd.Function):
    """Attention branch that recomputes activations in the backward pass."""

    @staticmethod
    def forward(ctx, x, settings, scale, dtype, *weights):
        weights = AttentionWeights(*weights)
        with without_autocast(x):
            out, kept = _forward(x, weights.to(dtype), settings, scale, True)
        sums, token_sum, projected, branches = kept
        ctx.settings, ctx.dtype = settings, dtype
        ctx.save_for_backward(
            *(x, scale, sums, token_sum),
            *(*weights, *projected, *branches),
        )
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = incoming_grad(grad)
        with without_autocast(grad):
            return _AttentionBranch._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        x, scale, sums, token_sum, *saved = ctx.saved_tensors
        settings, dtype = ctx.settings, ctx.dtype
        number = len(AttentionWeights._fields)
        weights = AttentionWeights(*saved[:number]).to(dtype)
        batch, height, width, _ = x.shape
        heads, clamp = settings.num_heads, settings.clamp
        reduced_dims = weights.out_weight.shape[1]
        strips = all_strips(batch, height, width, 2 * heads * sums.shape[2])
        projected = saved[number : number + len(strips)]
        branches = saved[number + len(strips) :]
        mean = token_sum / (height * width)
        from_out = weights.out_weight.t().contiguous()  # (R, C)
        from_qkv = weights.qkv_weight.t().contiguous()  # (C, 3 * R)

        grads = GradSums()
        ops = select_ops(x, dtype, x.shape[-1], reduced_dims // heads)
        hidden, gate = ops.gate(mean, *weights[6:])
        grad_sums = torch.zeros_like(sums)
        grad_gate = torch.zeros_like(gate)
        of_grid = ((height, width), settings.locality, sums.dtype, x.device)
        factors = [ops.factors(rows, *of_grid) for _, rows in strips]
        # The first pass writes the query gradients to the first R channels.
        # The second pass writes the key and value gradients to the others.
        projected_grads = [torch.empty_like(qkv) for qkv in projected]
        for i, (images, rows) in enumerate(strips):
            branch_grad, bias_grad = ops.residual_backward(
                grad[images, rows],
                branches[i],
                gate[images],
                clamp,
                None if scale is None else scale[images],
                grad_gate[images],
            )
            merged = ops.attend_backward(
                projected[i][..., :reduced_dims],
                factors[i],
                sums[images],
                clamp,
                settings.eps,
                linear(branch_grad, from_out),  # (b, m, w, R)
                projected_grads[i][..., :reduced_dims],
                grad_sums[images],
            )
            grads.add('out_bias', bias_grad)
            grads.add_product('out_weight', branch_grad, merged)

        if clamp:
            mask_clamp_grad(grad_sums[..., :-1], sums[..., :-1])
        # Backward pass of the gate, down to the mean of the normalised tokens.
        gate_grad = grad_gate * gate * (1 - gate)
        grads.add('excite_weight', gate_grad.t() @ hidden)
        hidden_grad = (gate_grad @ weights.excite_weight).mul_(hidden > 0)
        grads.add('squeeze_weight', hidden_grad.t() @ mean)
        mean_grad = hidden_grad @ weights.squeeze_weight / (height * width)

        grad_x = torch.empty_like(x)
        for i, (images, rows) in enumerate(strips):
            qkv_grad = projected_grads[i]
            ops.sum_products_backward(
                projected[i],
                factors[i],
                heads,
                grad_sums[images],
                qkv_grad,
            )
            tokens = x[images, rows]
            normed, statistics = ops.layer_norm(
                tokens,
                weights.norm_weight,
                weights.norm_bias,
                settings.norm_eps,
                dtype,
            )
            grads.add('qkv_bias', ops.sum_pixels(qkv_grad))
            grads.add_product('qkv_weight', qkv_grad, normed)
            ops.layer_norm_backward(
                tokens,
                linear(qkv_grad, from_qkv),
                mean_grad[images],
                grad[images, rows],
                weights.norm_weight,
                weights.norm_bias,
                settings.norm_eps,
                statistics,
                grad_x[images, rows],
                grads,
            )
        return grad_x, None, None, None, *grads.of(AttentionWeights._fields)


def attention_branch(
    x: Tensor,
    spatial_shape: Tuple[int, int],
    weights: AttentionWeights,
    settings: AttentionSettings,
    scale: Optional[Tensor] = None,
) -> Tensor:
    """Compute ``x + scale * attention(LayerNorm(x))`` in strips.

    The attention is the gated vicinity attention of the block. Double
    backward is not supported.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)`` on a CPU, in row-major
            order.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.
        weights (AttentionWeights): Weights of the branch.
        settings (AttentionSettings): Settings of the branch.
        scale (Tensor, optional): Per-sample drop-path scale of shape
            ``(B, 1, 1)``. If None, the branch is not scaled. Defaults to
            None.

    Returns:
        Tensor: Tokens of shape ``(B, N, C)``.

    Raises:
        RuntimeError: In the backward pass, if it runs with
            ``create_graph=True``.
    """
    x, scale = to_images(x, spatial_shape, scale)
    dtype = dtype_of_strips(x)
    if needs_custom_backward(x, *weights):
        out = _AttentionBranch.apply(x, settings, scale, dtype, *weights)
    else:
        with without_autocast(x):
            out, _ = _forward(x, weights.to(dtype), settings, scale, False)
    return out.flatten(1, 2)  # (B, N, C)
