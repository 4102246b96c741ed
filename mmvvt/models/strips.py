"""Strip-wise execution of a block, a fast path for large images on CPUs.

The fast path computes the same function as the layers of the block, see
:mod:`mmvvt.ops.strips`, but reads the weights of the layers instead of calling
them. :data:`LAYERS` lists everything that it assumes about the layers.
"""

from typing import TYPE_CHECKING, Any, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmvvt.ops import LOCALITIES, check_backend
from mmvvt.ops.autograd import autocast_enabled
from mmvvt.ops.strips import (
    AttentionSettings,
    AttentionWeights,
    MLPWeights,
    attention_branch,
    mlp_branch,
    runs_in_strips,
    sum_dtype,
)

from .attention import VicinityAttention
from .drop_path import DropPath
from .mlp import DEPTHWISE, EXACT_GELU, ConvMLP, DWConv
from .stock import StockLayer, find_difference

if TYPE_CHECKING:
    from .vvt import VVTBlock


def _layer_norm() -> StockLayer:
    return StockLayer(
        nn.LayerNorm,
        parameters=dict(weight='C', bias='C'),
        sizes=dict(normalized_shape='C'),
    )


def _linear(weight: str, bias: Optional[str]) -> StockLayer:
    return StockLayer(nn.Linear, parameters=dict(weight=weight, bias=bias))


# Layers of a block by name. C is the number of channels, R the number after
# feature reduction, S the number of hidden channels of the FPC gate and D the
# number of hidden channels of the MLP.
LAYERS = {
    'norm1': _layer_norm(),
    'attn': StockLayer(
        VicinityAttention, settings=dict(sr_ratio=1, attention='vicinity')
    ),
    'attn.q_proj': _linear('RC', 'R'),
    'attn.k_proj': _linear('RC', 'R'),
    'attn.v_proj': _linear('RC', 'R'),
    'attn.out_proj': _linear('CR', 'C'),
    'attn.se_fc': StockLayer(nn.Sequential),
    'attn.se_fc.0': _linear('SC', None),
    'attn.se_fc.1': StockLayer(nn.ReLU),
    'attn.se_fc.2': _linear('CS', None),
    'attn.se_fc.3': StockLayer(nn.Sigmoid),
    'norm2': _layer_norm(),
    'mlp': StockLayer(ConvMLP),
    'mlp.fc1': _linear('DC', 'D'),
    'mlp.dwconv': StockLayer(DWConv),
    'mlp.dwconv.dwconv': DEPTHWISE,
    'mlp.act': EXACT_GELU,
    'mlp.fc2': _linear('CD', 'C'),
    'mlp.drop': StockLayer(nn.Dropout),
    'drop_path': StockLayer(DropPath),
}


def find_obstacle(
    block: 'VVTBlock', x: Tensor, spatial_shape: Tuple[int, int]
) -> Optional[str]:
    """Find a reason why a block does not run in strips.

    Args:
        block (VVTBlock): The block.
        x (Tensor): Input ``(B, N, C)`` of the block.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``.

    Returns:
        str | None: The first reason found; None if the block runs in strips.
    """
    if not runs_in_strips(x, block.hidden_dims):
        return 'strips require large float inputs on a CPU in eager mode'
    # Autocast converts the weights of the layers, not those of LayerNorm.
    dtype = torch.float32 if autocast_enabled(x) else x.dtype
    difference = find_difference(block, LAYERS, x, (dtype,))
    if difference is not None:
        return difference
    attn, mlp = block.attn, block.mlp
    if any(check_backend(m.backend) != 'torch' for m in (attn, mlp)):
        return f'the backends are {attn.backend!r} and {mlp.backend!r}'
    if attn.locality not in LOCALITIES:
        return f'attn has locality {attn.locality!r}'
    if attn.q_proj.weight.shape[0] % attn.num_heads:
        return f'attn has num_heads {attn.num_heads}'
    if mlp.drop.training and mlp.drop.p > 0:
        return 'the MLP has dropout'
    if spatial_shape[0] * spatial_shape[1] != x.shape[1]:
        return f'x does not match the grid {tuple(spatial_shape)}'
    return None


def _path_scale(drop_path: DropPath, x: Tensor) -> Optional[Tensor]:
    """Per-sample drop-path scale ``(B, 1, 1)``; None if all scales are 1."""
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    dtype = x.dtype
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype('cpu')
    # Random numbers are drawn as for the branch that the layers compute.
    kept = drop_path(x.new_ones(len(x), 1, 1, dtype=dtype)) > 0
    return kept.to(sum_dtype(dtype)).div_(1 - drop_path.drop_prob)


def forward(
    block: 'VVTBlock', x: Tensor, spatial_shape: Tuple[int, int]
) -> Tensor:
    """Run a block in strips. Double backward is not supported.

    Call it only if :func:`find_obstacle` returns None.

    Args:
        block (VVTBlock): The block.
        x (Tensor): Input tokens ``(B, N, C)``.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.

    Returns:
        Tensor: Output tokens ``(B, N, C)``.
    """
    attn: Any = block.attn
    mlp: Any = block.mlp
    qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
    x = attention_branch(
        x,
        spatial_shape,
        AttentionWeights(
            norm_weight=block.norm1.weight,
            norm_bias=block.norm1.bias,
            qkv_weight=torch.cat([layer.weight for layer in qkv]),
            qkv_bias=torch.cat([layer.bias for layer in qkv]),
            out_weight=attn.out_proj.weight,
            out_bias=attn.out_proj.bias,
            squeeze_weight=attn.se_fc[0].weight,
            excite_weight=attn.se_fc[2].weight,
        ),
        AttentionSettings(
            num_heads=attn.num_heads,
            locality=attn.locality,
            clamp=attn.clamp,
            eps=attn.eps,
            norm_eps=block.norm1.eps,
        ),
        _path_scale(block.drop_path, x),
    )
    return mlp_branch(
        x,
        spatial_shape,
        MLPWeights(
            norm_weight=block.norm2.weight,
            norm_bias=block.norm2.bias,
            fc1_weight=mlp.fc1.weight,
            fc1_bias=mlp.fc1.bias,
            dwconv_weight=mlp.dwconv.dwconv.weight,
            dwconv_bias=mlp.dwconv.dwconv.bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
        ),
        block.norm2.eps,
        _path_scale(block.drop_path, x),
        # Takes ownership of the attention output, modified in place.
        inplace=True,
    )
