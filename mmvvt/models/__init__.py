"""The VVT backbone and its building blocks."""

from .attention import GlobalContext, VicinityAttention
from .mlp import ConvMLP
from .vvt import VVT

__all__ = ['VVT', 'ConvMLP', 'GlobalContext', 'VicinityAttention']
