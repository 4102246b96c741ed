"""VVT on images instead of tokens, the form in which it is exported.

Inference engines run a network fastest if they never transpose its widest
activations. In :class:`~mmvvt.models.VVT` these are the hidden activations of
the MLPs, which the linear layers read as tokens ``(B, N, C)`` and the
depthwise convolutions as images ``(B, C, h, w)``. Here every activation is an
image: linear layers are 1x1 convolutions, and the attention multiplies
channel-first matrices. The weights are those of the VVT, and the results are
equal up to rounding errors. docs/deploy.md has the measurements.
"""

import math
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmvvt.errors import UserError
from mmvvt.ops.angles import token_factors
from mmvvt.ops.clamp import CLAMP_MAX, CLAMP_MIN
from mmvvt.ops.unflatten import unflatten

from .stock import StockLayer, find_difference, is_unmodified
from .strips import LAYERS
from .vvt import VVT, PatchEmbed, VVTBlock

NORMS = ('tokens', 'channels')
PATCH_EMBED = dict(proj=StockLayer(nn.Conv2d), norm=StockLayer(nn.LayerNorm))


def _convolution(
    weight: Tensor, bias: Optional[Tensor], padding: int = 0, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution with weights that are not copied.

    Args:
        weight (Tensor): Weight of shape ``(C_out, C_in / groups, k, k)``.
        bias (Tensor, optional): Bias of shape ``(C_out, )``.
        padding (int): Padding. Defaults to 0.
        groups (int): Number of groups. Defaults to 1.

    Returns:
        nn.Conv2d: The convolution.
    """
    convolution = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2],
        padding=padding,
        groups=groups,
        device='meta',
    )
    convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
    convolution.bias = (
        None
        if bias is None
        else nn.Parameter(bias.detach(), requires_grad=False)
    )
    return convolution


def _pointwise(layer: nn.Linear) -> nn.Conv2d:
    """Return a 1x1 convolution that shares the weights of a linear layer."""
    # (C_out, C_in) -> (C_out, C_in, 1, 1)
    return _convolution(layer.weight[:, :, None, None], layer.bias)


def _magnitude_clamp(t: Tensor) -> Tensor:
    """Apply :func:`mmvvt.ops.magnitude_clamp` in operations that are fused.

    The engines have no fast kernel for the sign. The factor is the sign of
    all normal floating-point numbers.
    """
    sign = (t * (1 / torch.finfo(t.dtype).tiny)).clamp(-1, 1)
    return sign * t.abs().clamp(CLAMP_MIN, CLAMP_MAX)


def _features(t: Tensor, factors: Optional[Tensor]) -> Tensor:
    """Multiply ``(B, heads, d, N)`` by factors ``(m, 1, N)``."""
    if factors is None:
        return t
    # (B, heads, 1, d, N) * (m, 1, N) -> (B, heads, m, d, N)
    # -> (B, heads, m * d, N)
    return (t[:, :, None] * factors).flatten(2, 3)


def _to_layout(x: Tensor, norm: str) -> Tensor:
    """Permute an image to the layout in which ``norm`` is computed."""
    # (B, C, h, w) -> (B, h, w, C)
    return x.permute(0, 2, 3, 1) if norm == 'tokens' else x


def _to_image(x: Tensor, norm: str) -> Tensor:
    """Permute an image from the layout of ``norm``, see :func:`_to_layout`."""
    # (B, h, w, C) -> (B, C, h, w)
    return x.permute(0, 3, 1, 2) if norm == 'tokens' else x


class _TokenNorm(nn.Module):
    """A LayerNorm that is called on the permuted image."""

    def __init__(self, layer: nn.LayerNorm):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        return _to_image(self.layer(_to_layout(x, 'tokens')), 'tokens')


class _OtherNorm(nn.Module):
    """A norm layer of another form; it is called as usual."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        # (B, C, h, w) -> (B, C, N) -> (B, N, C)
        tokens = self.layer(x.flatten(2).transpose(1, 2))
        # (B, N, C) -> (B, C, N) -> (B, C, h, w)
        return unflatten(tokens.transpose(1, 2), 2, x.shape[2:])


class _ChannelNorm(nn.Module):
    """A LayerNorm whose averages are 1x1 convolutions with one output."""

    def __init__(self, layer: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        channels = x.shape[1]
        # Statistics in float32, as LayerNorm computes them.
        t = x.float() if x.dtype == torch.float16 else x
        average = t.new_full((1, channels, 1, 1), 1 / channels)
        t = t - F.conv2d(t, average)
        t = t * (F.conv2d(t * t, average) + self.eps).rsqrt()
        # (C,) -> (C, 1, 1)
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return t.to(x.dtype) * weight + bias


def _image_norm(layer: Any, norm: str) -> nn.Module:
    """Return a norm layer over the channels of ``(B, C, h, w)``.

    Args:
        layer (nn.Module): Norm layer of tokens ``(B, N, C)``.
        norm (str): One of :data:`NORMS`.

    Returns:
        nn.Module: The form ``norm`` of an unmodified LayerNorm. Other layers
        are called.
    """
    if not is_unmodified(layer, nn.LayerNorm):
        return _OtherNorm(layer)
    if norm == 'channels' and layer.bias is not None:
        return _ChannelNorm(layer)
    return _TokenNorm(layer)


def _mlp_parts(mlp: Any, max_dims: int) -> nn.ModuleList:
    """Split an MLP into parts, the outputs of which are added.

    Hidden channels are independent of each other. An engine stores the hidden
    activations of the whole image, those of a part in less memory. ONNX
    Runtime reuses memory for activations of the same shape, so it needs the
    least if the parts have as many channels as the other activations.

    Args:
        mlp (ConvMLP): MLP.
        max_dims (int): Maximum number of hidden channels of a part.

    Returns:
        nn.ModuleList: As few parts as possible, of about the same size.
    """
    dwconv = mlp.dwconv.dwconv
    hidden_dims = mlp.fc1.weight.shape[0]
    size = math.ceil(hidden_dims / math.ceil(hidden_dims / max_dims))
    parts = nn.ModuleList()
    for first in range(0, hidden_dims, size):
        part = slice(first, first + size)
        weight = dwconv.weight[part]
        parts.append(
            nn.Sequential(
                _convolution(
                    mlp.fc1.weight[part, :, None, None], mlp.fc1.bias[part]
                ),
                _convolution(weight, dwconv.bias[part], 1, len(weight)),
                mlp.act,
                _convolution(
                    mlp.fc2.weight[:, part, None, None],
                    mlp.fc2.bias if first == 0 else None,
                ),
            )
        )
    return parts


class _ImageBlock(nn.Module):
    """A :class:`VVTBlock` with its stock layers, on images.

    The residual connections are in the layout of the norms, which permutes the
    output of a convolution, but nothing that is added to it. The permutations
    between two blocks cancel each other.
    """

    def __init__(self, block: Any, norm: str, part_dims: int):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.norm = norm
        self.num_heads = attn.num_heads
        self.locality = attn.locality
        self.clamp = attn.clamp
        self.eps = attn.eps
        self.norm1 = self._block_norm(block.norm1)
        self.q_proj = _pointwise(attn.q_proj)
        self.k_proj = _pointwise(attn.k_proj)
        self.v_proj = _pointwise(attn.v_proj)
        self.out_proj = _pointwise(attn.out_proj)
        self.se_fc = nn.Sequential(
            _pointwise(attn.se_fc[0]),
            nn.ReLU(),
            _pointwise(attn.se_fc[2]),
            nn.Sigmoid(),
        )
        self.norm2 = self._block_norm(block.norm2)
        self.mlp = _mlp_parts(mlp, part_dims)

    def _block_norm(self, layer: nn.LayerNorm) -> nn.Module:
        return layer if self.norm == 'tokens' else _ChannelNorm(layer)

    def _split(self, t: Tensor) -> Tensor:
        batch, channels, height, width = t.shape
        heads = self.num_heads
        # (B, heads * d, h, w) -> (B, heads, d, N)
        return t.reshape(batch, heads, channels // heads, height * width)

    def _factors(
        self, height: int, width: int, like: Tensor
    ) -> Sequence[Optional[Tensor]]:
        """Return the factors of the tokens, in one or two groups."""
        if self.locality == 'none':
            return (None,)
        factors = token_factors(
            (height, width), self.locality, like.dtype, like.device
        )
        # In OpenVINO, the features of half of the factors need half the
        # memory. ONNX Runtime needs as little for those of all factors.
        groups = 1 if self.norm == 'tokens' else 2
        # (N, n) -> (n, N) -> (n, 1, N)
        return factors.t()[:, None].chunk(groups)

    def _clamp_sums(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """Clamp the sums ``(B, heads, d + 1, m * d)`` of each group.

        The sums of keys, in the last row, are not clamped. The groups are one
        tensor, so that the sums of all groups are computed first.
        """
        t = torch.cat(list(sums), dim=3)  # (B, heads, d + 1, n * d)
        if self.clamp:
            clamped = _magnitude_clamp(t[:, :, :-1])
            t = torch.cat([clamped, t[:, :, -1:]], dim=2)
        return t.chunk(len(sums), dim=3)

    def _attend(self, x: Tensor) -> Tensor:
        clamp = _magnitude_clamp if self.clamp else nn.Identity()
        x = _to_image(x, self.norm)
        # (B, C, h, w) -> (B, C, 1, 1)
        gate = self.se_fc(x.mean(dim=(2, 3), keepdim=True))
        q, k, v = self.q_proj(x).relu(), self.k_proj(x).relu(), self.v_proj(x)
        # Sums are accumulated in float32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        batch, channels, height, width = q.shape
        q, k, v = self._split(q), self._split(k), self._split(v)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # (B, heads, d + 1, N)
        factors = self._factors(height, width, q)
        # Before the features of the keys: ONNX Runtime reuses more memory.
        queries = [_features(q, group) for group in factors]
        # (d + 1, N) @ (N, m * d) -> (d + 1, m * d) in each head
        sums = [v @ _features(k, group).transpose(2, 3) for group in factors]
        products: Any = None
        for group, query in zip(self._clamp_sums(sums), queries):
            product = group @ query  # (B, heads, d + 1, N)
            products = product if products is None else products + product
        normaliser = (products[:, :, -1:] + self.eps).reciprocal()
        if self.clamp:  # It is positive.
            normaliser = normaliser.clamp(CLAMP_MIN, CLAMP_MAX)
        out = clamp(clamp(products[:, :, :-1]) * normaliser)
        # (B, heads, d, N) -> (B, heads * d, h, w)
        out = out.reshape(batch, channels, height, width).to(x.dtype)
        out = _to_layout(self.out_proj(out), self.norm)
        out = clamp(out) * (1 + _to_layout(gate, self.norm))
        # The gate is positive: no magnitude becomes less than CLAMP_MIN.
        return out.clamp(-CLAMP_MAX, CLAMP_MAX) if self.clamp else out

    def _mix(self, x: Tensor) -> Tensor:
        x = _to_image(x, self.norm)
        # The engines add an output of a convolution to that of the next one,
        # but not to activations in another memory layout, as those of the
        # residual connection. Before such a sum, OpenVINO computes the hidden
        # activations of all its parts, so there it has two parts only.
        size = len(self.mlp) if self.norm == 'tokens' else 2
        out: Any = None
        for first in range(0, len(self.mlp), size):
            part_sum = self.mlp[first](x)
            for part in self.mlp[first + 1 : first + size]:
                part_sum = part_sum + part(x)
            out = part_sum if out is None else out + part_sum
        return _to_layout(out, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        x = _to_layout(x, self.norm)
        x = x + self._attend(self.norm1(x))
        x = x + self._mix(self.norm2(x))
        return _to_image(x, self.norm)


class _TokenBlock(nn.Module):
    """A block with layers of another form; they are called as usual."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        spatial_shape = (x.shape[2], x.shape[3])
        # (B, C, h, w) -> (B, C, N) -> (B, N, C)
        tokens = self.block(x.flatten(2).transpose(1, 2), spatial_shape)
        # (B, N, C) -> (B, C, N) -> (B, C, h, w)
        return unflatten(tokens.transpose(1, 2), 2, spatial_shape)


class _TokenEmbed(nn.Module):
    """A patch embedding of another form; it is called as usual."""

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.patch_embed = patch_embed

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, h, w)``."""
        tokens, spatial_shape = self.patch_embed(x)
        # (B, N, C) -> (B, C, N) -> (B, C, h, w)
        return unflatten(tokens.transpose(1, 2), 2, spatial_shape)


class ImageForm(nn.Module):
    """A VVT in evaluation mode, computed on images.

    Ablation variants, and blocks whose layers have been replaced, modified or
    hooked, call their layers, see :mod:`mmvvt.models.stock`.

    Args:
        vvt (VVT): The backbone. Its layers are shared, not copied.
        norm (str): How LayerNorm is computed: 'tokens' transposes the image
            and calls the layer, which is fastest in ONNX Runtime; 'channels'
            averages the channels with convolutions, which is fastest in
            OpenVINO. Defaults to 'tokens'.

    Raises:
        UserError: If ``norm`` is unknown.
    """

    def __init__(self, vvt: VVT, norm: str = 'tokens'):
        super().__init__()
        if norm not in NORMS:
            raise UserError(f'norm must be one of {NORMS}, got {norm!r}')
        self.vvt = vvt
        self.out_indices = vvt.out_indices
        self.stages = nn.ModuleList()
        self.norms = nn.ModuleList()
        for index in range(vvt.out_indices[-1] + 1):
            patch_embed, blocks, stage_norm = vvt._stage(index)
            x = next(vvt.parameters()).new_empty(1, 1, vvt.embed_dims[index])
            # Each stage has a quarter of the tokens of the previous one. The
            # activations of the first stage are the largest, so those of a
            # part have no more elements.
            part_dims = vvt.embed_dims[0] * 4**index
            self.stages.append(
                nn.Sequential(
                    self._embed_form(patch_embed, norm, x),
                    *(
                        self._block_form(block, norm, x, part_dims)
                        for block in blocks
                    ),
                )
            )
            self.norms.append(_image_norm(stage_norm, norm))
        self.eval()

    @staticmethod
    def _embed_form(patch_embed: Any, norm: str, x: Tensor) -> nn.Module:
        if (
            is_unmodified(patch_embed, PatchEmbed)
            and patch_embed.overlap  # otherwise, it pads the image
            and patch_embed.pos_embed is None
            and find_difference(patch_embed, PATCH_EMBED, x) is None
        ):
            return nn.Sequential(
                patch_embed.proj, _image_norm(patch_embed.norm, norm)
            )
        return _TokenEmbed(patch_embed)

    @staticmethod
    def _block_form(
        block: nn.Module, norm: str, x: Tensor, part_dims: int
    ) -> nn.Module:
        if (
            is_unmodified(block, VVTBlock)
            and find_difference(block, LAYERS, x) is None
        ):
            return _ImageBlock(block, norm, part_dims)
        return _TokenBlock(block)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the outputs of :meth:`VVT.forward`."""
        outs = []
        for index, (stage, norm) in enumerate(zip(self.stages, self.norms)):
            x = norm(stage(x))
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)
