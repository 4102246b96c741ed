"""The backbone and its attention."""

from .attention import VicinityAttention
from .vvt import VVT

__all__ = ['VVT', 'VicinityAttention']
