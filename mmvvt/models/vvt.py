"""The Vicinity Vision Transformer, a backbone of four stages."""

import math
import warnings
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.model.weight_init import constant_init, trunc_normal_init
from mmengine.registry import MODELS
from torch import Tensor

from mmvvt.arch import ARCH_SETTINGS, NUM_STAGES, resolve_arch
from mmvvt.errors import UserError

from . import strips
from .attention import VicinityAttention
from .mlp import ConvMLP

MIN_SIZE = 32


class VVTBlock(BaseModule):
    """Attention and MLP, each behind a LayerNorm and on a shortcut.

    Large images on a CPU run through its two branches a strip at a time,
    forward and backward, see :mod:`mmvvt.ops.strips`; with the backend
    'reference' they do not. Layers that were replaced by others or have hooks
    are called one after the other, so that nothing put there is left out.

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Attention heads.
        mlp_ratio (int): Hidden channels of the MLP over C.
        fr_ratio (int): Feature reduction of the attention.
        sr_ratio (int): Spatial reduction of the attention.
        drop_rate (float): Dropout of the MLP. Defaults to 0.
        drop_path_rate (float): Stochastic depth. Defaults to 0.
        with_cp (bool): Recompute the block in the backward pass instead of
            keeping its activations. Defaults to False.
        attn_cfg (dict): More arguments of :class:`VicinityAttention`.
            Defaults to an empty dict.
        init_cfg (dict, optional): Initialisation. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: int,
        fr_ratio: int,
        sr_ratio: int,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        attn_cfg: dict = dict(),
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.with_cp = with_cp
        self.hidden_dims = embed_dims * mlp_ratio
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = VicinityAttention(
            embed_dims,
            num_heads,
            fr_ratio=fr_ratio,
            sr_ratio=sr_ratio,
            **attn_cfg,
        )
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = ConvMLP(
            embed_dims,
            self.hidden_dims,
            drop_rate,
            backend=attn_cfg.get('backend', 'auto'),
        )
        self.drop_path = DropPath(drop_path_rate)

    def _forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        if strips.find_obstacle(self, x, spatial_shape) is None:
            return strips.forward(self, x, spatial_shape)
        x = x + self.drop_path(self.attn(self.norm1(x), spatial_shape))
        return x + self.drop_path(self.mlp(self.norm2(x), spatial_shape))

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)`` over the grid ``(h, w)``."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return cp.checkpoint(
                self._forward, x, spatial_shape, use_reentrant=False
            )
        return self._forward(x, spatial_shape)


class OverlapPatchEmbed(BaseModule):
    """Strided convolution with overlapping windows, then LayerNorm.

    Args:
        in_channels (int): Channels of the input.
        embed_dims (int): Channels of the tokens.
        kernel_size (int): Window of the convolution.
        stride (int): Step of the convolution.
        init_cfg (dict, optional): Initialisation. Defaults to None.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        kernel_size: int,
        stride: int,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.proj = nn.Conv2d(
            in_channels,
            embed_dims,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
        )
        self.norm = nn.LayerNorm(embed_dims, eps=1e-5)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """``(B, C_in, H, W)`` to tokens ``(B, h * w, C)`` and ``(h, w)``."""
        # Channels last, so that the tokens are a view of what comes out.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.proj(x)  # (B, C, h, w)
        spatial_shape = (x.shape[2], x.shape[3])
        # (B, C, h, w) -> (B, C, N) -> (B, N, C)
        return self.norm(x.flatten(2).transpose(1, 2)), spatial_shape


@MODELS.register_module()
class VVT(BaseModule):
    """Vicinity Vision Transformer.

    A backbone from *Vicinity Vision Transformer* (arXiv 2206.10552). Its
    attention is linear in the number of pixels and there is no position
    table, so any input of 32 pixels or more a side will do. The names of
    submodules are those of the official checkpoints.

    Args:
        arch (str | dict): 'tiny', 'small', 'medium', 'large', or a dict, see
            :func:`mmvvt.arch.resolve_arch`.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int] | int): Stages whose output is returned,
            0 to 3; negative ones count from the end. Defaults to (3, ).
        drop_rate (float): Dropout in the MLPs. Defaults to 0.
        drop_path_rate (float): Stochastic depth of the last block; it rises
            linearly from 0 over all blocks. Defaults to 0.
        frozen_stages (int): Stages 0 to this one (patch embedding, blocks
            and norm) are not trained and stay in evaluation mode. -1 freezes
            none. Defaults to -1.
        with_cp (bool): Recompute each block in the backward pass: less
            memory, more time. Defaults to False.
        attn_cfg (dict): More arguments of
            :class:`mmvvt.models.VicinityAttention`: ``locality``, ``clamp``,
            ``eps``, ``se_ratio``, ``backend``. Defaults to an empty dict.
        init_cfg (dict | list[dict], optional): Initialisation. Defaults to
            None, that of the official code.

    Raises:
        UserError: If an argument is not what is allowed.
    """

    arch_settings = ARCH_SETTINGS

    def __init__(
        self,
        arch: Union[str, dict],
        in_channels: int = 3,
        out_indices: Union[int, Sequence[int]] = (3,),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        attn_cfg: dict = dict(),
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(init_cfg)
        settings = resolve_arch(arch)
        self.embed_dims = settings['embed_dims']
        self.in_channels = in_channels
        self.out_indices = self._check_out_indices(out_indices)
        if frozen_stages not in range(-1, NUM_STAGES):
            raise UserError(
                f'frozen_stages must be -1 (none) to '
                f'{NUM_STAGES - 1}, got {frozen_stages!r}'
            )
        self.frozen_stages = frozen_stages
        for name, rate in (
            ('drop_rate', drop_rate),
            ('drop_path_rate', drop_path_rate),
        ):
            if not 0.0 <= rate < 1.0:
                raise UserError(f'{name} must be in [0, 1), got {rate!r}')

        depths = settings['depths']
        drop_path_rates = torch.linspace(
            0, drop_path_rate, sum(depths), device='cpu'
        ).tolist()
        for i, dims in enumerate(self.embed_dims):
            first = i == 0
            patch_embed = OverlapPatchEmbed(
                in_channels if first else self.embed_dims[i - 1],
                dims,
                kernel_size=7 if first else 3,
                stride=4 if first else 2,
            )
            blocks = nn.ModuleList(
                VVTBlock(
                    dims,
                    num_heads=settings['num_heads'][i],
                    mlp_ratio=settings['mlp_ratios'][i],
                    fr_ratio=settings['fr_ratios'][i],
                    sr_ratio=settings['sr_ratios'][i],
                    drop_rate=drop_rate,
                    drop_path_rate=drop_path_rates.pop(0),
                    with_cp=with_cp,
                    attn_cfg=attn_cfg,
                )
                for _ in range(depths[i])
            )
            self.add_module(f'patch_embed{i + 1}', patch_embed)
            self.add_module(f'block{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', nn.LayerNorm(dims, eps=1e-6))
        self._freeze_stages()

    @staticmethod
    def _check_out_indices(
        out_indices: Union[int, Sequence[int]],
    ) -> Tuple[int, ...]:
        indices = (
            (out_indices,)
            if isinstance(out_indices, int)
            else tuple(out_indices)
        )
        for index in indices:
            if index not in range(-NUM_STAGES, NUM_STAGES):
                raise UserError(
                    f'out_indices must be within {-NUM_STAGES} to '
                    f'{NUM_STAGES - 1}, got {tuple(indices)}'
                )
        resolved = tuple(index % NUM_STAGES for index in indices)
        if not resolved or sorted(set(resolved)) != list(resolved):
            raise UserError(
                f'out_indices must name one stage at least, in '
                f'rising order and none twice, got '
                f'{tuple(indices)}'
            )
        return resolved

    def _stage(self, index: int) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Patch embedding, blocks and norm of a stage, from 0."""
        return (
            getattr(self, f'patch_embed{index + 1}'),
            getattr(self, f'block{index + 1}'),
            getattr(self, f'norm{index + 1}'),
        )

    def init_weights(self) -> None:
        """Initialise as the official code does, or by ``init_cfg``."""
        if self.init_cfg is not None:
            super().init_weights()
            return
        if self.is_init:  # as mmengine does: what was loaded since, stays
            warnings.warn(
                'init_weights of VVT has been called more than once; the '
                'weights are left as they are',
                stacklevel=2,
            )
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.0)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, val=1, bias=0)
            elif isinstance(module, nn.Conv2d):
                # mmengine's KaimingInit does not divide by the groups.
                fan_out = (
                    math.prod(module.kernel_size)
                    * module.out_channels
                    // module.groups
                )
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._is_init = True

    def _freeze_stages(self) -> None:
        for index in range(self.frozen_stages + 1):
            for module in self._stage(index):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'VVT':
        """Set the mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Feature maps of the stages ``out_indices``.

        Args:
            x (Tensor): ``(B, in_channels, H, W)``, H and W at least 32.

        Returns:
            tuple[Tensor]: ``(B, C_i, ceil(H / s), ceil(W / s))`` with s = 4,
            8, 16, 32, each normalised by its stage's LayerNorm.

        Raises:
            UserError: If the image has other channels or is too small.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f'the input must be (B, {self.in_channels}, H, '
                f'W), got shape {tuple(x.shape)}'
            )
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise UserError(
                f'the image must be {MIN_SIZE} x {MIN_SIZE} pixels or more, '
                f'got {x.shape[2]} x {x.shape[3]}'
            )
        outs = []
        for i in range(self.out_indices[-1] + 1):
            patch_embed, blocks, norm = self._stage(i)
            x, spatial_shape = patch_embed(x)
            for block in blocks:
                x = block(x, spatial_shape)
            # (B, N, C) -> (B, h, w, C) -> (B, C, h, w), channels last
            x = norm(x).unflatten(1, spatial_shape).permute(0, 3, 1, 2)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
