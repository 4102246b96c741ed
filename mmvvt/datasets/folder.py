"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def written_whole(folder: str) -> Iterator[str]:
    """Write a folder under another name, and rename it at the end.

    Several processes may write the same folder at once: the first to finish
    makes it, the others' work is dropped. After an error nothing is left.

    Args:
        folder (str): Folder to make; it may be there if it is empty.

    Yields:
        str: The folder to write to, beside the one to make.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent, prefix='.writing-')
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's are private
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.isdir(folder):
                raise  # else another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
