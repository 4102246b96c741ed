"""Functional operators. Depends on PyTorch, and optionally on Triton."""

from .angles import LOCALITIES
from .attention import vicinity_attention
from .clamp import magnitude_clamp
from .convolution import dwconv_gelu
from .dispatch import BACKENDS, check_backend

__all__ = [
    'BACKENDS',
    'LOCALITIES',
    'check_backend',
    'dwconv_gelu',
    'magnitude_clamp',
    'vicinity_attention',
]
