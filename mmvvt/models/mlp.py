"""MLP with a depthwise convolution."""

from typing import Any, Tuple

import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor

from mmvvt.arguments import check_bool
from mmvvt.ops import check_backend, dwconv_gelu
from mmvvt.ops.autograd import is_transformed
from mmvvt.ops.convolution import select_dwconv_gelu
from mmvvt.ops.dispatch import TRITON_DTYPES, default_backend
from mmvvt.ops.unflatten import tokens_to_image

from .stock import StockLayer, find_difference


class DWConv(BaseModule):
    """Depthwise 3x3 convolution over tokens.

    Args:
        channels (int): Number of channels.
        plain (bool): Whether to copy the tokens to a contiguous
            ``(B, C, h, w)`` tensor first, as the official code does. Defaults
            to False: the convolution reads a channels-last view.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(self, channels: int, plain: bool = False, init_cfg=None):
        super().__init__(init_cfg)
        self.plain = plain
        self.dwconv = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels
        )

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)`` on the grid ``(h, w)``."""
        x = tokens_to_image(x, spatial_shape)  # (B, C, h, w)
        x = self.dwconv(x.contiguous() if self.plain else x)
        # (B, C, h, w) -> (B, h, w, C) -> (B, N, C)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


# Depthwise 3x3 convolution of D channels with padding 1.
DEPTHWISE = StockLayer(
    nn.Conv2d,
    parameters=dict(weight='D133', bias='D'),
    sizes=dict(groups='D', stride='11', padding='11', dilation='11'),
    settings=dict(padding_mode='zeros'),
)
EXACT_GELU = StockLayer(nn.GELU, settings=dict(approximate='none'))
# Layers that the fused kernel replaces: it reads their weights directly.
FUSED_LAYERS = {
    'dwconv': StockLayer(DWConv),
    'dwconv.dwconv': DEPTHWISE,
    'act': EXACT_GELU,
}


class ConvMLP(BaseModule):
    """MLP of a block: linear, depthwise 3x3 convolution, GELU, linear.

    Args:
        embed_dims (int): Number of input and output channels.
        hidden_dims (int): Number of hidden channels.
        drop_rate (float): Dropout rate after the GELU and after the second
            linear layer. Defaults to 0.
        dwconv (bool): Whether to use the depthwise convolution. Without it,
            an ablation variant, this is the MLP of ViT. Defaults to True.
        backend (str): 'auto', 'torch', 'triton' or 'reference'. 'triton'
            fuses the convolution and the GELU in one kernel; 'reference'
            copies the tokens to a contiguous ``(B, C, h, w)`` tensor before
            the convolution, as the official code does. 'auto' uses the
            faster of the layers and the kernel on a GPU, see
            :mod:`mmvvt.ops.selection`. Defaults to 'auto'.
        init_cfg (dict, optional): Initialisation config. Defaults to None.

    Raises:
        UserError: If the backend is unknown, or ``dwconv`` is not a bool.
        BackendError: If the backend cannot run; the message gives the reason.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        drop_rate: float = 0.0,
        dwconv: bool = True,
        backend: str = 'auto',
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        check_bool('dwconv', dwconv)
        plain = check_backend(backend) == 'reference'
        self.backend = backend
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = DWConv(hidden_dims, plain) if dwconv else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def _is_fused(self, x: Tensor) -> bool:
        """Check whether the kernel replaces the layers for an input."""
        # Compilers follow the layers, with their hooks.
        if is_transformed():
            return False
        backend = default_backend(self.backend)
        conv: Any = getattr(self.dwconv, 'dwconv', None)
        if (
            backend == 'auto'
            and type(conv) is nn.Conv2d
            and conv.bias is not None
        ):
            backend = select_dwconv_gelu(x, conv.weight, conv.bias)
        return (
            backend == 'triton'
            and find_difference(self, FUSED_LAYERS, x, TRITON_DTYPES) is None
        )

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)`` on the grid ``(h, w)``."""
        x = self.fc1(x)
        if self._is_fused(x):
            dwconv: Any = self.dwconv
            conv = dwconv.dwconv
            x = dwconv_gelu(x, conv.weight, conv.bias, spatial_shape)
        elif self.dwconv is None:
            x = self.act(x)
        else:
            x = self.act(self.dwconv(x, spatial_shape))
        return self.drop(self.fc2(self.drop(x)))
