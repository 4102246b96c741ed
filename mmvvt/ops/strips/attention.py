"""``x + attention(LayerNorm(x))`` in strips, for CPUs.

Two passes: the first sums keys times values, the second brings the sums to
the queries. In a strip the features of four times the width cost little, as
they never leave the caches. For the backward pass only the projections are
kept; the rest is cheaper to compute again than to store.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..angles import NUM_FACTORS, axis_factors, combine_factors, token_factors
from ..autograd import needs_custom_backward
from ..clamp import clamp_in_place, mask_clamp_grad
from ..linear import clamp_sums, divide, divide_backward
from .common import (
    GradSums,
    check_differentiated_once,
    cut,
    layer_norm,
    layer_norm_grads,
    linear,
    sum_pixels,
    to_images,
)


class AttentionWeights(NamedTuple):
    """Weights of the branch, of C channels, R of them after reduction.

    Attributes:
        norm_weight (Tensor): ``(C, )``.
        norm_bias (Tensor): ``(C, )``.
        qkv_weight (Tensor): ``(3 * R, C)``: queries, keys, values.
        qkv_bias (Tensor): ``(3 * R, )``.
        out_weight (Tensor): ``(C, R)``.
        out_bias (Tensor): ``(C, )``.
        squeeze_weight (Tensor): ``(S, C)``, first layer of the gate.
        excite_weight (Tensor): ``(C, S)``, second layer of the gate.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    squeeze_weight: Tensor
    excite_weight: Tensor


class AttentionSettings(NamedTuple):
    """What the branch computes.

    Attributes:
        num_heads (int): Heads, of d channels.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Apply the clamps of the published models.
        eps (float): Added to the sum of weights.
        norm_eps (float): Of the LayerNorm.
    """

    num_heads: int
    locality: str
    clamp: bool
    eps: float
    norm_eps: float


def _factors(
    shape: Tuple[int, int], rows: slice, locality: str, like: Tensor
) -> Optional[Tensor]:
    """What the copies of the features are multiplied by.

    Returns:
        Tensor: ``(m * w, n)`` for m rows: n is 4 for 'sum' and 'product' and
        2 for '1d'. None for 'none'.
    """
    if locality == 'none':
        return None
    if locality == '1d':
        factors = token_factors(shape, locality, like.dtype, like.device)
        return factors[rows.start * shape[1] : rows.stop * shape[1]]
    # Of these rows only: a table of the whole grid would not stay in cache.
    of_rows, of_cols = axis_factors(shape, like.dtype, like.device)
    return combine_factors(of_rows[:, rows], of_cols, locality)


def _features(t: Tensor, factors: Optional[Tensor]) -> Tensor:
    """``(b, heads, p, d)`` to ``(b, heads, p, n * d)``, contiguous."""
    if factors is None:
        return t.contiguous()
    out = t.new_empty(*t.shape[:3], factors.shape[1], t.shape[3])
    torch.mul(t.unsqueeze(-2), factors[:, :, None], out=out)
    return out.flatten(-2)


def _fold(grad: Tensor, factors: Optional[Tensor]) -> Tensor:
    """Gradient of ``t`` in :func:`_features` from that of its result."""
    if factors is None:
        return grad
    # (b, heads, p, n * d) -> (b, heads, p, n, d) -> (b, heads, p, d)
    grad = grad.unflatten(-1, (factors.shape[1], -1))
    return grad.mul_(factors[:, :, None]).sum(dim=-2)


def _split_heads(t: Tensor, num_heads: int) -> Tensor:
    # (b, m, w, R) -> (b, p, heads, d) -> (b, heads, p, d)
    return t.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge_heads(t: Tensor, out: Tensor) -> None:
    """``(b, heads, p, d)`` into ``(b, m, w, R)``."""
    _split_heads(out, t.shape[1]).copy_(t)


def _keys_and_values(
    projected: Tensor, factors: Optional[Tensor], num_heads: int
) -> Tuple[Tensor, Tensor]:
    """Features of the keys ``(b, heads, p, n * d)`` and the values.

    The values, ``(b, heads, p, d + 1)``, have a column of ones, so that the
    same product gives the sum of keys.
    """
    _, k, v = projected.chunk(3, dim=-1)
    features = _features(_split_heads(k, num_heads).relu(), factors)
    return features, F.pad(_split_heads(v, num_heads), (0, 1), value=1.0)


def _gate(mean: Tensor, weights: AttentionWeights) -> Tuple[Tensor, Tensor]:
    """Hidden layer ``(B, S)`` and gate ``(B, C)`` of the mean ``(B, C)``."""
    hidden = F.linear(mean, weights.squeeze_weight).relu_()
    return hidden, F.linear(hidden, weights.excite_weight).sigmoid_()


def _forward(
    x: Tensor,
    weights: AttentionWeights,
    settings: AttentionSettings,
    scale: Optional[Tensor],
    keep: bool,
):
    """Tokens ``(B, h, w, C)`` to the same, and what a backward pass needs."""
    batch, height, width, _ = x.shape
    heads, clamp = settings.num_heads, settings.clamp
    reduced_dims = weights.out_weight.shape[1]
    head_dims = reduced_dims // heads
    feature_dims = NUM_FACTORS[settings.locality] * head_dims
    # The features of a token, before and after they are multiplied.
    pieces = list(cut(batch, height, width, 2 * heads * feature_dims))

    out = torch.empty_like(x)
    # Queries, and keys and values too where a backward pass follows. Else
    # each strip's wait where its output will be.
    projected = (
        x.new_empty(batch, height, width, 3 * reduced_dims)
        if keep
        else out[..., :reduced_dims]
    )
    sums = x.new_zeros(batch, heads, feature_dims, head_dims + 1)
    token_sum = x.new_zeros(batch, x.shape[-1])
    for images, strips in pieces:
        for rows in strips:
            normed, _, _ = layer_norm(
                x[images, rows],
                weights.norm_weight,
                weights.norm_bias,
                settings.norm_eps,
            )
            token_sum[images] += normed.sum(dim=(1, 2))
            qkv = linear(normed, weights.qkv_weight, weights.qkv_bias)
            projected[images, rows] = qkv[..., : projected.shape[-1]]
            factors = _factors((height, width), rows, settings.locality, x)
            k, v = _keys_and_values(qkv, factors, heads)
            sums[images] += k.transpose(-2, -1) @ v
    clamped_sums = clamp_sums(sums, clamp)
    _, gate = _gate(token_sum / (height * width), weights)

    # What out_proj gives, for the masks of the clamps after it.
    kept = torch.empty_like(x) if keep else None
    for images, strips in pieces:
        for rows in strips:
            q = projected[images, rows, :, :reduced_dims]
            merged = torch.empty_like(q, memory_format=torch.contiguous_format)
            factors = _factors((height, width), rows, settings.locality, x)
            features = _features(_split_heads(q, heads).relu(), factors)
            products = features @ clamped_sums[images]  # (b, heads, p, d + 1)
            _merge_heads(divide(products, clamp, settings.eps), merged)
            branch = linear(merged, weights.out_weight, weights.out_bias)
            if keep:
                kept[images, rows] = branch
            if clamp:
                clamp_in_place(branch)
            branch = torch.addcmul(branch, branch, gate[images, None, None])
            if clamp:
                clamp_in_place(branch)
            if scale is not None:
                branch.mul_(scale[images])
            torch.add(x[images, rows], branch, out=out[images, rows])
    return out, (projected, kept, sums, token_sum)


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, settings, scale, *weights):
        weights = AttentionWeights(*weights)
        out, kept = _forward(x, weights, settings, scale, True)
        ctx.settings = settings
        ctx.save_for_backward(x, scale, *kept, *weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        check_differentiated_once()
        x, scale, projected, kept, sums, token_sum, *weights = (
            ctx.saved_tensors
        )
        weights, settings = AttentionWeights(*weights), ctx.settings
        batch, height, width, _ = x.shape
        heads, clamp = settings.num_heads, settings.clamp
        reduced_dims = weights.out_weight.shape[1]
        pieces = list(cut(batch, height, width, 2 * heads * sums.shape[2]))
        grad = grad.contiguous()
        clamped_sums = clamp_sums(sums, clamp)
        mean = token_sum / (height * width)
        hidden, gate = _gate(mean, weights)
        from_out = weights.out_weight.t().contiguous()  # (R, C)
        from_qkv = weights.qkv_weight.t().contiguous()  # (C, 3 * R)

        grads = GradSums()
        grad_sums = torch.zeros_like(sums)
        grad_gate = torch.zeros_like(gate)
        # The first R channels are filled in the first pass, from the queries.
        grad_projected = torch.empty_like(projected)
        for images, strips in pieces:
            for rows in strips:
                image_gate = gate[images, None, None]  # (b, 1, 1, C)
                branch_grad = grad[images, rows].clone()
                if scale is not None:
                    branch_grad.mul_(scale[images])
                raw = out = kept[images, rows]
                if clamp:
                    out = clamp_in_place(raw.clone())
                    mask_clamp_grad(
                        branch_grad, torch.addcmul(out, out, image_gate)
                    )
                grad_gate[images] += (branch_grad * out).sum(dim=(1, 2))
                branch_grad.addcmul_(branch_grad, image_gate)
                if clamp:
                    mask_clamp_grad(branch_grad, raw)

                factors = _factors((height, width), rows, settings.locality, x)
                q = _split_heads(
                    projected[images, rows, :, :reduced_dims], heads
                ).relu()
                features = _features(q, factors)
                # (b, m, w, C) -> (b, m, w, R) -> (b, heads, p, d)
                divided_grad = _split_heads(
                    linear(branch_grad, from_out), heads
                ).contiguous()
                # (b, heads, p, d + 1) and (b, heads, p, d)
                products_grad, divided = divide_backward(
                    divided_grad,
                    features @ clamped_sums[images],
                    clamp,
                    settings.eps,
                )
                if clamp:
                    clamp_in_place(divided)
                merged = raw.new_empty(*raw.shape[:3], reduced_dims)
                _merge_heads(divided, merged)
                grads.add('out_bias', sum_pixels(branch_grad))
                grads.add_product('out_weight', branch_grad, merged)

                grad_sums[images] += features.transpose(-2, -1) @ products_grad
                q_grad = _fold(
                    products_grad @ clamped_sums[images].transpose(-2, -1),
                    factors,
                )
                _merge_heads(
                    q_grad.mul_(q > 0),
                    grad_projected[images, rows, :, :reduced_dims],
                )

        if clamp:
            mask_clamp_grad(grad_sums[..., :-1], sums[..., :-1])
        # Through the gate to the mean of the normalised tokens.
        gate_grad = grad_gate * gate * (1 - gate)
        grads.add('excite_weight', gate_grad.t() @ hidden)
        hidden_grad = (gate_grad @ weights.excite_weight).mul_(hidden > 0)
        grads.add('squeeze_weight', hidden_grad.t() @ mean)
        mean_grad = hidden_grad @ weights.squeeze_weight / (height * width)

        grad_x = torch.empty_like(x)
        for images, strips in pieces:
            for rows in strips:
                qkv = projected[images, rows]
                factors = _factors((height, width), rows, settings.locality, x)
                features, v = _keys_and_values(qkv, factors, heads)
                k_grad = _fold(
                    v @ grad_sums[images].transpose(-2, -1), factors
                )
                k = _split_heads(qkv.chunk(3, dim=-1)[1], heads)
                v_grad = features @ grad_sums[images, :, :, :-1]
                qkv_grad = grad_projected[images, rows]
                _, k_out, v_out = qkv_grad.chunk(3, dim=-1)
                _merge_heads(k_grad.mul_(k > 0), k_out)
                _merge_heads(v_grad, v_out)

                tokens = x[images, rows]
                normed, token_mean, rstd = layer_norm(
                    tokens,
                    weights.norm_weight,
                    weights.norm_bias,
                    settings.norm_eps,
                )
                grads.add('qkv_bias', sum_pixels(qkv_grad))
                grads.add_product('qkv_weight', qkv_grad, normed)
                normed_grad = linear(qkv_grad, from_qkv)
                normed_grad.add_(mean_grad[images, None, None])
                parts = layer_norm_grads(
                    normed_grad,
                    tokens,
                    token_mean,
                    rstd,
                    weights.norm_weight,
                    weights.norm_bias,
                )
                torch.add(
                    grad[images, rows], parts[0], out=grad_x[images, rows]
                )
                grads.add('norm_weight', parts[1])
                grads.add('norm_bias', parts[2])
        return grad_x, None, None, *grads.of(AttentionWeights._fields)


def attention_branch(
    x: Tensor,
    spatial_shape: Tuple[int, int],
    weights: AttentionWeights,
    settings: AttentionSettings,
    scale: Optional[Tensor] = None,
) -> Tensor:
    """``x + scale * gated vicinity attention of LayerNorm(x)``.

    Args:
        x (Tensor): ``(B, N, C)`` on a CPU, tokens in row-major order.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.
        weights (AttentionWeights): What x is multiplied with.
        settings (AttentionSettings): What to compute.
        scale (Tensor, optional): ``(B, 1, 1)``, what stochastic depth leaves
            of the branch. Defaults to None, all of it.

    Returns:
        Tensor: ``(B, N, C)``. It can be differentiated once.
    """
    x, scale = to_images(x, spatial_shape, scale)
    if needs_custom_backward(x, *weights):
        out = _AttentionBranch.apply(x, settings, scale, *weights)
    else:
        out, _ = _forward(x, weights, settings, scale, False)
    return out.flatten(1, 2)  # (B, N, C)
