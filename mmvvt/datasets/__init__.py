"""Small data sets made from what ships in Python packages."""

from .digit_scenes import DigitScenes, write_digit_scenes
from .digits import Digits, write_digits

__all__ = ['DigitScenes', 'Digits', 'write_digit_scenes', 'write_digits']
