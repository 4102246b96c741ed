"""Vicinity attention with FRA and FPC."""

from typing import Tuple

import torch
import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor

from mmvvt.errors import UserError
from mmvvt.ops import (
    LOCALITIES,
    check_backend,
    magnitude_clamp,
    vicinity_attention,
)
from mmvvt.ops.reference import magnitude_clamp as plain_magnitude_clamp
from mmvvt.ops.unflatten import unflatten


class VicinityAttention(BaseModule):
    """Vicinity attention of *Vicinity Vision Transformer* (arXiv 2206.10552).

    Linear attention with a 2D locality bias, feature reduction attention
    (FRA) and a feature preserving connection (FPC). FRA reduces the number
    of channels of queries, keys and values. FPC multiplies the output by a
    squeeze-and-excitation gate computed from the input, and adds the product
    to the output.

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
            see :func:`mmvvt.ops.vicinity_attention`. Defaults to 'sum'.
        clamp (bool): Whether to apply the six magnitude clamps of the
            official code, which published checkpoints require. Defaults to
            True.
        eps (float): Value added to the denominator of the attention, the sum
            of the attention weights. Defaults to 1e-4.
        backend (str): 'auto', 'torch', 'triton' or 'reference'. 'reference'
            is the reference implementation; every other backend is tested
            against it. 'auto' uses the faster of 'torch' and 'triton' on a
            GPU, see :mod:`mmvvt.ops.selection`. Defaults to 'auto'.
        init_cfg (dict, optional): Initialisation config. Defaults to None.

    Raises:
        UserError: If ``embed_dims`` is not divisible by
            ``fr_ratio * num_heads`` or by ``se_ratio``, or if the locality or
            the backend is unknown.
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
        backend: str = 'auto',
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        if embed_dims % (fr_ratio * num_heads):
            raise UserError(
                f'embed_dims {embed_dims} must be divisible by '
                f'fr_ratio * num_heads = {fr_ratio} * '
                f'{num_heads}'
            )
        if embed_dims % se_ratio:
            raise UserError(
                f'embed_dims {embed_dims} must be divisible by '
                f'se_ratio {se_ratio}'
            )
        if locality not in LOCALITIES:
            raise UserError(
                f'locality must be one of {LOCALITIES}, got {locality!r}'
            )
        check_backend(backend)
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
        self.se_fc = nn.Sequential(
            nn.Linear(embed_dims, embed_dims // se_ratio, bias=False),
            nn.ReLU(),
            nn.Linear(embed_dims // se_ratio, embed_dims, bias=False),
            nn.Sigmoid(),
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
        # (B, N, C) -> (B, h, w, C) -> (B, C, h, w)
        x = unflatten(x, 1, spatial_shape).permute(0, 3, 1, 2)
        x = self.sr(x)  # (B, C, h / sr, w / sr)
        key_shape = (x.shape[2], x.shape[3])
        # (B, C, h / sr, w / sr) -> (B, C, M) -> (B, M, C)
        return self.norm(x.flatten(2).transpose(1, 2)), key_shape

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
        gate = self.se_fc(x.mean(dim=1, keepdim=True))  # (B, 1, C)
        source, key_shape = self._reduce_grid(x, spatial_shape)
        out = vicinity_attention(
            self._split_heads(self.q_proj(x)),
            self._split_heads(self.k_proj(source)),
            self._split_heads(self.v_proj(source)),
            spatial_shape,
            key_shape=key_shape,
            locality=self.locality,
            clamp=self.clamp,
            eps=self.eps,
            backend=self.backend,
        )
        # (B, heads, N, d) -> (B, N, heads, d) -> (B, N, C / fr)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.clamp:
            return torch.addcmul(out, out, gate)  # out + out * gate
        plain = check_backend(self.backend) == 'reference'
        clamp = plain_magnitude_clamp if plain else magnitude_clamp
        out = clamp(out)
        return clamp(torch.addcmul(out, out, gate))
