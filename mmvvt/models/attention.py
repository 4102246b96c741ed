"""Vicinity attention with FRA and FPC, and its ablation variants."""

from typing import Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import ContextBlock
from mmengine.model import BaseModule
from torch import Tensor

from mmvvt.arguments import check_bool, is_number
from mmvvt.errors import UserError
from mmvvt.ops import (
    LOCALITIES,
    check_backend,
    magnitude_clamp,
    vicinity_attention,
)
from mmvvt.ops.reference import magnitude_clamp as plain_magnitude_clamp
from mmvvt.ops.unflatten import (
    image_to_tokens,
    tokens_to_image,
    unflatten,
)

# Arguments of each kind of attention, besides `attention`
ARGUMENTS = {
    'vicinity': ('locality', 'clamp', 'eps', 'se_ratio', 'fpc', 'backend'),
    'softmax': ('clamp', 'se_ratio', 'fpc', 'backend'),
    'global_context': ('ratio', 'backend'),
}


class VicinityAttention(BaseModule):
    """Vicinity attention of *Vicinity Vision Transformer* (arXiv 2206.10552).

    Linear attention with a 2D locality bias, feature reduction attention
    (FRA) and a feature preserving connection (FPC). FRA reduces the number
    of channels of queries, keys and values. FPC multiplies the output by a
    squeeze-and-excitation gate computed from the input, and adds the product
    to the output.

    For ablation studies, softmax attention takes the place of the linear
    attention, with the same FRA and FPC, and the FPC can be removed.

    Args:
        embed_dims (int): Number of input and output channels C.
        num_heads (int): Number of attention heads.
        fr_ratio (int): Feature reduction ratio: queries, keys and values have
            ``embed_dims / fr_ratio`` channels. Defaults to 2.
        sr_ratio (int): Spatial reduction ratio: the grid of keys and values
            is ``sr_ratio`` times coarser than that of the queries. Defaults
            to 1 (no spatial reduction), as in all published models.
        se_ratio (int): Channel reduction ratio of the hidden layer of the
            FPC gate. Defaults to 1, as in all published models.
        locality (str): Type of locality: 'sum', 'product', '1d' or 'none',
            see :func:`mmvvt.ops.vicinity_attention`. Not used by softmax
            attention. Defaults to 'sum'.
        clamp (bool): Whether to apply the six magnitude clamps of the
            official code, which published checkpoints require. Softmax
            attention has only the last two, of the output projection and of
            the FPC. Defaults to True.
        eps (float): Value added to the denominator of the attention, the sum
            of the attention weights. Not used by softmax attention. Defaults
            to 1e-4.
        attention (str): 'vicinity', or 'softmax' for scaled dot-product
            attention, whose cost is quadratic in the number of tokens.
            Defaults to 'vicinity'.
        fpc (bool): Whether to use the feature preserving connection. Defaults
            to True.
        backend (str): 'auto', 'torch', 'triton' or 'reference'. 'reference'
            is the reference implementation; every other backend is tested
            against it. 'auto' uses the faster of 'torch' and 'triton' on a
            GPU, see :mod:`mmvvt.ops.selection`. Defaults to 'auto'.
        init_cfg (dict, optional): Initialisation config. Defaults to None.

    Raises:
        UserError: If ``embed_dims`` is not divisible by
            ``fr_ratio * num_heads`` or by ``se_ratio``, if the attention, the
            locality or the backend is unknown, or if another argument is
            invalid.
        BackendError: If the backend cannot run; the message gives the reason.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        fr_ratio: int = 2,
        sr_ratio: int = 1,
        se_ratio: int = 1,
        locality: str = 'sum',
        clamp: bool = True,
        eps: float = 1e-4,
        attention: str = 'vicinity',
        fpc: bool = True,
        backend: str = 'auto',
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        if attention not in ('vicinity', 'softmax'):
            raise UserError(
                f"attention must be 'vicinity' or 'softmax', got {attention!r}"
            )
        if embed_dims % (fr_ratio * num_heads):
            raise UserError(
                f'embed_dims {embed_dims} must be divisible by '
                f'fr_ratio * num_heads = {fr_ratio} * '
                f'{num_heads}'
            )
        if type(se_ratio) is not int or se_ratio < 1:
            raise UserError(
                f'se_ratio must be a positive integer, got {se_ratio!r}'
            )
        if embed_dims % se_ratio:
            raise UserError(
                f'embed_dims {embed_dims} must be divisible by '
                f'se_ratio {se_ratio}'
            )
        check_bool('clamp', clamp)
        check_bool('fpc', fpc)
        if not is_number(eps) or eps < 0:
            raise UserError(f'eps must be a number of at least 0, got {eps!r}')
        if locality not in LOCALITIES:
            raise UserError(
                f'locality must be one of {LOCALITIES}, got {locality!r}'
            )
        check_backend(backend)
        self.attention = attention
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.locality = locality
        self.clamp = clamp
        self.eps = eps
        self.backend = backend

        reduced_dims = embed_dims // fr_ratio
        self.q_proj = nn.Linear(embed_dims, reduced_dims)
        self.k_proj = nn.Linear(embed_dims, reduced_dims)
        self.v_proj = nn.Linear(embed_dims, reduced_dims)
        self.out_proj = nn.Linear(reduced_dims, embed_dims)
        # Squeeze-and-excitation gate of the FPC.
        self.se_fc = (
            nn.Sequential(
                nn.Linear(embed_dims, embed_dims // se_ratio, bias=False),
                nn.ReLU(),
                nn.Linear(embed_dims // se_ratio, embed_dims, bias=False),
                nn.Sigmoid(),
            )
            if fpc
            else None
        )
        if sr_ratio > 1:
            self.sr = nn.Conv2d(
                embed_dims, embed_dims, sr_ratio, stride=sr_ratio
            )
            self.norm = nn.LayerNorm(embed_dims, eps=1e-5)

    def _split_heads(self, t: Tensor) -> Tensor:
        # (B, N, C / fr) -> (B, N, heads, d) -> (B, heads, N, d)
        return unflatten(t, -1, (self.num_heads, -1)).transpose(1, 2)

    def _reduce_grid(self, x: Tensor, spatial_shape: Tuple[int, int]):
        """Return the input tokens of keys and values, and their grid."""
        if self.sr_ratio == 1:
            return x, spatial_shape
        if min(spatial_shape) < self.sr_ratio:
            raise UserError(
                f'sr_ratio {self.sr_ratio} requires a grid with at least '
                f'{self.sr_ratio} rows and columns, got '
                f'{tuple(spatial_shape)}'
            )
        # (B, N, C) -> (B, C, h, w) -> (B, C, h / sr, w / sr)
        x = self.sr(tokens_to_image(x, spatial_shape))
        key_shape = (x.shape[2], x.shape[3])
        return self.norm(image_to_tokens(x)), key_shape  # (B, M, C)

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Forward pass.

        Args:
            x (Tensor): Tokens ``(B, N, C)`` in row-major order.
            spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.

        Returns:
            Tensor: Output tokens ``(B, N, C)``.

        Raises:
            UserError: If h * w is not N, or if the grid has fewer rows or
                columns than ``sr_ratio``.
        """
        if spatial_shape[0] * spatial_shape[1] != x.shape[1]:
            raise UserError(
                f'spatial_shape {tuple(spatial_shape)} has '
                f'{spatial_shape[0] * spatial_shape[1]} tokens, but x has '
                f'{x.shape[1]}'
            )
        source, key_shape = self._reduce_grid(x, spatial_shape)
        q = self._split_heads(self.q_proj(x))  # (B, heads, N, d)
        k = self._split_heads(self.k_proj(source))  # (B, heads, M, d)
        v = self._split_heads(self.v_proj(source))  # (B, heads, M, d)
        if self.attention == 'softmax':
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = vicinity_attention(
                q,
                k,
                v,
                spatial_shape,
                key_shape=key_shape,
                locality=self.locality,
                clamp=self.clamp,
                eps=self.eps,
                backend=self.backend,
            )
        # (B, heads, N, d) -> (B, N, heads, d) -> (B, N, C / fr)
        out = self._clamp(self.out_proj(out.transpose(1, 2).flatten(2)))
        if self.se_fc is None:
            return out
        gate = self.se_fc(x.mean(dim=1, keepdim=True))  # (B, 1, C)
        return self._clamp(torch.addcmul(out, out, gate))  # out + out * gate

    def _clamp(self, out: Tensor) -> Tensor:
        if not self.clamp:
            return out
        plain = check_backend(self.backend) == 'reference'
        return (plain_magnitude_clamp if plain else magnitude_clamp)(out)


class GlobalContext(BaseModule):
    """Global context block, an ablation variant in place of the attention.

    Every token gets the same vector: a weighted average of all tokens,
    transformed by two 1x1 convolutions. The weights of the average are a
    softmax over the tokens. It is the block of *GCNet* (arXiv 1904.11492) as
    implemented in mmcv, with its residual connection: the output is the input
    plus that vector.

    Args:
        embed_dims (int): Number of input and output channels C.
        ratio (float): Ratio of the hidden channels of the transform to C.
            Defaults to 0.25.
        init_cfg (dict, optional): Initialisation config. Defaults to None.

    Raises:
        UserError: If ``embed_dims * ratio`` is less than 1.
    """

    def __init__(self, embed_dims: int, ratio: float = 0.25, init_cfg=None):
        super().__init__(init_cfg)
        if not is_number(ratio) or embed_dims * ratio < 1:
            raise UserError(
                'embed_dims * ratio must be at least 1, got '
                f'{embed_dims} * {ratio}'
            )
        self.context = ContextBlock(embed_dims, ratio)

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)`` on the grid ``(h, w)``."""
        x = self.context(tokens_to_image(x, spatial_shape))  # (B, C, h, w)
        return image_to_tokens(x)  # (B, N, C)


def build_attention(
    embed_dims: int,
    num_heads: int,
    fr_ratio: int,
    sr_ratio: int,
    attention: str = 'vicinity',
    **kwargs,
) -> Union[VicinityAttention, GlobalContext]:
    """Build the attention of a block, or its ablation variant.

    Args:
        embed_dims (int): Number of input and output channels C.
        num_heads (int): Number of attention heads.
        fr_ratio (int): Feature reduction ratio.
        sr_ratio (int): Spatial reduction ratio.
        attention (str): 'vicinity' or 'softmax' for
            :class:`VicinityAttention`, 'global_context' for
            :class:`GlobalContext`, which has neither heads nor ratios.
            Defaults to 'vicinity'.
        **kwargs: Further arguments, see :data:`ARGUMENTS`. ``backend`` is
            that of the MLP, too.

    Returns:
        VicinityAttention | GlobalContext: The module.

    Raises:
        UserError: If the attention is unknown, or an argument is invalid or
            has no effect on it.
    """
    if attention not in ARGUMENTS:
        raise UserError(
            f'attention must be one of {tuple(ARGUMENTS)}, got {attention!r}'
        )
    unknown = sorted(set(kwargs) - set(ARGUMENTS[attention]))
    if unknown:
        raise UserError(
            f'with attention={attention!r}, attn_cfg allows the keys '
            f'{", ".join(ARGUMENTS[attention])}, got {", ".join(unknown)}'
        )
    if attention == 'global_context':
        check_backend(kwargs.pop('backend', 'auto'))
        return GlobalContext(embed_dims, **kwargs)
    return VicinityAttention(
        embed_dims,
        num_heads,
        fr_ratio=fr_ratio,
        sr_ratio=sr_ratio,
        attention=attention,
        **kwargs,
    )
