"""Functions on tensors. Imports torch alone."""

from .clamp import magnitude_clamp
from .dispatch import (BACKENDS, LOCALITIES, check_backend,
                       vicinity_attention)

__all__ = [
    'BACKENDS', 'LOCALITIES', 'check_backend', 'magnitude_clamp',
    'vicinity_attention'
]
