"""Counted multiply-adds against the formulas."""

import torch
import torch.nn as nn

from mmvvt.analysis.flops import count
from mmvvt.models import VicinityAttention


class OnGrid(nn.Module):

    def __init__(self, module, grid):
        super().__init__()
        self.module, self.grid = module, grid

    def forward(self, image):
        return self.module(image.flatten(2).transpose(1, 2), self.grid)


def test_attention_by_hand():
    c, heads, fr, n = 16, 2, 2, 6 * 10
    d = c // fr // heads
    module = VicinityAttention(c, heads, fr_ratio=fr, backend='torch',
                               clamp=False)
    found = count(OnGrid(module, (6, 10)), (1, c, 6, 10))
    linears = 3 * n * c * c // fr + n * c // fr * c + 2 * c * c
    # features of 4d: key-value sums, numerator, denominator
    attention = heads * (n * 4 * d * d + n * 4 * d * d + n * 4 * d)
    assert found.multiply_adds == linears + attention
    assert found.parameters == sum(p.numel() for p in module.parameters())
    # left as it was
    assert module.backend == 'torch' and module.clamp is False


def test_convolution_and_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    model.train()
    found = count(model, (2, 3, 5, 7))
    assert found.multiply_adds == 2 * 8 * 3 * 9 * 35
    assert model.training and torch.is_grad_enabled()
