"""Operations of the strips in PyTorch.

:class:`TorchOps` and :class:`~.native_ops.NativeOps` have the same methods.
Linear layers are PyTorch operations in both and are in :mod:`.common`.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..angles import axis_factors, combine_factors, token_factors
from ..clamp import clamp_in_place, mask_clamp_grad
from ..linear import clamp_sums, divide, divide_backward
from .common import (
    GradSums,
    Window,
    Workspace,
    sum_dtype,
    to_channels,
    to_pixels,
)

aten = torch.ops.aten


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """Split the channels into heads, without a copy."""
    # (b, m, w, R) -> (b, p, heads, d) -> (b, heads, p, d), with p = m * w
    return t.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(t: Tensor, out: Tensor) -> None:
    """Write ``t``, ``(b, heads, p, d)``, to ``out``, ``(b, m, w, R)``."""
    split_heads(out, t.shape[1]).copy_(t)


def _depthwise(
    x: Tensor, padding: int, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """Depthwise convolution of ``x``, ``(b, m + 2 - 2 * padding, w, D)``."""
    return to_pixels(
        F.conv2d(
            to_channels(x),
            weight,
            bias,
            padding=(padding, 1),
            groups=x.shape[-1],
        )
    )


class TorchOps:
    """Operations on strips, with memory that the strips of a call share."""

    def __init__(self):
        self.workspace = Workspace()

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        sums: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Any]:
        """Apply a LayerNorm over the channels, with statistics in float32.

        Args:
            x (Tensor): Input of shape ``(b, m, w, C)``.
            weight (Tensor): Weight of shape ``(C, )``, see
                :func:`~.common.sum_dtype`.
            bias (Tensor): Bias of shape ``(C, )``, of the dtype of the weight.
            eps (float): Value added to the variance.
            dtype (torch.dtype): Dtype of the normalised tensor.
            sums (Tensor, optional): Sums ``(b, C)`` to which the normalised
                tokens are added. Defaults to None.

        Returns:
            tuple: Normalised tensor of the shape of ``x``, and statistics for
            :meth:`layer_norm_backward`.
        """
        x = x.to(torch.promote_types(x.dtype, dtype))
        out, mean, rstd = torch.native_layer_norm(
            x, x.shape[-1:], weight, bias, eps
        )
        out = out.to(dtype)
        if sums is not None:
            sums += out.sum(dim=(1, 2), dtype=sums.dtype)
        return out, (mean, rstd)

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
        """Compute the gradients of :meth:`layer_norm`.

        Args:
            x (Tensor): Input of the LayerNorm, ``(b, m, w, C)``.
            grad (Tensor): Gradient of its output, ``(b, m, w, C)``, modified
                in place.
            mean_grad (Tensor, optional): Added to the gradient of each token,
                of shape ``(b, C)``.
            residual_grad (Tensor): Gradient of the residual connection,
                added to that of ``x``, of the shape of ``x``.
            weight (Tensor): Weight of shape ``(C, )``.
            bias (Tensor): Bias of shape ``(C, )``.
            eps (float): Value added to the variance.
            statistics: Second result of :meth:`layer_norm`.
            out (Tensor): Memory for the gradient of ``x``.
            grads (GradSums): The gradients of the weight and the bias are
                added to 'norm_weight' and 'norm_bias'.
        """
        if mean_grad is not None:
            grad = grad.add_(mean_grad[:, None, None])
        x = x.to(torch.promote_types(x.dtype, grad.dtype))
        x_grad, weight_grad, bias_grad = aten.native_layer_norm_backward(
            grad.to(x.dtype),
            x,
            x.shape[-1:],
            *statistics,
            weight,
            bias,
            [True, True, True],
        )
        torch.add(residual_grad, x_grad, out=out)
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
        """Compute ``x + scale * clamp(clamp(branch) * (1 + gate))``.

        Args:
            x (Tensor): Tokens of shape ``(b, m, w, C)``.
            branch (Tensor): Output of the branch, of the same shape.
            gate (Tensor, optional): Gate of shape ``(b, C)``. If None, there
                is none.
            clamp (bool): Whether to apply the clamps.
            scale (Tensor, optional): Per-sample drop-path scale of shape
                ``(b, 1, 1, 1)``.
            out (Tensor): Memory for the result. It may be that of ``x``.
        """
        if clamp:
            copy = self.workspace.take('branch', branch, *branch.shape)
            branch = clamp_in_place(copy.copy_(branch))
        if gate is not None:
            gate = gate[:, None, None].to(branch.dtype)
            branch = torch.addcmul(branch, branch, gate)
        if clamp:
            branch = clamp_in_place(branch)
        if scale is not None:
            branch = branch * scale
        torch.add(x, branch, out=out)

    def residual_backward(
        self,
        grad: Tensor,
        branch: Tensor,
        gate: Tensor,
        clamp: bool,
        scale: Optional[Tensor],
        gate_grad: Tensor,
    ) -> Tuple[Tensor, Tensor]:
        """Compute the gradients of :meth:`residual`.

        Args:
            grad (Tensor): Gradient of its output, ``(b, m, w, C)``.
            branch (Tensor): Output of the branch, of the same shape.
            gate (Tensor): Gate of shape ``(b, C)``.
            clamp (bool): Whether the clamps were applied.
            scale (Tensor, optional): Scale of shape ``(b, 1, 1, 1)``.
            gate_grad (Tensor): Sums ``(b, C)`` to which the gradient of the
                gate is added.

        Returns:
            tuple[Tensor, Tensor]: Gradient of the branch, in its dtype, and
            the sum of this gradient over the tokens, ``(C, )``.
        """
        image_gate = gate[:, None, None].to(branch.dtype)  # (b, 1, 1, C)
        branch_grad = grad.to(branch.dtype, copy=True)
        if scale is not None:
            branch_grad.mul_(scale)
        out = branch
        if clamp:
            out = clamp_in_place(branch.clone())
            mask_clamp_grad(branch_grad, torch.addcmul(out, out, image_gate))
        gate_grad += (branch_grad * out).sum(dim=(1, 2), dtype=gate.dtype)
        branch_grad.addcmul_(branch_grad, image_gate)
        if clamp:
            mask_clamp_grad(branch_grad, branch)
        return branch_grad, self.sum_pixels(branch_grad)

    def _joined(self, window: Window) -> Tuple[Tensor, int]:
        """Join the rows of a window.

        Args:
            window (Window): Rows that a 3x3 convolution reads.

        Returns:
            tuple[Tensor, int]: Rows of shape ``(b, m + 2 - 2 * padding, w,
            C)``, and the vertical padding of the convolution. If the strip is
            the whole image, these are the strip and 1; otherwise the padding
            is 0.
        """
        above, strip, top, bottom = window
        if top and bottom:
            return strip, 1
        images, rows, width, channels = window.shape
        joined = self.workspace.take(
            'window', strip, images, rows + 2, width, channels
        )
        first = 1
        if above is None:
            joined[:, 0] = 0
        else:
            first = above.shape[1]
            joined[:, :first] = above
        joined[:, first : first + strip.shape[1]] = strip
        if bottom:
            joined[:, -1] = 0
        return joined, 0

    def sum_pixels(self, x: Tensor) -> Tensor:
        """Sum over images, rows and columns.

        Args:
            x (Tensor): Tokens of shape ``(b, m, w, C)``.

        Returns:
            Tensor: Sums of shape ``(C, )``, in float32 or higher precision.
        """
        # (b, m, w, C) -> (b * m * w, C) -> (C, )
        return x.flatten(0, 2).sum(dim=0, dtype=sum_dtype(x.dtype))

    def gate(
        self, mean: Tensor, squeeze: Tensor, excite: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Compute the channel gate from the mean of the normalised tokens.

        Args:
            mean (Tensor): Mean of shape ``(B, C)``.
            squeeze (Tensor): Weight of the first layer, ``(S, C)``.
            excite (Tensor): Weight of the second layer, ``(C, S)``.

        Returns:
            tuple[Tensor, Tensor]: Hidden activations of shape ``(B, S)`` and
            gate of shape ``(B, C)``.
        """
        hidden = F.linear(mean, squeeze).relu_()
        return hidden, F.linear(hidden, excite).sigmoid_()

    def depthwise(
        self, window: Window, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        """Apply the depthwise 3x3 convolution to a window of rows.

        Args:
            window (Window): Rows of D channels.
            weight (Tensor): Weight of shape ``(D, 1, 3, 3)``.
            bias (Tensor, optional): Bias of shape ``(D, )``.

        Returns:
            Tensor: Output of shape ``(b, m, w, D)``.
        """
        return _depthwise(*self._joined(window), weight, bias)

    def depthwise_gelu(
        self, window: Window, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Apply :meth:`depthwise` and the exact GELU."""
        return aten.gelu_(self.depthwise(window, weight, bias))

    def depthwise_gelu_backward(
        self, window: Window, weight: Tensor, bias: Tensor, grad: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of :meth:`depthwise_gelu`.

        Args:
            window (Window): See :meth:`depthwise`.
            weight (Tensor): See :meth:`depthwise`.
            bias (Tensor): See :meth:`depthwise`.
            grad (Tensor): Gradient of the output, ``(b, m, w, D)``.

        Returns:
            tuple[Tensor, ...]: The output, the gradient of the input of the
            GELU, both of shape ``(b, m, w, D)``, and the gradients of the
            weight and of the bias.
        """
        x, padding = self._joined(window)
        mixed = _depthwise(x, padding, weight, bias)
        mixed_grad = aten.gelu_backward(grad, mixed)
        channels = x.shape[-1]
        _, weight_grad, bias_grad = aten.convolution_backward(
            to_channels(mixed_grad),
            to_channels(x),
            weight,
            [channels],
            [1, 1],
            [padding, 1],
            [1, 1],
            False,
            [0, 0],
            channels,
            [False, True, True],
        )
        return aten.gelu_(mixed), mixed_grad, weight_grad, bias_grad

    def factors(
        self,
        rows: slice,
        spatial_shape: Tuple[int, int],
        locality: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """Return the vicinity factors of the tokens of a strip.

        Args:
            rows (slice): The m rows of the strip.
            spatial_shape (tuple[int, int]): Grid ``(h, w)``.
            locality (str): 'sum', 'product', '1d' or 'none'.
            dtype (torch.dtype): Dtype of the factors.
            device (torch.device): Device of the factors.

        Returns:
            Any: What the other methods take as ``factors``. Here, these are
            factors of shape ``(m * w, n)``, or None for 'none'.
        """
        if locality == 'none':
            return None
        if locality == '1d':
            factors = token_factors(spatial_shape, locality, dtype, device)
            width = spatial_shape[1]
            return factors[rows.start * width : rows.stop * width]
        # Only the factors of these rows are computed, because a table of the
        # whole grid would not fit into the CPU caches.
        of_rows, of_cols = axis_factors(spatial_shape, dtype, device)
        return combine_factors(of_rows[:, rows], of_cols, locality)

    def _features(self, t: Tensor, factors: Optional[Tensor]) -> Tensor:
        """Multiply tokens by their factors.

        Args:
            t (Tensor): Queries or keys of shape ``(b, heads, p, d)``.
            factors (Tensor, optional): Factors of shape ``(p, n)``.

        Returns:
            Tensor: Contiguous features of shape ``(b, heads, p, n * d)``.
        """
        if factors is None:
            return t.contiguous()
        # (b, heads, p, 1, d) * (p, n, 1) -> (b, heads, p, n, d)
        out = self.workspace.take(
            'features', t, *t.shape[:3], factors.shape[1], t.shape[3]
        )
        torch.mul(t.unsqueeze(-2), factors[:, :, None], out=out)
        return out.flatten(-2)  # (b, heads, p, n * d)

    def _fold(self, grad: Tensor, factors: Optional[Tensor]) -> Tensor:
        """Compute the gradient of ``t`` in :meth:`_features`.

        Args:
            grad (Tensor): Gradient of the features, ``(b, heads, p, n * d)``,
                modified in place.
            factors (Tensor, optional): Factors of shape ``(p, n)``.

        Returns:
            Tensor: Gradient of shape ``(b, heads, p, d)``.
        """
        if factors is None:
            return grad
        # (b, heads, p, n * d) -> (b, heads, p, n, d) -> (b, heads, p, d)
        grad = grad.unflatten(-1, (factors.shape[1], -1))
        return grad.mul_(factors[:, :, None]).sum(dim=-2)

    def _keys_and_values(
        self, qkv: Tensor, factors: Optional[Tensor], num_heads: int
    ) -> Tuple[Tensor, Tensor]:
        """Compute the features of the keys and the extended values.

        The arguments are those of :meth:`sum_products`.

        Returns:
            tuple[Tensor, Tensor]: Features of the keys, of shape
            ``(b, heads, p, n * d)``, and the values, of shape
            ``(b, heads, p, d + 1)``. The last column of the values is 1, so
            that the key-value product also contains the sum of keys.
        """
        # (b, m, w, 3 * R) -> three tensors of shape (b, m, w, R)
        _, k, v = (
            split_heads(t, num_heads).to(sum_dtype(t.dtype))
            for t in qkv.chunk(3, dim=-1)
        )
        return self._features(k.relu(), factors), F.pad(v, (0, 1), value=1.0)

    def sum_products(
        self,
        qkv: Tensor,
        factors: Any,
        num_heads: int,
        sums: Tensor,
    ) -> None:
        """Add the products of the keys' features and the values to the sums.

        Args:
            qkv (Tensor): Projections of shape ``(b, m, w, 3 * R)``.
            factors: Result of :meth:`factors` for this strip.
            num_heads (int): Number of heads.
            sums (Tensor): Sums ``(b, heads, n * d, d + 1)``, whose last
                column contains the sums of the keys' features.
        """
        k, v = self._keys_and_values(qkv, factors, num_heads)
        # (b, heads, n * d, p) @ (b, heads, p, d + 1)
        # -> (b, heads, n * d, d + 1)
        sums += k.transpose(-2, -1) @ v

    def sum_products_backward(
        self,
        qkv: Tensor,
        factors: Any,
        num_heads: int,
        sums_grad: Tensor,
        out: Tensor,
    ) -> None:
        """Compute the gradients of the keys and values of the sums.

        Args:
            qkv (Tensor): See :meth:`sum_products`.
            factors (Tensor, optional): See :meth:`sum_products`.
            num_heads (int): Number of heads.
            sums_grad (Tensor): Gradient of the sums, of their shape.
            out (Tensor): Memory of the shape of ``qkv``, of which the last
                two thirds are written.
        """
        features, v = self._keys_and_values(qkv, factors, num_heads)
        k_grad = self._fold(v @ sums_grad.transpose(-2, -1), factors)
        k = split_heads(qkv.chunk(3, dim=-1)[1], num_heads)
        v_grad = features @ sums_grad[..., :-1]
        _, k_out, v_out = out.chunk(3, dim=-1)
        merge_heads(k_grad.mul_(k > 0), k_out)
        merge_heads(v_grad, v_out)

    def attend(
        self,
        q: Tensor,
        factors: Any,
        sums: Tensor,
        clamp: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Multiply the queries' features by the sums, and divide.

        Args:
            q (Tensor): Queries of shape ``(b, m, w, R)``.
            factors: Result of :meth:`factors` for this strip.
            sums (Tensor): Key-value sums ``(b, heads, n * d, d + 1)`` before
                the clamp.
            clamp (bool): Whether to apply the clamps.
            eps (float): Value added to the sum of weights.
            dtype (torch.dtype): Dtype of the output.

        Returns:
            Tensor: Output ``(b, m, w, R)``; the next call overwrites it.
        """
        merged = self.workspace.take('merged', q, *q.shape, dtype=dtype)
        queries = split_heads(q, sums.shape[1]).to(sums.dtype)
        # (b, heads, p, n * d) @ (b, heads, n * d, d + 1)
        # -> (b, heads, p, d + 1)
        clamped = clamp_sums(sums, clamp)
        products = self._features(queries.relu(), factors) @ clamped
        merge_heads(divide(products, clamp, eps), merged)
        return merged

    def attend_backward(
        self,
        q: Tensor,
        factors: Any,
        sums: Tensor,
        clamp: bool,
        eps: float,
        grad: Tensor,
        q_grad: Tensor,
        sums_grad: Tensor,
    ) -> Tensor:
        """Compute the gradients of :meth:`attend`, and its output again.

        Args:
            q (Tensor): See :meth:`attend`.
            factors (Tensor, optional): See :meth:`attend`.
            sums (Tensor): See :meth:`attend`.
            clamp (bool): See :meth:`attend`.
            eps (float): See :meth:`attend`.
            grad (Tensor): Gradient of the output, ``(b, m, w, R)``.
            q_grad (Tensor): Memory for the gradient of the queries.
            sums_grad (Tensor): Tensor to which the gradient of the clamped
                sums is added.

        Returns:
            Tensor: Output of :meth:`attend`; the next call overwrites it.
        """
        num_heads = sums.shape[1]
        queries = split_heads(q, num_heads).to(sums.dtype).relu()
        features = self._features(queries, factors)
        sums = clamp_sums(sums, clamp)
        # (b, heads, p, d + 1) and (b, heads, p, d)
        products_grad, divided = divide_backward(
            # A copy, because divide_backward modifies it in place.
            split_heads(grad, num_heads)
            .to(sums.dtype)
            .clone(memory_format=torch.contiguous_format),
            features @ sums,
            clamp,
            eps,
        )
        if clamp:
            clamp_in_place(divided)
        merged = self.workspace.take('merged', q, *q.shape)
        merge_heads(divided, merged)
        # (b, heads, n * d, p) @ (b, heads, p, d + 1)
        # -> (b, heads, n * d, d + 1)
        sums_grad += features.transpose(-2, -1) @ products_grad
        folded = self._fold(products_grad @ sums.transpose(-2, -1), factors)
        merge_heads(folded.mul_(queries > 0), q_grad)
        return merged
