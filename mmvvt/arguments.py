"""Checks of arguments that several classes share."""

import math
from typing import Any

from .errors import UserError


def check_bool(name: str, value: Any) -> None:
    """Check that an argument is True or False.

    A text such as 'no', from a YAML file or a command line, is true in
    Python.

    Args:
        name (str): Name of the argument.
        value (Any): Its value.

    Raises:
        UserError: If the value is not a bool.
    """
    if not isinstance(value, bool):
        raise UserError(f'{name} must be True or False, got {value!r}')


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float, and not a bool."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def check_dict(name: str, value: Any) -> None:
    """Check that an argument is a dict.

    Args:
        name (str): Name of the argument.
        value (Any): Its value.

    Raises:
        UserError: If the value is not a dict.
    """
    if not isinstance(value, dict):
        raise UserError(f'{name} must be a dict, got {value!r}')
