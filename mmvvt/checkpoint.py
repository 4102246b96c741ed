"""Official checkpoints to ours and back, and what torch.load may unpickle."""

import argparse
import os
import pickle
import re
import tempfile
from contextlib import contextmanager
from typing import Dict, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version
from torch import Tensor

from .arch import ARCH_SETTINGS, NUM_STAGES, resolve_arch

State = Dict[str, Tensor]

# Whether torch.load's safe default can be taught to read them.
READS_RUNNER_CHECKPOINTS = (
    digit_version(torch.__version__) >= digit_version('2.6'))

class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


# -- what torch.load may unpickle ---------------------------------------------


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
            if not (type(array) is np.ndarray and array.ndim == 1
                    and array.dtype.kind in NUMERIC_KINDS):
                raise pickle.UnpicklingError(
                    'a log buffer must hold one-dimensional arrays of numbers')
        if len(log) != len(count) or type(state.get('max_length')) is not int:
            raise pickle.UnpicklingError(
                'the parts of a log buffer do not fit each other')
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
        f'allowed are the methods {HISTORY_METHODS} of HistoryBuffer')


def _numeric_dtype(code, align=False, copy=False):
    """For ``numpy.dtype``: a number's, and never a copy, which the file could
    change after an array has taken it."""
    if isinstance(code, str):
        dtype = np.dtype(code)
        if dtype.kind in NUMERIC_KINDS:
            return dtype
    raise pickle.UnpicklingError(f'an array of {code!r} is not allowed in a '
                                 'checkpoint; allowed are numbers')


def _empty_array(subtype, shape, code):
    """For NumPy's ``_reconstruct``: an array that its state will fill."""
    if subtype is not np.ndarray or shape != (0, ):
        raise pickle.UnpicklingError(
            f'an array of type {subtype!r} and shape {shape!r} is not allowed '
            'to begin with; allowed is an empty ndarray')
    return np.empty(0, np.int8)


def _numeric_scalar(dtype, data):
    """For NumPy's ``scalar``: a number."""
    if (isinstance(dtype, np.dtype) and dtype.kind in NUMERIC_KINDS
            and isinstance(data, bytes)):
        return np.frombuffer(data, dtype, count=1)[0]
    raise pickle.UnpicklingError(f'a scalar of {dtype!r} is not allowed in a '
                                 'checkpoint; allowed are numbers')


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
    torch.serialization.add_safe_globals([
        (_LoadedHistoryBuffer,
         'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_method_name, 'builtins.getattr'),
        (_numeric_dtype, 'numpy.dtype'),
        # In pairs with their names, as leaving torch's safe_globals() takes
        # away what was named in it, and mmengine may name the same classes.
        # The state of a dtype follows; it changes nothing in NumPy's own.
        *((owner, f'{owner.__module__}.{owner.__qualname__}') for owner in
          (np.ndarray, *{type(np.dtype(code))
                         for code in numeric_types})),
        # NumPy 2 moved these; a checkpoint may come from either side.
        (_empty_array, 'numpy._core.multiarray._reconstruct'),
        (_empty_array, 'numpy.core.multiarray._reconstruct'),
        (_numeric_scalar, 'numpy._core.multiarray.scalar'),
        (_numeric_scalar, 'numpy.core.multiarray.scalar'),
    ])


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
                path, map_location='cpu', weights_only=True)
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
        raise CheckpointError(f'{path} is truncated or no PyTorch checkpoint '
                              f'({reason})') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, '
                              'not a dict of tensors')
    return checkpoint


def save_checkpoint_file(checkpoint: dict, path: str) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        checkpoint (dict): What to save.
        path (str): Where to.

    Raises:
        CheckpointError: If it cannot be written there, with the reason.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f'no such folder to write {path} to: {folder}')
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, suffix='.tmp')
    except OSError as error:
        raise CheckpointError(f'cannot write {path}: {error}') from error
    try:
        with os.fdopen(handle, 'wb') as file:
            torch.save(checkpoint, file)
        # mkstemp makes the file private; give it what open() would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, (OSError, RuntimeError)):  # torch's, disk full
            raise CheckpointError(f'cannot write {path}: {error}') from error
        raise


# -- keys and shapes ----------------------------------------------------------


def official_shapes(arch: dict,
                    num_classes: int,
                    in_channels: int = 3,
                    se_ratio: int = 1) -> Dict[str, Tuple[int, ...]]:
    """Every key of an official checkpoint with the shape of its tensor.

    Args:
        arch (dict): As :func:`mmvvt.arch.resolve_arch` returns it; the heads
            leave no trace in the tensors.
        num_classes (int): Rows of the classifier.
        in_channels (int): Channels of the image. Defaults to 3.
        se_ratio (int): Reduction in the attention's gate. Defaults to 1.

    Returns:
        dict[str, tuple[int, ...]]: Shapes by key.
    """
    shapes: Dict[str, Tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f'{name}.weight'] = weight
        shapes[f'{name}.bias'] = weight[:1]

    previous = in_channels
    for i in range(1, NUM_STAGES + 1):
        dims, depth, fr, sr, ratio = (
            arch[key][i - 1] for key in ('embed_dims', 'depths', 'fr_ratios',
                                         'sr_ratios', 'mlp_ratios'))
        kernel = 7 if i == 1 else 3
        layer(f'patch_embed{i}.proj', dims, previous, kernel, kernel)
        layer(f'patch_embed{i}.norm', dims)
        for j in range(depth):
            block = f'block{i}.{j}'
            layer(f'{block}.norm1', dims)
            for name in ('q_proj', 'k_proj', 'v_proj'):
                layer(f'{block}.attn.{name}', dims // fr, dims)
            layer(f'{block}.attn.out_proj', dims, dims // fr)
            hidden = dims // se_ratio
            shapes[f'{block}.attn.se_fc.0.weight'] = (hidden, dims)
            shapes[f'{block}.attn.se_fc.2.weight'] = (dims, hidden)
            if sr > 1:
                layer(f'{block}.attn.sr', dims, dims, sr, sr)
                layer(f'{block}.attn.norm', dims)
            layer(f'{block}.norm2', dims)
            layer(f'{block}.mlp.fc1', dims * ratio, dims)
            layer(f'{block}.mlp.dwconv.dwconv', dims * ratio, 1, 3, 3)
            layer(f'{block}.mlp.fc2', dims, dims * ratio)
        layer(f'norm{i}', dims)
        previous = dims
    layer('head', num_classes, previous)
    return shapes


def _size(state: State, key: str, axis: int) -> int:
    """Length of a tensor that must be there, 1 at least."""
    if key not in state:
        raise CheckpointError(f'no VVT classifier: there is no {key}')
    tensor = state[key]
    if not isinstance(tensor, Tensor) or tensor.dim() <= axis:
        raise CheckpointError(f'no VVT classifier: {key} is no weight of a '
                              'layer')
    return max(tensor.shape[axis], 1)


def infer_arch(state: State) -> dict:
    """Tell the architecture from the tensors of an official checkpoint.

    Args:
        state (dict[str, Tensor]): Official keys, without ``module.``.

    Returns:
        dict: ``embed_dims``, ``mlp_ratios``, ``depths``, ``fr_ratios`` and
        ``sr_ratios``, each a list of four integers. The number of heads
        leaves no trace in the tensors.

    Raises:
        CheckpointError: If the tensors that tell it are not there.
    """

    arch: dict = {
        key: []
        for key in ('embed_dims', 'mlp_ratios', 'depths', 'fr_ratios',
                    'sr_ratios')
    }
    for i in range(1, NUM_STAGES + 1):
        dims = _size(state, f'patch_embed{i}.proj.weight', 0)
        first = f'block{i}.0'
        arch['embed_dims'].append(dims)
        arch['mlp_ratios'].append(
            _size(state, f'{first}.mlp.fc1.weight', 0) // dims)
        arch['fr_ratios'].append(
            dims // _size(state, f'{first}.attn.q_proj.weight', 0))
        sr_key = f'{first}.attn.sr.weight'
        arch['sr_ratios'].append(
            _size(state, sr_key, 2) if sr_key in state else 1)
        pattern = re.compile(rf'block{i}\.(\d+)\.')
        found = [int(m.group(1)) for m in map(pattern.match, state) if m]
        arch['depths'].append(max(found) + 1)
    return arch


def _name_arch(arch: dict) -> str:
    """Name of a published architecture.

    Raises:
        CheckpointError: If it is none of them.
    """
    for name in ARCH_SETTINGS:
        published = resolve_arch(name)
        if all(published[key] == value for key, value in arch.items()):
            return name
    found = ', '.join(f'{key} {value}' for key, value in arch.items())
    depths = {name: s['depths'] for name, s in ARCH_SETTINGS.items()}
    raise CheckpointError(
        f'the tensors are of no published architecture: {found}; the depths '
        f'of the published ones are {depths}. The file is truncated, or of '
        'an architecture of its own, which must be given')


def _check_tensors(state: State, arch: Optional[Union[str, dict]]) -> str:
    """Hold the tensors against an architecture, every key and shape.

    Returns:
        str: Name of the architecture, 'custom' for one given as a dict.

    Raises:
        CheckpointError: At the first kind of difference found.
    """
    found = infer_arch(state)
    if arch is None:
        name = _name_arch(found)
        expected_arch = resolve_arch(name)
    else:
        name = arch if isinstance(arch, str) else 'custom'
        expected_arch = resolve_arch(arch)
        wrong = [
            f'{key} {found[key]} instead of {expected_arch[key]}'
            for key in found if found[key] != expected_arch[key]
        ]
        if wrong:
            raise CheckpointError(f'the tensors are not of arch {name}: '
                                  f'{"; ".join(wrong)}')
    se_ratio = 1
    if isinstance(arch, dict):  # published models have no other
        gate = _size(state, 'block1.0.attn.se_fc.0.weight', 0)
        se_ratio = max(expected_arch['embed_dims'][0] // gate, 1)
    expected = official_shapes(
        expected_arch,
        num_classes=_size(state, 'head.weight', 0),
        in_channels=_size(state, 'patch_embed1.proj.weight', 1),
        se_ratio=se_ratio)

    def listing(keys) -> str:
        keys = sorted(keys)
        more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
        return ', '.join(keys[:3]) + more

    missing = set(expected) - set(state)
    unknown = set(state) - set(expected)
    if missing or unknown:
        parts = [f'missing {listing(missing)}'] if missing else []
        parts += [f'unknown {listing(unknown)}'] if unknown else []
        raise CheckpointError(f'the keys do not fit arch {name}: '
                              f'{"; ".join(parts)}')
    for key, shape in expected.items():
        tensor = state[key]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f'{key} is no floating-point tensor')
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f'{key} has shape {tuple(tensor.shape)}, '
                                  f'arch {name} needs {shape}')
    return name


def _tensors_of(checkpoint: dict, entry: str) -> State:
    """The state dict in a checkpoint: under ``entry``, or the file itself."""
    state = checkpoint.get(entry, checkpoint)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f'{entry!r} holds no tensors')
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError('the keys of the tensors are no strings')
    if all(key.startswith('module.') for key in state):
        state = {key[len('module.'):]: t for key, t in state.items()}
    return state


def convert_official(state_or_checkpoint: dict,
                     arch: Optional[Union[str, dict]] = None) -> dict:
    """Turn an official checkpoint into one of an mmpretrain classifier.

    Args:
        state_or_checkpoint (dict): An official state dict, or a training
            checkpoint with one under 'model'. Keys may start with
            ``module.``.
        arch (str | dict, optional): The architecture that the tensors must
            be of, see :func:`mmvvt.arch.resolve_arch`. Defaults to None: it
            is told from the tensors and must be a published one.

    Returns:
        dict: ``state_dict`` with ``backbone.*`` and ``head.fc.*``, and
        ``meta`` with the name of the architecture. It holds the tensors
        given, not copies.

    Raises:
        CheckpointError: If it is truncated, foreign or of another
            architecture, with the difference found.
        ValueError: If ``arch`` is not what is allowed.
    """
    state = _tensors_of(state_or_checkpoint, 'model')
    name = _check_tensors(state, arch)
    converted = {}
    for key, tensor in state.items():
        head = key.startswith('head.')
        converted[f'head.fc.{key[5:]}' if head else f'backbone.{key}'] = tensor
    return dict(state_dict=converted, meta=dict(arch=name))


def convert_to_official(checkpoint: dict,
                        arch: Optional[Union[str, dict]] = None) -> dict:
    """Turn a classifier's checkpoint into an official one.

    Args:
        checkpoint (dict): One that :func:`convert_official` or the runner
            made.
        arch (str | dict, optional): As for :func:`convert_official`.

    Returns:
        dict: ``model`` with the official state dict.

    Raises:
        CheckpointError: If it is not a VVT classifier's.
        ValueError: If ``arch`` is not what is allowed.
    """
    state = _tensors_of(checkpoint, 'state_dict')
    official = {}
    for key, tensor in state.items():
        if key.startswith('backbone.'):
            official[key[len('backbone.'):]] = tensor
        elif key.startswith('head.fc.'):
            official[f'head.{key[len("head.fc."):]}'] = tensor
        else:
            raise CheckpointError(f'{key} belongs to no VVT classifier; its '
                                  'keys are backbone.* and head.fc.*')
    _check_tensors(official, arch)
    return dict(model=official)
