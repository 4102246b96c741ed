"""Stochastic depth that compiles to one graph for all rates."""

import torch
from mmcv.cnn.bricks import DropPath as _DropPath
from torch import Tensor


class DropPath(_DropPath):
    """Stochastic depth of mmcv, with another form in compiled graphs.

    mmcv compares the rate with 0, which makes it a constant of the graph. The
    blocks of a stage differ in nothing but their rate, so each of them would
    be compiled by itself, and PyTorch stops after eight graphs. Here, the
    rate is an input of the graph, unless PyTorch makes every number a
    constant, as with ``dynamic=False`` and in old versions.

    Args:
        drop_prob (float): Probability that the branch of an image is dropped.
            Defaults to 0.1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop images of ``(B, ...)`` and divide the others by 1 - rate."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        if not self.training:
            return x
        ones = x.new_ones((len(x),) + (1,) * (x.dim() - 1))  # (B, 1, 1)
        # The compiler does not make a number that is multiplied by a tensor a
        # constant.
        keep_prob = 1 - ones * self.drop_prob
        # As in mmcv, but the sum is compared: in half precision, it may be
        # rounded to 2.
        kept = torch.rand_like(keep_prob) + keep_prob >= 1
        return x / keep_prob * kept
