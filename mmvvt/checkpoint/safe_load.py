"""Safe reading and atomic writing of checkpoints."""

import argparse
import os
import pickle
import re
from contextlib import contextmanager
from typing import Any, BinaryIO, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import OneCycleParamScheduler
from mmengine.utils import digit_version

from ..errors import CheckpointError, UserError
from ..fileio import atomic_write

READS_RUNNER_CHECKPOINTS = digit_version(torch.__version__) >= digit_version(
    '2.6'
)
"""Whether torch.load can read runner checkpoints with weights_only=True."""

# Replacements for the classes and functions that a runner checkpoint refers
# to. A file may call them with arbitrary arguments, so each checks its
# arguments and creates only numbers and strings. No replacement gives the file
# access to a class or a dtype, because another call in the file could modify
# it, or to a function that it could call.

HISTORY_METHODS = ('min', 'max', 'current', 'mean')
ANNEALING_METHODS = ('_annealing_cos', '_annealing_linear')
NUMERIC_KINDS = 'biufc'
TEXT_KINDS = 'SU'


class _LoadedHistoryBuffer(HistoryBuffer):
    """Replacement for mmengine's ``HistoryBuffer`` while unpickling.

    It checks the arrays of the buffer and then becomes a ``HistoryBuffer``.
    mmengine's own ``__setstate__`` would also take statistics methods from
    the file and install them for all buffers of the process.
    """

    def __setstate__(self, state: dict) -> None:
        log: Any = state.get('_log_history')
        count: Any = state.get('_count_history')
        for array in (log, count):
            if not (
                isinstance(array, np.ndarray)
                and array.ndim == 1
                and array.dtype.kind in NUMERIC_KINDS
            ):
                raise pickle.UnpicklingError(
                    'a log buffer must contain one-dimensional arrays of '
                    'numbers'
                )
        if len(log) != len(count) or type(state.get('max_length')) is not int:
            raise pickle.UnpicklingError(
                'the arrays of a log buffer must have the same length, and '
                'max_length must be an integer'
            )
        self.__class__ = HistoryBuffer
        log, count = (array.view(np.ndarray) for array in (log, count))
        HistoryBuffer.__init__(self, log, count, state['max_length'])


class _OneCycleScheduler:
    """Replacement for mmengine's ``OneCycleParamScheduler``.

    The state of a one-cycle schedule refers to one of these two functions.
    They compute a number from three numbers and have no side effects. A file
    can refer to them, but it cannot modify them.
    """

    _annealing_cos = staticmethod(OneCycleParamScheduler._annealing_cos)
    _annealing_linear = staticmethod(OneCycleParamScheduler._annealing_linear)

    def __new__(cls, *args):
        raise pickle.UnpicklingError(
            'calling OneCycleParamScheduler is not allowed in a checkpoint'
        )


def _allowed_method(owner, name):
    """Replacement for ``builtins.getattr``.

    mmengine uses it to pickle the statistics methods of a log buffer and the
    annealing function of a one-cycle schedule. A new buffer already has its
    methods, so returning their names is sufficient.
    """
    if owner is _LoadedHistoryBuffer and name in HISTORY_METHODS:
        return name
    if owner is HistoryBuffer and name in HISTORY_METHODS:
        # mmengine's own buffer was allow-listed; it needs the methods.
        return getattr(owner, name)
    if owner is _OneCycleScheduler and name in ANNEALING_METHODS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint; '
        f'allowed are the methods {HISTORY_METHODS} of HistoryBuffer and '
        f'{ANNEALING_METHODS} of OneCycleParamScheduler'
    )


def _plain_dict(items=None):
    """Replacement for mmengine's ``ConfigDict``: a plain dict."""
    if items is None:
        return {}
    if type(items) is dict:
        return dict(items)
    raise pickle.UnpicklingError('a ConfigDict must hold a dict')


def _plain_defaultdict(factory=None):
    """Replacement for ``collections.defaultdict``: a plain dict.

    The items follow in the file. The default factory is not used.
    """
    return {}


def _empty_bytes():
    """Replacement for ``bytes``, with which empty arrays are pickled."""
    return b''


def _path(*parts):
    """Replacement for ``pathlib`` paths: a string."""
    if all(type(part) is str for part in parts):
        return os.path.join('', *parts)
    raise pickle.UnpicklingError('a path must consist of strings')


class _LoadedDtype:
    """Replacement for ``numpy.dtype``: the type of numbers or strings.

    NumPy's own dtypes can be modified after an array has started to use them,
    and the array would then refer to memory that is not its own. The file
    therefore never gets access to one.

    Args:
        code (str): Type code, such as 'f8'.
        align (bool): Not used. Defaults to False.
        copy (bool): Not used. Defaults to False.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or np.dtype(code).kind not in (
            NUMERIC_KINDS + TEXT_KINDS
        ):
            raise pickle.UnpicklingError(
                f'an array of {code!r} is not allowed in a checkpoint; '
                'allowed are numbers and strings'
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ('<', '>', '|', '=') or any(state[2:5]):
            raise pickle.UnpicklingError(
                'an array with fields is not allowed in a checkpoint'
            )
        self.dtype = self.dtype.newbyteorder(state[1])


def _safe_dtype(code, align=False, copy=False):
    """Replacement for ``numpy.dtype``, see :class:`_LoadedDtype`."""
    loaded = _LoadedDtype(code)
    if np.dtype in torch.serialization.get_safe_globals():
        # Another allow-list is active, such as that of onedl-mmengine. Which
        # one torch takes a name from is undefined, and NumPy's own functions
        # require NumPy's own dtypes.
        return np.dtype(code, align, copy)
    return loaded


def _unwrap(dtype, kinds):
    """Return NumPy's dtype if it is of the given kinds."""
    if isinstance(dtype, _LoadedDtype):
        dtype = dtype.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in kinds:
        return dtype
    raise pickle.UnpicklingError(
        f'{dtype!r} is not allowed in a checkpoint; allowed are numbers and '
        'strings'
    )


class _LoadedArray(np.ndarray):
    """Replacement for ``numpy.ndarray`` that checks what it contains."""

    def __new__(cls, *args):
        raise pickle.UnpicklingError(
            'calling numpy.ndarray is not allowed in a checkpoint'
        )

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        if self.size or type(data) is not bytes:
            # Replacing the memory of an array would also affect a tensor that
            # shares this memory.
            raise pickle.UnpicklingError(
                'an array must be stored as bytes, and set only once'
            )
        dtype = _unwrap(dtype, NUMERIC_KINDS + 'U')
        super().__setstate__((version, shape, dtype, is_fortran, data))
        if dtype.kind == 'U':
            self.tolist()  # raises an error if a character is invalid

    def __reduce__(self):
        return self.view(np.ndarray).__reduce__()

    def __reduce_ex__(self, protocol):
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _empty_array(subtype, shape, code):
    """Replacement for NumPy's ``_reconstruct`` that returns an empty array."""
    if subtype not in (np.ndarray, _LoadedArray) or shape != (0,):
        raise pickle.UnpicklingError(
            f'an array of type {subtype!r} and shape {shape!r} is not allowed '
            'in a checkpoint; arrays must be created as an empty ndarray'
        )
    return np.ndarray.__new__(_LoadedArray, (0,), np.int8)


def _scalar(dtype, data):
    """Replacement for NumPy's ``scalar``: numbers, and strings as ``str``."""
    dtype = _unwrap(dtype, NUMERIC_KINDS + TEXT_KINDS)
    if type(data) is not bytes:
        raise pickle.UnpicklingError('a number must be stored as bytes')
    scalar = np.frombuffer(data, dtype, count=1)[0]
    return scalar if dtype.kind in NUMERIC_KINDS else scalar.item()


def register_safe_globals() -> None:
    """Let ``torch.load`` read runner checkpoints with ``weights_only=True``.

    Since torch 2.6, ``torch.load`` unpickles only tensors and plain
    containers by default, and rejects the log buffers in the checkpoints of
    mmengine's runner. This function allow-lists the log buffer and the parts
    of a numeric array, each with a replacement that checks its arguments.
    With older versions of torch, this function does nothing; their default
    is ``weights_only=False``.
    """
    if not READS_RUNNER_CHECKPOINTS:
        return
    dtypes = {type(np.dtype(code)) for code in '?bhilqBHILQefdgFDG'}
    torch.serialization.add_safe_globals(
        [
            (
                _LoadedHistoryBuffer,
                'mmengine.logging.history_buffer.HistoryBuffer',
            ),
            (_allowed_method, 'builtins.getattr'),
            (
                _OneCycleScheduler,
                'mmengine.optim.scheduler.param_scheduler.'
                'OneCycleParamScheduler',
            ),
            (_plain_dict, 'mmengine.config.config.ConfigDict'),
            (_plain_defaultdict, 'collections.defaultdict'),
            (_empty_bytes, 'builtins.bytes'),
            # Under its own name too: another allow-list may take that of
            # NumPy, and torch sets the state of listed classes only.
            _LoadedArray,
            (list, 'builtins.list'),
            (dict, 'builtins.dict'),
            (int, 'builtins.int'),
            (frozenset, 'builtins.frozenset'),
            # Python 3.13 has the classes in a module of their own.
            *(
                (_path, f'{module}.{name}')
                for module in ('pathlib', 'pathlib._local')
                for name in ('PosixPath', 'PurePosixPath')
            ),
            (_safe_dtype, 'numpy.dtype'),
            (_LoadedDtype, 'mmvvt.checkpoint.safe_load._LoadedDtype'),
            (_LoadedArray, 'numpy.ndarray'),
            # Needed only while another allow-list is active, see _safe_dtype.
            # NumPy's dtypes of this machine's byte order cannot be modified.
            # Each class is paired with its name, because leaving the context
            # of another allow-list removes the entries without a name.
            *(
                (owner, f'{owner.__module__}.{owner.__qualname__}')
                for owner in dtypes
            ),
            # NumPy 2 renamed these; checkpoints may use either name.
            (_empty_array, 'numpy._core.multiarray._reconstruct'),
            (_empty_array, 'numpy.core.multiarray._reconstruct'),
            (_scalar, 'numpy._core.multiarray.scalar'),
            (_scalar, 'numpy.core.multiarray.scalar'),
        ]
    )


@contextmanager
def _also_allow(*classes):
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_checkpoint_file(path: str) -> dict:
    """Read a checkpoint without executing code outside the allow-list.

    Args:
        path (str): A file written by ``torch.save``. Besides tensors and
            plain containers, it may contain an ``argparse.Namespace``, as
            official training checkpoints do, and, with torch 2.6 or newer,
            mmengine's log buffers.

    Returns:
        dict: Content of the file, with all tensors on the CPU.

    Raises:
        CheckpointError: If the file is missing, truncated or not a
            checkpoint, or refers to any other class or function.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'no such checkpoint file: {path}')
    return read_checkpoint(path, path)


def read_checkpoint(file: Union[str, BinaryIO], path: str) -> dict:
    """Read a checkpoint from a path or an open file.

    Args:
        file (str | BinaryIO): Path, or a file that can be read and searched.
        path (str): Name of the file for messages.

    Returns:
        dict: Content of the file, with all tensors on the CPU.

    Raises:
        CheckpointError: As :func:`load_checkpoint_file`.
    """
    try:
        with _also_allow(argparse.Namespace):
            checkpoint = torch.load(
                file, map_location='cpu', weights_only=True
            )
    except pickle.UnpicklingError as error:
        # Extract the reason from the long message of torch.
        wanted = re.search(r'GLOBAL (\S+)', str(error))
        detail = re.search(r'error:\s*(.*)', str(error))
        if wanted:
            reason = f'it refers to {wanted.group(1)}, which is not allowed'
        else:
            reason = detail.group(1) if detail else str(error)
        raise CheckpointError(f'refused to load {path}: {reason}') from error
    except Exception as error:  # A damaged pickle can raise any error.
        sentence = str(error).partition('. ')[0].splitlines()
        reason = sentence[0] if sentence else 'end of file'
        raise CheckpointError(
            f'{path} is truncated or not a PyTorch checkpoint ({reason})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path} contains a {type(checkpoint).__name__}, '
            'not a dict of tensors'
        )
    return checkpoint


def save_checkpoint_file(checkpoint: dict, path: str) -> None:
    """Write a checkpoint atomically: completely or not at all.

    Args:
        checkpoint (dict): Content to save.
        path (str): File to write; its folder must exist.

    Raises:
        CheckpointError: If the file cannot be written; the message gives the
            reason.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f'cannot write {path}: no such folder: {folder}')
    try:
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    except RuntimeError as error:  # Raised by torch, e.g. if the disk is full
        raise CheckpointError(f'cannot write {path}: {error}') from error
