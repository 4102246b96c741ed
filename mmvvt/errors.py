"""Errors that a user can correct."""


class UserError(ValueError):
    """A wrong path, file, config or argument, with a message for the user.

    The message is one line: what is wrong, where, and what is allowed. Tools
    print it without a traceback and exit with code 1, see
    :func:`mmvvt.cli.run`. In Python, ``except UserError`` catches it and all
    of its subclasses.
    """


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written, converted or loaded."""


class LabelError(UserError):
    """A label map with a value that is not a class."""


class AnnotationError(UserError):
    """A COCO annotation file that does not fit the data set."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class WriteError(UserError, OSError):
    """A file or folder that cannot be written."""


class BackendError(UserError, RuntimeError):
    """A backend that cannot run on this machine or on these tensors."""
