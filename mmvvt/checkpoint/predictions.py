"""Safe reading of the predictions that ``tools/test.py --out`` writes."""

import io
import os
import pickle
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Tuple

import torch

from ..errors import MissingFileError, UserError
from .safe_load import (
    _empty_array,
    _empty_bytes,
    _LoadedArray,
    _safe_dtype,
    _scalar,
)


def _storage(data: bytes) -> Any:
    """Replacement for PyTorch's ``_load_from_bytes``, without its pickles."""
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


class _Function:
    """A function that a file may call, but has no attributes to modify."""

    __slots__ = ('_function',)
    _function: Callable

    def __init__(self, function: Callable):
        object.__setattr__(self, '_function', function)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError('predictions must not modify functions')

    def __call__(self, *args):
        return self._function(*args)


# What a pickle of tensors, arrays and plain containers refers to.
ALLOWED: Dict[Tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _Function(
        torch._utils._rebuild_tensor_v2
    ),
    ('torch.storage', '_load_from_bytes'): _Function(_storage),
    ('torch', 'device'): _Function(torch.device),
    ('torch.serialization', '_get_layout'): _Function(
        lambda name: torch.strided
    ),
    ('numpy', 'ndarray'): _LoadedArray,
    ('numpy', 'dtype'): _Function(_safe_dtype),
    ('_codecs', 'encode'): _Function(lambda text, coding: text.encode(coding)),
}
for module in ('__builtin__', 'builtins'):
    ALLOWED[module, 'bytes'] = _Function(_empty_bytes)
# NumPy 2 renamed these.
for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    ALLOWED[module, '_reconstruct'] = _Function(_empty_array)
    ALLOWED[module, 'scalar'] = _Function(_scalar)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(
            f'it asks for {module}.{name}, which is not allowed'
        )


def load_predictions(path: str) -> List[dict]:
    """Read predictions without executing code from the file.

    Args:
        path (str): File written by ``tools/test.py --out FILE.pkl``.

    Returns:
        list[dict]: Predictions; tensors are on the CPU.

    Raises:
        MissingFileError: If the file does not exist.
        UserError: If the file is damaged, is not a list of dicts, or refers
            to a class or function other than those of tensors and arrays.
    """
    if not os.path.isfile(path):
        raise MissingFileError(f'no such file: {path}')
    try:
        with open(path, 'rb') as file:
            predictions = _Unpickler(file).load()
    except Exception as error:  # A damaged pickle can raise any error.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f'{path} cannot be read as predictions: {lines[0]}'
        ) from error
    if not isinstance(predictions, list) or not all(
        isinstance(sample, dict) for sample in predictions
    ):
        raise UserError(
            f'{path} must contain a list of predictions, got '
            f'{type(predictions).__name__}'
        )
    return predictions
