"""VVT on images instead of tokens, the form in which it is exported.

Inference engines run a network fastest if they never transpose its widest
activations. In :class:`~mmvvt.models.VVT` these are the hidden activations of
the MLPs, which the linear layers read as tokens ``(B, N, C)`` and the
depthwise convolutions as images ``(B, C, h, w)``. Here every activation is an
image: linear layers are 1x1 convolutions, and the attention multiplies
channel-first matrices. The weights are those of the VVT, and the results are
equal up to rounding errors. docs/deploy.md has the measurements.
"""

from typing import Any, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmvvt.errors import UserError
from mmvvt.ops.angles import token_factors
from mmvvt.ops.clamp import CLAMP_MAX, CLAMP_MIN
from mmvvt.ops.unflatten import unflatten

from .stock import StockLayer, find_difference
from .strips import LAYERS
from .vvt import VVT, OverlapPatchEmbed, VVTBlock

NORMS = ('tokens', 'channels')
PATCH_EMBED = dict(proj=StockLayer(nn.Conv2d), norm=StockLayer(nn.LayerNorm))


def _linear(x: Tensor, layer: Any) -> Tensor:
    """Apply a linear layer to each pixel of ``(B, C, h, w)``."""
    # (C_out, C_in) -> (C_out, C_in, 1, 1)
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _magnitude_clamp(t: Tensor) -> Tensor:
    """Apply :func:`mmvvt.ops.magnitude_clamp` in operations that are fused.

    The engines have no fast kernel for the sign. The factor is the sign of
    all normal floating-point numbers.
    """
    sign = (t * (1 / torch.finfo(t.dtype).tiny)).clamp(-1, 1)
    return sign * t.abs().clamp(CLAMP_MIN, CLAMP_MAX)


def _layer_norm(x: Tensor, norm: Any, form: str) -> Tensor:
    """Apply a LayerNorm over the channels of ``(B, C, h, w)``.

    With the form 'channels', the averages are 1x1 convolutions with one
    output channel, so that the image does not have to be transposed.
    """
    if form == 'tokens' or type(norm) is not nn.LayerNorm or norm.bias is None:
        # (B, C, h, w) -> (B, h, w, C) -> (B, C, h, w)
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    channels = x.shape[1]
    # Statistics in float32, as LayerNorm computes them.
    t = x.float() if x.dtype == torch.float16 else x
    average = t.new_full((1, channels, 1, 1), 1 / channels)
    t = t - F.conv2d(t, average)
    t = t * (F.conv2d(t * t, average) + norm.eps).rsqrt()
    # (C,) -> (C, 1, 1)
    return (
        t.to(x.dtype) * norm.weight[:, None, None] + norm.bias[:, None, None]
    )


class _ImageBlock(nn.Module):
    """A :class:`VVTBlock` with its stock layers, on images."""

    def __init__(self, block: VVTBlock, norm: str):
        super().__init__()
        self.block = block
        self.norm = norm

    def _features(self, t: Tensor, factors: Tensor, heads: int) -> Tensor:
        # (B, heads * d, h, w) -> (B, heads, 1, d, N)
        t = t.reshape(t.shape[0], heads, 1, t.shape[1] // heads, -1)
        # * (n, 1, N) -> (B, heads, n, d, N) -> (B, heads, n * d, N)
        return (t * factors).flatten(2, 3)

    def _attend(self, x: Tensor) -> Tensor:
        attn: Any = self.block.attn
        clamp = _magnitude_clamp if attn.clamp else nn.Identity()
        # (B, C, h, w) -> (B, C, 1, 1)
        gate = x.mean(dim=(2, 3), keepdim=True)
        gate = _linear(gate, attn.se_fc[0]).relu()
        gate = _linear(gate, attn.se_fc[2]).sigmoid()

        q, k, v = (
            _linear(x, layer)
            for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        # Sums are accumulated in float32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = q.relu().to(dtype), k.relu().to(dtype), v.to(dtype)
        batch, channels, height, width = q.shape
        heads = attn.num_heads
        factors = q.new_ones(1, 1, 1)
        if attn.locality != 'none':
            factors = token_factors(
                (height, width), attn.locality, dtype, q.device
            )
            factors = factors.t()[:, None]  # (N, n) -> (n, 1, N)
        k = self._features(k, factors, heads)  # (B, heads, n * d, N)
        q = self._features(q, factors, heads)  # (B, heads, n * d, N)
        # (B, heads * d, h, w) -> (B, heads, d, N) -> (B, heads, d + 1, N)
        v = v.reshape(batch, heads, channels // heads, -1)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)

        sums = v @ k.transpose(-2, -1)  # (B, heads, d + 1, n * d)
        # The sums of keys, in the last row, are not clamped.
        sums = torch.cat([clamp(sums[:, :, :-1]), sums[:, :, -1:]], dim=2)
        products = sums @ q  # (B, heads, d + 1, N)
        normaliser = (products[:, :, -1:] + attn.eps).reciprocal()
        if attn.clamp:  # It is positive.
            normaliser = normaliser.clamp(CLAMP_MIN, CLAMP_MAX)
        out = clamp(clamp(products[:, :, :-1]) * normaliser)
        # (B, heads, d, N) -> (B, heads * d, h, w)
        out = out.reshape(batch, channels, height, width).to(x.dtype)
        out = clamp(_linear(out, attn.out_proj))
        return clamp(out + out * gate)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, h, w)``."""
        block: Any = self.block
        x = x + self._attend(_layer_norm(x, block.norm1, self.norm))
        mlp = block.mlp
        t = _linear(_layer_norm(x, block.norm2, self.norm), mlp.fc1)
        return x + _linear(mlp.act(mlp.dwconv.dwconv(t)), mlp.fc2)


class _TokenBlock(nn.Module):
    """A block whose layers have been modified; they are called as usual."""

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


class ImageForm(nn.Module):
    """A VVT in evaluation mode, computed on images.

    Blocks whose layers have been replaced, modified or hooked call their
    layers, see :mod:`mmvvt.models.stock`.

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
        self.norm = norm
        self.blocks = nn.ModuleList()
        self.stock_embed: List[bool] = []
        for index in range(vvt.out_indices[-1] + 1):
            patch_embed, blocks, stage_norm = vvt._stage(index)
            x = next(stage_norm.parameters()).new_empty(
                1, 1, vvt.embed_dims[index]
            )
            self.blocks.append(
                nn.Sequential(
                    *(
                        _ImageBlock(block, norm)
                        if type(block) is VVTBlock
                        and 'forward' not in vars(block)
                        and find_difference(block, LAYERS, x) is None
                        else _TokenBlock(block)
                        for block in blocks
                    )
                )
            )
            self.stock_embed.append(
                type(patch_embed) is OverlapPatchEmbed
                and find_difference(patch_embed, PATCH_EMBED, x) is None
            )
        self.eval()

    def _embed(self, x: Tensor, index: int) -> Tensor:
        """Map ``(B, C_in, H, W)`` to normalised patches ``(B, C, h, w)``."""
        patch_embed, _, _ = self.vvt._stage(index)
        if self.stock_embed[index]:
            return _layer_norm(
                patch_embed.proj(x), patch_embed.norm, self.norm
            )
        tokens, (height, width) = patch_embed(x)
        # (B, N, C) -> (B, C, N) -> (B, C, h, w)
        return unflatten(tokens.transpose(1, 2), 2, (height, width))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the outputs of :meth:`VVT.forward`."""
        outs = []
        for index, blocks in enumerate(self.blocks):
            _, _, norm = self.vvt._stage(index)
            x = blocks(self._embed(x, index))  # (B, C, h, w)
            x = _layer_norm(x, norm, self.norm)
            if index in self.vvt.out_indices:
                outs.append(x)
        return tuple(outs)
