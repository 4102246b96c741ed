"""The VVT backbone and its building blocks."""

from .attention import GlobalContext, VicinityAttention
from .mlp import ConvMLP
from .tuple_outputs import TupleOutputs
from .vvt import VVT

__all__ = [
    'VVT',
    'ConvMLP',
    'GlobalContext',
    'TupleOutputs',
    'VicinityAttention',
]
