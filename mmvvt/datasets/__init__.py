"""Small datasets built from installed packages, and a label check."""

from .digit_scenes import DigitScenes, write_digit_scenes
from .digits import Digits, write_digits
from .labels import CheckLabels
from .loading import GuardedPipeline

__all__ = [
    'CheckLabels',
    'DigitScenes',
    'Digits',
    'GuardedPipeline',
    'write_digit_scenes',
    'write_digits',
]
