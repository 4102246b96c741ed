"""Small datasets built from installed packages, and a label check."""

from .digit_scenes import DigitScenes, write_digit_scenes
from .digits import Digits, write_digits
from .labels import CheckLabels

__all__ = [
    'CheckLabels',
    'DigitScenes',
    'Digits',
    'write_digit_scenes',
    'write_digits',
]
