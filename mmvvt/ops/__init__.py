"""Functions on tensors. Imports torch alone (and Triton where it runs)."""

from .clamp import magnitude_clamp
from .convolution import dwconv_gelu
from .dispatch import (BACKENDS, LOCALITIES, check_backend,
                       vicinity_attention)

__all__ = [
    'BACKENDS', 'LOCALITIES', 'check_backend', 'dwconv_gelu',
    'magnitude_clamp', 'vicinity_attention'
]
