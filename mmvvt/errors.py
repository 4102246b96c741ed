"""Errors that a user can correct."""


class UserError(ValueError):
    """A wrong path, file, config or argument, with a message for the user.

    The message is one line that states what is wrong, where, and which values
    are allowed. Tools print it without a traceback and exit with code 1, see
    :func:`mmvvt.cli.run`. In Python, ``except UserError`` also catches all
    subclasses.
    """


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
