"""Compile the kernels for this processor and load them.

The kernels are compiled the first time that a block runs in strips, which
takes a few seconds, and kept in the cache folder of the user. Without GCC, or
if compiling fails, the strips use PyTorch operations.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import List, Optional, Tuple

import torch

from ..processor import processor_field

SOURCE = Path(__file__).with_name('kernels.cpp')
FLAGS = (
    '-std=c++17',
    '-O3',
    '-march=native',
    '-ffp-contract=fast',
    '-fno-math-errno',
    '-fno-trapping-math',
    '-fopenmp',
    '-fPIC',
)
# Set it to 0 to use PyTorch operations only.
SWITCH = 'MMVVT_NATIVE'
TIMEOUT = 120  # seconds

_lock = threading.Lock()
_loaded: Optional[Tuple[Optional[ctypes.CDLL], str]] = None


class NativeError(RuntimeError):
    """The kernels cannot be compiled or loaded."""


def _openmp_runtime() -> str:
    """Path of the OpenMP library that PyTorch uses.

    A second OpenMP library would start threads of its own, and the threads of
    the two would wait for each other.
    """
    try:
        maps = Path('/proc/self/maps').read_text()
    except OSError as error:
        raise NativeError('the kernels require Linux') from error
    paths = {
        line.split(maxsplit=5)[5]
        for line in maps.splitlines()
        if '/libgomp' in line
    }
    # Other packages, such as scikit-learn, contain a libgomp of their own.
    of_torch = str(Path(torch.__file__).parent)
    found = {path for path in paths if path.startswith(of_torch)} or paths
    if len(found) != 1:
        raise NativeError(
            'PyTorch must use one libgomp, found '
            + (', '.join(sorted(found)) or 'none')
        )
    return found.pop()


def _compiler() -> List[str]:
    setting = os.environ.get('CXX', '').strip() or 'g++'
    try:
        command = shlex.split(setting)
    except ValueError as error:
        raise NativeError(f'CXX is {setting!r}: {error}') from error
    if not command or shutil.which(command[0]) is None:
        raise NativeError(f'{setting} was not found')
    return command


def _run(command: List[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f'{command[0]} did not run: {error}') from error
    if done.returncode != 0:
        raise NativeError(
            f'{shlex.join(command)} failed: {done.stderr.strip()[:2000]}'
        )
    return done.stdout


def _cache_folder() -> Path:
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if not os.path.isabs(base):
        raise FileNotFoundError(f'there is no folder {base}')
    return Path(base, 'mmvvt', 'native')


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_intact(path: Path) -> bool:
    """Whether only this user can have written a file, and it is complete.

    Loading an incomplete library ends the process. The file ends with the
    digest of what precedes it, which the linker does not read.
    """
    if not path.exists():
        return False
    status = path.stat()
    content = path.read_bytes()
    return (
        status.st_uid == os.getuid()
        and not status.st_mode & 0o022
        and content[-32:] == _digest(content[:-32])
    )


def _build(target: Path, compiler: List[str], openmp: str) -> None:
    """Compile to a temporary file first: other processes may do the same."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix='.so')
    os.close(handle)
    try:
        _run([*compiler, *FLAGS, '-c', str(SOURCE), '-o', name + '.o'])
        # libgomp by its path: -fopenmp would link the library of GCC.
        _run([*compiler, '-shared', name + '.o', openmp, '-o', name])
        with open(name, 'ab') as file:
            file.write(_digest(Path(name).read_bytes()))
        os.chmod(name, 0o700)
        os.replace(name, target)
    finally:
        for path in (name, name + '.o'):
            if os.path.exists(path):
                os.remove(path)


def _sources() -> List[Path]:
    """The source and the headers that it includes."""
    return [SOURCE, *sorted(SOURCE.parent.glob('*.h'))]


def _compile() -> ctypes.CDLL:
    compiler, openmp = _compiler(), _openmp_runtime()
    version = _run([*compiler, '--version'])
    key = '\n'.join(
        [
            *(path.read_text(encoding='utf-8') for path in _sources()),
            *compiler,
            *FLAGS,
            version,
            openmp,
            platform.machine(),
            # Instruction sets: the cache may be on a shared disk.
            processor_field('flags', 'Features'),
        ]
    )
    name = f'kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so'
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = folder / name
        if not _is_intact(target):
            _build(target, compiler, openmp)
        return ctypes.CDLL(str(target))
    except OSError:
        # The folder is read-only or full, or the file is damaged.
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary, name)
            _build(target, compiler, openmp)
            try:
                return ctypes.CDLL(str(target))
            except OSError as error:
                raise NativeError(
                    f'{name} cannot be loaded: {error}'
                ) from error


def _renew_lock() -> None:
    """Another thread of the parent may have held the lock at a fork."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_renew_lock)


def load() -> Tuple[Optional[ctypes.CDLL], str]:
    """Load the compiled kernels; compile them if necessary.

    Set the environment variable ``MMVVT_NATIVE=0`` to use PyTorch operations
    only. ``CXX`` is the compiler, which must be GCC 9 or later; 'g++' by
    default.

    Returns:
        tuple[CDLL or None, str]: The library and '', or None and the reason.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            logger = logging.getLogger('mmvvt')
            try:
                if os.environ.get(SWITCH) == '0':
                    raise NativeError(f'{SWITCH} is 0')
                _loaded = _compile(), ''
            except (NativeError, OSError) as error:
                _loaded = None, str(error)
                logger.info('strips use PyTorch operations: %s', error)
        return _loaded
