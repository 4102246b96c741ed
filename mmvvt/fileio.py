"""Atomic writing of files and folders."""

import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence

from .errors import WriteError


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


# Temporary files of a write that was interrupted start with this.
TEMPORARY_PREFIX = '.writing-'
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(
    path: str, is_dir: bool = False, size: Optional[int] = None
) -> Iterator[str]:
    """Write a file or a folder under a temporary name, then rename it.

    The parent folder is created if it does not exist. If the block raises,
    the temporary path is removed and an existing file is not changed. Several
    processes may write the same folder at the same time: the first process to
    finish creates it, and the results of the others are discarded.

    Args:
        path (str): The file or folder to write. An existing file is
            replaced; an existing folder must be empty.
        is_dir (bool): Whether to write a folder. Defaults to False.
        size (int, optional): Number of bytes that will be written, for the
            message if the disk is full. Defaults to None.

    Yields:
        str: Temporary path, next to ``path``, to write to. It exists and is
        empty.

    Raises:
        WriteError: If the path cannot be written, for example because the
            disk is full. It names the path and the reason.
    """
    temporary = None
    fault: Optional[OSError] = None
    try:
        parent = os.path.dirname(os.path.abspath(path))
        os.makedirs(parent, exist_ok=True)
        if is_dir:
            temporary = tempfile.mkdtemp(dir=parent, prefix=TEMPORARY_PREFIX)
        else:
            handle, temporary = tempfile.mkstemp(
                dir=parent, prefix=TEMPORARY_PREFIX
            )
            os.close(handle)
        yield temporary
        # mkdtemp and mkstemp create private files: use the default mode.
        os.chmod(temporary, (0o777 if is_dir else 0o666) & ~_umask())
        _rename(temporary, path, is_dir)
    except OSError as error:
        fault = error
    finally:
        if temporary is not None:
            _remove(temporary)
    if fault is not None:
        raise WriteError(_explain(fault, path, size)) from fault


def check_writable(path: str) -> None:
    """Check that a file can be written, before a long computation.

    The parent folder is created if it does not exist. An existing file is
    not changed.

    Args:
        path (str): Path of the file.

    Raises:
        WriteError: If the path is a folder, or if no file can be created in
            its parent folder. It names the path and the reason.
    """
    if os.path.isdir(path):
        raise WriteError(f'cannot write {path}: it is a folder')
    parent = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent, prefix=TEMPORARY_PREFIX):
            pass
    except OSError as error:
        raise WriteError(_explain(error, path, None)) from error


@contextmanager
def atomic_group(
    path: str, companions: Sequence[str] = (), size: Optional[int] = None
) -> Iterator[str]:
    """Write a file and its companions in a temporary folder, then rename.

    If the block raises, the temporary folder is removed and existing files
    are not changed. The companions are renamed before the file.

    Args:
        path (str): The file to write, in an existing folder.
        companions (Sequence[str]): Suffixes of further files, which replace
            the suffix of ``path``. Defaults to none.
        size (int, optional): Number of bytes that will be written, for the
            message if the disk is full. Defaults to None.

    Yields:
        str: Path in the temporary folder to write to, with the name of
        ``path``.

    Raises:
        WriteError: If the files cannot be written, for example because the
            disk is full. It names the path and the reason.
    """
    parent = os.path.dirname(os.path.abspath(path))
    stem = os.path.splitext(path)[0]
    try:
        with tempfile.TemporaryDirectory(
            dir=parent, prefix=TEMPORARY_PREFIX, ignore_cleanup_errors=True
        ) as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            yield temporary
            for suffix in companions:
                source = os.path.splitext(temporary)[0] + suffix
                _rename(source, stem + suffix, is_dir=False)
            _rename(temporary, path, is_dir=False)
    except OSError as error:
        raise WriteError(_explain(error, path, size)) from error


def _explain(error: OSError, path: str, size: Optional[int]) -> str:
    reason = f'cannot write {path}: {error.strerror or error}'
    if error.errno not in DISK_FULL or size is None:
        return reason
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    return f'{reason}; {size:,} bytes are needed and {free:,} are free'


def _rename(temporary: str, path: str, is_dir: bool) -> None:
    if not is_dir:
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path)
        return
    try:
        os.rename(temporary, path)
    except OSError:
        if not os.path.isdir(path) or not os.listdir(path):
            raise
        # Another process has already written the folder.


def _sync_folder(path: str) -> None:
    """Write the new name to the disk, so that it survives a power failure."""
    try:
        handle = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    except OSError:
        return  # a folder that can be written but not read
    try:
        os.fsync(handle)
    except OSError:
        pass  # Some file systems cannot sync folders.
    finally:
        os.close(handle)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.unlink(path)


def write_json(path: str, content: dict) -> None:
    """Write a JSON file atomically.

    Args:
        path (str): Path of the file to write.
        content (dict): Content that can be serialized as JSON.

    Raises:
        ValueError: If a number is not finite.
        TypeError: If an object cannot be serialized.
        WriteError: If the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    with atomic_write(path) as temporary:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
