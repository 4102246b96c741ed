"""Vicinity Vision Transformer (VVT), a backbone with four stages."""

import math
import re
import warnings
from typing import Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmengine.model import BaseModule
from mmengine.model.weight_init import constant_init, trunc_normal_init
from mmengine.registry import MODELS
from torch import Tensor

from mmvvt.arch import ARCH_SETTINGS, NUM_STAGES, resolve_arch
from mmvvt.arguments import check_bool, check_dict, is_number
from mmvvt.errors import UserError
from mmvvt.ops.autograd import in_torch_func
from mmvvt.ops.unflatten import is_compiled_training, tokens_to_image

from . import strips
from .attention import GlobalContext, build_attention
from .drop_path import DropPath
from .mlp import ConvMLP

MIN_SIZE = 32


class VVTBlock(BaseModule):
    """Vicinity Transformer block.

    Pre-norm block with residual connections around the vicinity attention
    and the MLP::

        x = x + DropPath(VicinityAttention(LayerNorm(x)))
        x = x + DropPath(ConvMLP(LayerNorm(x)))

    On CPUs, large images are processed in strips in the forward and backward
    passes, see :mod:`mmvvt.ops.strips`. This fast path is not used with the
    backends 'triton' and 'reference', or if a layer of the block has been
    replaced, modified or hooked; the layers are then called as usual.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of attention heads.
        mlp_ratio (int): Ratio of the hidden channels of the MLP to C.
        fr_ratio (int): Feature reduction ratio of the attention.
        sr_ratio (int): Spatial reduction ratio of the attention.
        drop_rate (float): Dropout rate of the MLP. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        with_cp (bool): Whether to use activation checkpointing, which
            recomputes the block in the backward pass instead of saving its
            activations. Defaults to False.
        attn_cfg (dict): Further arguments of
            :func:`mmvvt.models.attention.build_attention`. Defaults to an
            empty dict.
        mlp_cfg (dict): Further arguments of :class:`ConvMLP`. Defaults to an
            empty dict.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
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
        mlp_cfg: dict = dict(),
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.with_cp = with_cp
        self.hidden_dims = embed_dims * mlp_ratio
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = build_attention(
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
            **mlp_cfg,
        )
        self.drop_path = DropPath(drop_path_rate)

    def _forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        if strips.find_obstacle(self, x, spatial_shape) is None:
            return strips.forward(self, x, spatial_shape)
        x = x + self.drop_path(self.attn(self.norm1(x), spatial_shape))
        return x + self.drop_path(self.mlp(self.norm2(x), spatial_shape))

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)`` on the grid ``(h, w)``."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return cp.checkpoint(
                self._forward, x, spatial_shape, use_reentrant=False
            )
        return self._forward(x, spatial_shape)


class PositionEmbedding(BaseModule):
    """Learned position embedding, resized to any grid.

    Args:
        embed_dims (int): Number of channels C.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` of the learned table.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(
        self, embed_dims: int, spatial_shape: Tuple[int, int], init_cfg=None
    ):
        super().__init__(init_cfg)
        self.table = nn.Parameter(torch.empty(1, embed_dims, *spatial_shape))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Add the embedding to ``(B, N, C)`` on the grid ``(h, w)``."""
        # At the size of the table, this returns the table.
        table = F.interpolate(
            self.table, spatial_shape, mode='bilinear', align_corners=False
        )
        # (1, C, h, w) -> (1, C, N) -> (1, N, C)
        return x + table.flatten(2).transpose(1, 2)


class PatchEmbed(BaseModule):
    """Patch embedding: strided convolution and LayerNorm.

    Args:
        in_channels (int): Number of input channels.
        embed_dims (int): Number of output channels C.
        stride (int): Stride s of the convolution.
        overlap (bool): Whether neighbouring patches overlap: the kernel size
            is 2 * s - 1, with a padding of s - 1 pixels. Without overlap, an
            ablation variant, the kernel size is s, and the right and lower
            edges are padded with zeros. Defaults to True.
        pos_embed_shape (tuple[int, int], optional): Grid ``(h, w)`` of a
            learned position embedding, an ablation variant. Defaults to None,
            no position embedding.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        stride: int,
        overlap: bool = True,
        pos_embed_shape: Optional[Tuple[int, int]] = None,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.stride = stride
        self.overlap = overlap
        self.proj = nn.Conv2d(
            in_channels,
            embed_dims,
            kernel_size=2 * stride - 1 if overlap else stride,
            stride=stride,
            padding=stride - 1 if overlap else 0,
        )
        self.norm = nn.LayerNorm(embed_dims, eps=1e-5)
        self.pos_embed = (
            None
            if pos_embed_shape is None
            else PositionEmbedding(embed_dims, pos_embed_shape)
        )

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Map ``(B, C_in, H, W)`` to ``(B, h * w, C)`` and ``(h, w)``.

        The grid has h = ceil(H / s) rows and w = ceil(W / s) columns.
        """
        if not self.overlap:
            # The convolution does not read the rows and columns that are left
            # over.
            x = F.pad(x, (0, self.stride - 1, 0, self.stride - 1))
        # vmap has no memory formats.
        if not in_torch_func() and not is_compiled_training():
            # Channels last: the tokens are a view of the convolution output.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.proj(x)  # (B, C, h, w)
        spatial_shape = (x.shape[2], x.shape[3])
        # (B, C, h, w) -> (B, C, N) -> (B, N, C)
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.pos_embed is not None:
            x = self.pos_embed(x, spatial_shape)
        return x, spatial_shape


@MODELS.register_module()
class VVT(BaseModule):
    """Vicinity Vision Transformer.

    A PyTorch implementation of the backbone of *Vicinity Vision Transformer*
    (arXiv 2206.10552). It has a pyramid of four stages; each consists of an
    overlapping patch embedding, a sequence of Vicinity Transformer blocks and
    a LayerNorm. The strides of the stages are 4, 8, 16 and 32. The cost of
    vicinity attention is linear in the number of tokens. There are no
    position embeddings, so inputs may have any size of at least 32 x 32
    pixels. Submodules have the same names as in the official checkpoints.

    ``attn_cfg``, ``mlp_cfg`` and ``patch_cfg`` select ablation variants. The
    published checkpoints are valid for the defaults only. The kind of
    attention, its locality, clamps and ``eps`` are not visible in the
    weights: with other settings, checkpoints are loaded without an error.

    Args:
        arch (str | dict): Architecture: 'tiny', 'small', 'medium', 'large' or
            a dict, see :func:`mmvvt.arch.resolve_arch`.
        in_channels (int): Number of image channels. Defaults to 3.
        out_indices (Sequence[int] | int): Indices of the stages whose outputs
            are returned, 0 to 3; negative indices count from the end.
            Defaults to (3, ).
        drop_rate (float): Dropout rate of the MLPs. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last block. The
            rate increases linearly from 0 over all blocks. Defaults to 0.
        frozen_stages (int): Index of the last frozen stage. Stages 0 to
            ``frozen_stages`` (patch embedding, blocks and norm) are not
            trained and stay in evaluation mode. -1 means that no stage is
            frozen. Defaults to -1.
        with_cp (bool): Whether to use activation checkpointing, which
            recomputes each block in the backward pass. This saves memory but
            slows down training. Defaults to False.
        attn_cfg (dict): Further arguments of
            :class:`mmvvt.models.VicinityAttention`: ``locality``, ``clamp``,
            ``eps``, ``se_ratio``, ``fpc``, ``backend``, and ``attention``:
            'vicinity', 'softmax' or 'global_context', for which ``ratio`` is
            allowed instead, see :class:`mmvvt.models.GlobalContext`. Defaults
            to an empty dict.
        init_cfg (dict | list[dict], optional): Initialisation config. Defaults
            to None, the initialisation of the official code.
        pretrained (None): Not supported: weights are loaded with
            ``init_cfg``. Only None is allowed. Defaults to None.
        mlp_cfg (dict): ``dwconv=False`` removes the depthwise convolution of
            the MLPs. Defaults to an empty dict.
        patch_cfg (dict): ``overlap=False`` selects patch embeddings without
            overlap, with kernel sizes 4, 2, 2 and 2. ``pos_embed_size``, the
            height and width of an image in pixels or one number for both,
            adds a learned position embedding to each of them, with the grid
            that such an image has; it is resized bilinearly for other images.
            Defaults to an empty dict.

    Raises:
        UserError: If an argument is invalid.
        BackendError: If the backend cannot run; the message gives the reason.
    """

    arch_settings = ARCH_SETTINGS
    # Tools that visualize token sequences as maps remove this number of class
    # or distillation tokens first.
    num_extra_tokens = 0

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
        pretrained: None = None,
        mlp_cfg: dict = dict(),
        patch_cfg: dict = dict(),
    ):
        super().__init__(init_cfg)
        if pretrained is not None:
            raise UserError(
                f'VVT does not support pretrained={pretrained!r}; to load '
                "weights, use init_cfg=dict(type='Pretrained', "
                "checkpoint='FILE_OR_URL', prefix='backbone.'), without the "
                'prefix if the keys of the file have none'
            )
        settings = resolve_arch(arch)
        self.embed_dims = settings['embed_dims']
        if type(in_channels) is not int or in_channels < 1:
            raise UserError(
                f'in_channels must be a positive integer, got {in_channels!r}'
            )
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
            if not is_number(rate) or not 0.0 <= rate < 1.0:
                raise UserError(f'{name} must be in [0, 1), got {rate!r}')
        check_bool('with_cp', with_cp)
        check_dict('attn_cfg', attn_cfg)
        for key in ('embed_dims', 'num_heads', 'fr_ratio', 'sr_ratio'):
            if key in attn_cfg:
                raise UserError(
                    f'attn_cfg does not allow {key}, which each stage has: '
                    f'set it in arch, with {NUM_STAGES} values'
                )
        for name, cfg, allowed in (
            ('mlp_cfg', mlp_cfg, ('dwconv',)),
            ('patch_cfg', patch_cfg, ('overlap', 'pos_embed_size')),
        ):
            check_dict(name, cfg)
            if not set(cfg) <= set(allowed):
                raise UserError(
                    f'{name} allows the keys {allowed}, got {list(cfg)}'
                )

        self.depths = depths = settings['depths']
        drop_path_rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        for i, dims in enumerate(self.embed_dims):
            patch_embed = self._build_patch_embed(i, **patch_cfg)
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
                    mlp_cfg=mlp_cfg,
                )
                for _ in range(depths[i])
            )
            self.add_module(f'patch_embed{i + 1}', patch_embed)
            self.add_module(f'block{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', nn.LayerNorm(dims, eps=1e-6))
        self._freeze_stages()

    def _build_patch_embed(
        self,
        index: int,
        overlap: bool = True,
        pos_embed_size: Union[int, Tuple[int, int], None] = None,
    ) -> PatchEmbed:
        """Build the patch embedding of a stage, see ``patch_cfg``."""
        check_bool("patch_cfg['overlap']", overlap)
        size = pos_embed_size
        if isinstance(size, int):
            size = (size, size)
        if size is not None and not (
            isinstance(size, (tuple, list))
            and len(size) == 2
            and all(type(n) is int and n >= MIN_SIZE for n in size)
        ):
            raise UserError(
                "patch_cfg['pos_embed_size'] must be one or two integers of "
                f'at least {MIN_SIZE} pixels, got {pos_embed_size!r}'
            )
        total = 4 * 2**index  # stride to the image
        return PatchEmbed(
            self.in_channels if index == 0 else self.embed_dims[index - 1],
            self.embed_dims[index],
            stride=4 if index == 0 else 2,
            overlap=overlap,
            pos_embed_shape=None
            if size is None
            else (-(-size[0] // total), -(-size[1] // total)),
        )

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
                    f'out_indices must be between {-NUM_STAGES} and '
                    f'{NUM_STAGES - 1}, got {tuple(indices)}'
                )
        resolved = tuple(index % NUM_STAGES for index in indices)
        if not resolved or sorted(set(resolved)) != list(resolved):
            raise UserError(
                f'out_indices must name at least one stage, in '
                f'increasing order and without duplicates, got '
                f'{tuple(indices)}'
            )
        return resolved

    def _stage(self, index: int) -> Tuple[nn.Module, nn.ModuleList, nn.Module]:
        """Return the patch embedding, blocks and norm of a stage."""
        return (
            getattr(self, f'patch_embed{index + 1}'),
            getattr(self, f'block{index + 1}'),
            getattr(self, f'norm{index + 1}'),
        )

    def init_weights(self) -> None:
        """Initialise as in the official code, or according to ``init_cfg``."""
        if self.init_cfg is not None:
            super().init_weights()
            return
        if self.is_init:  # As in mmengine, keep weights loaded since then.
            warnings.warn(
                'init_weights of VVT has been called more than once; the '
                'weights are not changed',
                stacklevel=2,
            )
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.0)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, val=1, bias=0)
            elif isinstance(module, PositionEmbedding):
                nn.init.trunc_normal_(module.table, std=0.02)
            elif isinstance(module, nn.Conv2d):
                # mmengine's KaimingInit does not divide the fan by the groups.
                fan_out = (
                    math.prod(module.kernel_size)
                    * module.out_channels
                    // module.groups
                )
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GlobalContext):
                module.context.reset_parameters()
        self._is_init = True

    def _freeze_stages(self) -> None:
        for index in range(self.frozen_stages + 1):
            for module in self._stage(index):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'VVT':
        """Set the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def get_layer_depth(
        self, param_name: str, prefix: str = ''
    ) -> Tuple[int, int]:
        """Return the depth of a parameter, for layer-wise learning rates.

        With L blocks in all stages, the depths are:

        - 0: the first patch embedding.
        - 1 to L: the blocks. The norm of a stage and the patch embedding of
          the next one have the depth of the block before them, like the
          patch merging of mmpretrain's Swin Transformer.
        - L + 1: the norm of the last stage, and all parameters of other
          modules, such as heads.

        Args:
            param_name (str): Name of the parameter, including the prefix.
            prefix (str): Prefix of the names of the parameters of this
                backbone, such as 'backbone.'. Names without it belong to other
                modules. Defaults to an empty string.

        Returns:
            tuple[int, int]: Depth and number of depths, L + 2.
        """
        num_layers = sum(self.depths) + 2
        match = re.match(
            r'(patch_embed|block|norm)([1-4])\.(\d+)?',
            param_name.removeprefix(prefix),
        )
        if match is None or not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        kind, stage, block = match[1], int(match[2]), match[3]
        if kind == 'patch_embed':
            depth = sum(self.depths[: stage - 1])
        elif kind == 'block':
            depth = sum(self.depths[: stage - 1]) + int(block) + 1
        elif stage < NUM_STAGES:
            depth = sum(self.depths[:stage])
        else:
            depth = num_layers - 1
        return depth, num_layers

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the feature maps of the stages in ``out_indices``.

        Args:
            x (Tensor): Images ``(B, in_channels, H, W)``; H and W are at
                least 32 pixels.

        Returns:
            tuple[Tensor]: Feature map of each stage in ``out_indices``,
            ``(B, C_i, ceil(H / s), ceil(W / s))`` with stride s = 4, 8, 16 or
            32, normalised by the LayerNorm of the stage.

        Raises:
            UserError: If the input is not 4-dimensional, has a wrong number of
                channels or is smaller than 32 x 32 pixels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f'the input must be (B, {self.in_channels}, H, '
                f'W), got shape {tuple(x.shape)}'
            )
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise UserError(
                f'the image must be at least {MIN_SIZE} x {MIN_SIZE} pixels, '
                f'got {x.shape[2]} x {x.shape[3]}'
            )
        outs = []
        for i in range(self.out_indices[-1] + 1):
            patch_embed, blocks, norm = self._stage(i)
            x, spatial_shape = patch_embed(x)
            for block in blocks:
                x = block(x, spatial_shape)
            x = tokens_to_image(norm(x), spatial_shape)  # (B, C, h, w)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
