"""Errors that a user can correct."""

import re

MAX_LENGTH = 2000  # of a line of a message


def _message_of(error: Exception) -> str:
    text = str(error.args[0]) if error.args else ''
    if text.startswith('Caught '):
        # A data loader worker prepends its traceback to the message.
        text = text.rpartition(f'{type(error).__name__}: ')[2].strip()
    return text


def _one_line(text: str) -> str:
    """Escape control characters, which names in a file may contain."""
    text = re.sub(r'\s*\n\s*', ' ', text)
    text = ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode()
        for c in text
    )
    if len(text) > MAX_LENGTH:
        text = f'{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 3 :]}'
    return text


class UserError(ValueError):
    """A wrong path, file, config or argument, with a message for the user.

    The message is one line that states what is wrong, where, and which values
    are allowed. Control characters, for example of names in a damaged file,
    are escaped, and long messages are shortened. Tools print the message
    without a traceback and exit with code 1, see :func:`mmvvt.cli.run`. In
    Python, ``except UserError`` also catches all subclasses.
    """

    def __str__(self) -> str:
        return _one_line(_message_of(self))


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written, converted or loaded."""


class LabelError(UserError):
    """A label map that contains an invalid class index."""


class AnnotationError(UserError):
    """A COCO annotation file that does not match the dataset."""


class UnreadableFileError(UserError):
    """An image or annotation file that cannot be loaded."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class WriteError(UserError, OSError):
    """A file or folder that cannot be written."""


class BackendError(UserError, RuntimeError):
    """A backend that does not support this machine or these tensors."""


class PreflightError(UserError):
    """Several problems that were found before a run, one line each."""

    def __str__(self) -> str:
        return '\n'.join(map(_one_line, _message_of(self).split('\n')))
