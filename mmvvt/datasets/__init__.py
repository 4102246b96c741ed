"""Small data sets made from what ships in Python packages."""

from .digits import Digits, write_digits

__all__ = ['Digits', 'write_digits']
