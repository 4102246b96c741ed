"""Safe reading and atomic writing of checkpoints."""

import argparse
import os
import pickle
import re
from contextlib import contextmanager
from typing import Any, List

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
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
NUMERIC_KINDS = 'biufc'


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
                    'a log buffer must hold one-dimensional arrays of numbers'
                )
        if len(log) != len(count) or type(state.get('max_length')) is not int:
            raise pickle.UnpicklingError(
                'the parts of a log buffer do not fit each other'
            )
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(self, log, count, state['max_length'])


def _history_method_name(owner, name):
    """Replacement for ``builtins.getattr``.

    mmengine uses it to pickle the statistics methods of a log buffer. A new
    buffer already has these methods, so returning their names is sufficient.
    """
    if owner is _LoadedHistoryBuffer and name in HISTORY_METHODS:
        return name
    if owner is HistoryBuffer and name in HISTORY_METHODS:
        # mmengine's own buffer was allow-listed; it needs the methods.
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint; '
        f'allowed are the methods {HISTORY_METHODS} of HistoryBuffer'
    )


def _numeric_dtype(code, align=False, copy=False):
    """Replacement for ``numpy.dtype`` that allows only numeric types.

    It never returns a copy, because the file could modify the copy after an
    array has started to use it.
    """
    if isinstance(code, str):
        dtype = np.dtype(code)
        if dtype.kind in NUMERIC_KINDS:
            return dtype
    raise pickle.UnpicklingError(
        f'an array of {code!r} is not allowed in a '
        'checkpoint; allowed are numbers'
    )


def _empty_array(subtype, shape, code):
    """Replacement for NumPy's ``_reconstruct`` that returns an empty array."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(
            f'an array of type {subtype!r} and shape {shape!r} is not allowed '
            'to begin with; allowed is an empty ndarray'
        )
    return np.empty(0, np.int8)


def _numeric_scalar(dtype, data):
    """Replacement for NumPy's ``scalar`` that allows only numbers."""
    if (
        isinstance(dtype, np.dtype)
        and dtype.kind in NUMERIC_KINDS
        and isinstance(data, bytes)
    ):
        return np.frombuffer(data, dtype, count=1)[0]
    raise pickle.UnpicklingError(
        f'a scalar of {dtype!r} is not allowed in a '
        'checkpoint; allowed are numbers'
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
            (_history_method_name, 'builtins.getattr'),
            (_numeric_dtype, 'numpy.dtype'),
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
            (_numeric_scalar, 'numpy._core.multiarray.scalar'),
            (_numeric_scalar, 'numpy.core.multiarray.scalar'),
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
    try:
        with _also_allow(argparse.Namespace):
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=True
            )
    except pickle.UnpicklingError as error:
        # Extract the reason from the long message of torch.
        wanted = re.search(r'GLOBAL (\S+)', str(error))
        detail = re.search(r'error:\s*(.*)', str(error))
        if wanted:
            reason = f'it asks for {wanted.group(1)}, which is not allowed'
        else:
            reason = detail.group(1) if detail else str(error)
        raise CheckpointError(f'refused to load {path}: {reason}') from error
    except Exception as error:  # A damaged pickle can raise any error.
        reason = str(error).splitlines()[0] if str(error) else 'end of file'
        raise CheckpointError(
            f'{path} is truncated or no PyTorch checkpoint ({reason})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path} holds a {type(checkpoint).__name__}, '
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
        raise CheckpointError(f'no such folder to write {path} to: {folder}')
    try:
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    except RuntimeError as error:  # Raised by torch, e.g. if the disk is full
        raise CheckpointError(f'cannot write {path}: {error}') from error
