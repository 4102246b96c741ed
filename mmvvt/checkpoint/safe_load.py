"""What ``torch.load`` may unpickle, and reading and writing of checkpoints."""

import argparse
import os
import pickle
import re
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

from ..errors import CheckpointError, UserError
from ..fileio import atomic_write

# Whether torch.load's safe default can be taught to read them.
READS_RUNNER_CHECKPOINTS = digit_version(torch.__version__) >= digit_version(
    '2.6'
)

# Stand-ins for what a runner's checkpoint asks for. Each gives plain numbers,
# and checks its arguments: a file may call them with anything. No function and
# no class leaves them, which another call in the file could be made to change.

HISTORY_METHODS = ('min', 'max', 'current', 'mean')
NUMERIC_KINDS = 'biufc'


class _LoadedHistoryBuffer(HistoryBuffer):
    """Becomes mmengine's log buffer once its numbers have been checked.

    mmengine's own would take statistics methods from the file, for all
    buffers of the process.
    """

    def __setstate__(self, state: dict) -> None:
        log, count = state.get('_log_history'), state.get('_count_history')
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
        self.__init__(log, count, state['max_length'])


def _history_method_name(owner, name):
    """For ``builtins.getattr``, by which mmengine pickles the buffer's
    statistics methods. The buffer has them already: their names will do."""
    if owner is _LoadedHistoryBuffer and name in HISTORY_METHODS:
        return name
    if owner is HistoryBuffer and name in HISTORY_METHODS:
        # Someone allow-listed mmengine's own buffer, which wants the methods.
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint; '
        f'allowed are the methods {HISTORY_METHODS} of HistoryBuffer'
    )


def _numeric_dtype(code, align=False, copy=False):
    """For ``numpy.dtype``: a number's, and never a copy, which the file could
    change after an array has taken it."""
    if isinstance(code, str):
        dtype = np.dtype(code)
        if dtype.kind in NUMERIC_KINDS:
            return dtype
    raise pickle.UnpicklingError(
        f'an array of {code!r} is not allowed in a '
        'checkpoint; allowed are numbers'
    )


def _empty_array(subtype, shape, code):
    """For NumPy's ``_reconstruct``: an array that its state will fill."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(
            f'an array of type {subtype!r} and shape {shape!r} is not allowed '
            'to begin with; allowed is an empty ndarray'
        )
    return np.empty(0, np.int8)


def _numeric_scalar(dtype, data):
    """For NumPy's ``scalar``: a number."""
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
    """Let ``torch.load`` read mmengine's checkpoints with its safe default.

    Since torch 2.6 ``torch.load`` unpickles tensors and plain containers
    alone, and refuses the log buffers in the runner's checkpoints. This
    allow-lists the buffer and the pieces of an array of numbers, each through
    a stand-in that gives nothing else. Older versions of torch read
    everything by default and are left as they are.
    """
    if not READS_RUNNER_CHECKPOINTS:
        return
    numeric_types = '?bhilqBHILQefdgFDG'
    torch.serialization.add_safe_globals(
        [
            (
                _LoadedHistoryBuffer,
                'mmengine.logging.history_buffer.HistoryBuffer',
            ),
            (_history_method_name, 'builtins.getattr'),
            (_numeric_dtype, 'numpy.dtype'),
            # In pairs with their names: mmengine may allow the same classes in
            # a safe_globals() context of torch, which on leaving removes
            # every entry of that name. The state of a dtype follows; it
            # changes nothing in NumPy's own.
            *(
                (owner, f'{owner.__module__}.{owner.__qualname__}')
                for owner in (
                    np.ndarray,
                    *{type(np.dtype(code)) for code in numeric_types},
                )
            ),
            # NumPy 2 moved these; a checkpoint may come from either side.
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
    """Read a checkpoint without executing what it does not allow-list.

    Args:
        path (str): A file written by ``torch.save``. Besides tensors and
            plain containers it may hold an ``argparse.Namespace``, as
            official training files do, and, with torch 2.6 or newer,
            mmengine's log buffers.

    Returns:
        dict: What the file holds, on the CPU.

    Raises:
        CheckpointError: If the file is absent, truncated, no checkpoint, or
            asks for any other class or function.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'no such checkpoint file: {path}')
    try:
        with _also_allow(argparse.Namespace):
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=True
            )
    except pickle.UnpicklingError as error:
        # torch wraps the reason in paragraphs of advice
        wanted = re.search(r'GLOBAL (\S+)', str(error))
        reason = re.search(r'error:\s*(.*)', str(error))
        if wanted:
            reason = f'it asks for {wanted.group(1)}, which is not allowed'
        else:
            reason = reason.group(1) if reason else str(error)
        raise CheckpointError(f'refused to load {path}: {reason}') from error
    except Exception as error:  # a damaged pickle can raise anything
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
    """Write a checkpoint completely or not at all.

    Args:
        checkpoint (dict): What to save.
        path (str): The file to write, in an existing folder.

    Raises:
        CheckpointError: If it cannot be written, with the reason.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f'no such folder to write {path} to: {folder}')
    try:
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    except RuntimeError as error:  # torch's own, for example on a full disk
        raise CheckpointError(f'cannot write {path}: {error}') from error
