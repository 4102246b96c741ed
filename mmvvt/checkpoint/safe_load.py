"""Safe reading and atomic writing of checkpoints."""

import argparse
import os
import pickle
import re
from contextlib import contextmanager
from typing import Any, BinaryIO, List, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import OneCycleParamScheduler
from mmengine.utils import digit_version

from ..errors import CheckpointError, UserError
from ..fileio import atomic_write

# Whether torch.load can read runner checkpoints with weights_only=True.
READS_RUNNER_CHECKPOINTS = digit_version(torch.__version__) >= digit_version(
    '2.6'
)

# Replacements for the classes and functions that a runner checkpoint refers
# to. A file may call them with arbitrary arguments, so each checks its
# arguments and creates only numeric data. No replacement gives the file access
# to functions or classes, because another call in the file could modify them.

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
                type(array) is np.ndarray
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
        HistoryBuffer.__init__(self, log, count, state['max_length'])


def _one_cycle_scheduler(*args):
    """Replacement for mmengine's ``OneCycleParamScheduler``.

    Its state names one of its two annealing functions. The class itself is
    not needed, and calling it is refused.
    """
    raise pickle.UnpicklingError(
        'OneCycleParamScheduler is not allowed to be called in a checkpoint'
    )


def _allowed_method(owner, name):
    """Replacement for ``builtins.getattr``.

    mmengine uses it to pickle the statistics methods of a log buffer and the
    annealing function of a one-cycle schedule. A new buffer already has its
    methods, so returning their names is sufficient. An annealing function
    computes a number from three numbers; the file can refer to it but, like
    any function outside of the allow-list, not call it.
    """
    if owner is _LoadedHistoryBuffer and name in HISTORY_METHODS:
        return name
    if owner is HistoryBuffer and name in HISTORY_METHODS:
        # mmengine's own buffer was allow-listed; it needs the methods.
        return getattr(owner, name)
    if owner is _one_cycle_scheduler and name in ANNEALING_METHODS:
        return getattr(OneCycleParamScheduler, name)
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


def _path(*parts):
    """Replacement for ``pathlib`` paths: a string."""
    if all(type(part) is str for part in parts):
        return os.path.join('', *parts)
    raise pickle.UnpicklingError('a path must consist of strings')


class _TextDtype:
    """Replacement for a NumPy string dtype, to read single strings.

    The size of a string dtype can be changed after an array has started to
    use it, so the file never gets access to one. Arrays of strings are
    therefore refused.
    """

    def __init__(self, code):
        self.code, self.order = code, '='

    def __setstate__(self, state):
        if type(state) is tuple and len(state) > 1 and state[1] in '<>|':
            self.order = state[1]

    def read(self, data: bytes):
        dtype = np.dtype(self.code).newbyteorder(self.order)
        return np.frombuffer(data, dtype, count=1)[0].item()


def _safe_dtype(code, align=False, copy=False):
    """Replacement for ``numpy.dtype``: numeric types, and single strings.

    It never returns a copy, because the file could modify the copy after an
    array has started to use it.
    """
    if isinstance(code, str):
        dtype = np.dtype(code)
        if dtype.kind in NUMERIC_KINDS:
            return dtype
        if dtype.kind in TEXT_KINDS:
            return _TextDtype(code)
    raise pickle.UnpicklingError(
        f'an array of {code!r} is not allowed in a '
        'checkpoint; allowed are numbers'
    )


def _empty_array(subtype, shape, code):
    """Replacement for NumPy's ``_reconstruct`` that returns an empty array."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(
            f'an array of type {subtype!r} and shape {shape!r} is not allowed '
            'in a checkpoint; arrays must be created as an empty ndarray'
        )
    return np.empty(0, np.int8)


def _scalar(dtype, data):
    """Replacement for NumPy's ``scalar``: numbers, and strings as ``str``."""
    if type(dtype) is _TextDtype and isinstance(data, bytes):
        return dtype.read(data)
    if (
        isinstance(dtype, np.dtype)
        and dtype.kind in NUMERIC_KINDS
        and isinstance(data, bytes)
    ):
        return np.frombuffer(data, dtype, count=1)[0]
    raise pickle.UnpicklingError(
        f'a scalar of {dtype!r} is not allowed in a '
        'checkpoint; allowed are numbers and strings'
    )


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
    numeric_types = '?bhilqBHILQefdgFDG'
    classes: List[type] = [np.ndarray]
    classes += {type(np.dtype(code)) for code in numeric_types}
    torch.serialization.add_safe_globals(
        [
            (
                _LoadedHistoryBuffer,
                'mmengine.logging.history_buffer.HistoryBuffer',
            ),
            (_allowed_method, 'builtins.getattr'),
            (
                _one_cycle_scheduler,
                'mmengine.optim.scheduler.param_scheduler.'
                'OneCycleParamScheduler',
            ),
            (_plain_dict, 'mmengine.config.config.ConfigDict'),
            (_plain_defaultdict, 'collections.defaultdict'),
            (list, 'builtins.list'),
            (dict, 'builtins.dict'),
            (int, 'builtins.int'),
            (frozenset, 'builtins.frozenset'),
            (_path, 'pathlib.PosixPath'),
            (_path, 'pathlib.PurePosixPath'),
            (_safe_dtype, 'numpy.dtype'),
            (_TextDtype, 'mmvvt.checkpoint.safe_load._TextDtype'),
            # Each class is paired with its name: mmengine may allow the same
            # classes in a safe_globals() context of torch, and leaving the
            # context removes the unpaired entries. A pickled dtype also sets
            # its state; this does not modify NumPy's built-in dtypes.
            *(
                (owner, f'{owner.__module__}.{owner.__qualname__}')
                for owner in classes
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
        reason = str(error).splitlines()[0] if str(error) else 'end of file'
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
