"""The MLP of a block: linear, depthwise convolution, GELU, linear."""

from typing import Tuple

import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor

from mmvvt.ops import check_backend, dwconv_gelu

from .stock import StockLayer, find_difference


class DWConv(BaseModule):
    """Depthwise 3x3 convolution over tokens.

    Args:
        channels (int): Number of channels.
        plain (bool): Copy to ``(B, C, h, w)`` and back, as the official code
            does. Defaults to False, no copies.
        init_cfg (dict, optional): Initialisation. Defaults to None.
    """

    def __init__(self, channels: int, plain: bool = False, init_cfg=None):
        super().__init__(init_cfg)
        self.plain = plain
        self.dwconv = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels
        )

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)`` over the grid ``(h, w)``."""
        # (B, N, C) -> (B, h, w, C) -> (B, C, h, w), channels last: no copy
        x = x.unflatten(1, spatial_shape).permute(0, 3, 1, 2)
        x = self.dwconv(x.contiguous() if self.plain else x)
        # (B, C, h, w) -> (B, h, w, C) -> (B, N, C)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


# A depthwise 3x3 convolution with padding 1 of D channels.
DEPTHWISE = StockLayer(
    nn.Conv2d,
    parameters=dict(weight='D133', bias='D'),
    sizes=dict(groups='D', stride='11', padding='11', dilation='11'),
    settings=dict(padding_mode='zeros'),
)
EXACT_GELU = StockLayer(nn.GELU, settings=dict(approximate='none'))
# The layers whose weights the fused kernel reads without calling them.
FUSED_LAYERS = {
    'dwconv': StockLayer(DWConv),
    'dwconv.dwconv': DEPTHWISE,
    'act': EXACT_GELU,
}


class ConvMLP(BaseModule):
    """Linear, depthwise 3x3, GELU, Linear.

    Args:
        embed_dims (int): Channels of input and output.
        hidden_dims (int): Channels in between.
        drop_rate (float): Dropout after the GELU and at the end. Defaults
            to 0.
        backend (str): 'triton' takes convolution and GELU in one kernel,
            'reference' copies between convolution and tokens as the official
            code does. Defaults to 'auto'.
        init_cfg (dict, optional): Initialisation. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        drop_rate: float = 0.0,
        backend: str = 'auto',
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.backend = check_backend(backend)
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = DWConv(hidden_dims, self.backend == 'reference')
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)`` over the grid ``(h, w)``."""
        x = self.fc1(x)
        if (
            self.backend == 'triton'
            and find_difference(self, FUSED_LAYERS, x) is None
        ):
            conv = self.dwconv.dwconv
            x = dwconv_gelu(x, conv.weight, conv.bias, spatial_shape)
        else:
            x = self.act(self.dwconv(x, spatial_shape))
        return self.drop(self.fc2(self.drop(x)))
