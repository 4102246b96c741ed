"""A pipeline that names the files it cannot load."""

import os
from typing import Any, List, Optional

from mmcv.transforms import BaseTransform, LoadAnnotations
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS

from ..errors import UnreadableFileError, UserError

# Skipping ends with an error after this number of files in a row.
MAX_SKIPPED = 500


def loads_annotations(transform: Any) -> bool:
    """Whether a transform loads annotations, such as a label map."""
    return (
        isinstance(transform, LoadAnnotations)
        or 'Annotations' in type(transform).__name__
    )


def loads_files(transform: Any) -> bool:
    """Whether a transform loads an image or annotations."""
    names = [cls.__name__ for cls in type(transform).__mro__]
    return any(name.startswith('Load') for name in names)


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return 'the file is empty'
    lines = str(error).strip().splitlines()
    detail = f': {lines[0]}' if lines else ''
    return f'{type(error).__name__}{detail}'


def _add_note(error: Exception, path: Optional[str]) -> None:
    """Add the path of the image to the traceback, since Python 3.11."""
    add_note = getattr(error, 'add_note', None)
    if add_note is not None and path is not None:
        add_note(f'The image is {path}')


@TRANSFORMS.register_module()
class GuardedPipeline(BaseTransform):
    """Run the transforms of a pipeline and name files that cannot be loaded.

    Decoders raise errors that do not name the file, for example for an empty
    image or a damaged label map.

    Args:
        transforms (list): The transforms, as configs or objects.
        skip (bool): Whether to return None for a sample whose files cannot be
            loaded, so that mmengine's datasets draw another one in training.
            Defaults to False, which raises an error.
        log_file (str, optional): File to which the paths of skipped files are
            appended, one per line; it may be shared by several processes.
            Defaults to None.

    Raises:
        UnreadableFileError: Raised by :meth:`transform` if a file cannot be
            loaded, or with ``skip`` if 500 files in a row cannot. The message
            names the file and the reason.
    """

    def __init__(
        self,
        transforms: list,
        skip: bool = False,
        log_file: Optional[str] = None,
    ):
        self.transforms: List[Any] = Compose(transforms).transforms
        self.skip = skip
        self.log_file = log_file
        self._skipped_in_a_row = 0

    def transform(self, results: dict) -> Optional[dict]:
        """Run the transforms; None if one of them rejects the sample."""
        for transform in self.transforms:
            path = self._path(transform, results)
            try:
                found = transform(results)
            except UserError:
                raise
            except Exception as error:  # Decoders may raise anything.
                if path is None:
                    _add_note(error, results.get('img_path'))
                    raise  # not a loader: an error in the transform
                what = path
                if loads_annotations(transform) and path == results.get(
                    'img_path'
                ):
                    what = f'the annotations of {path}'
                message = f'{what} cannot be loaded: {_reason(path, error)}'
                if self.skip and self._skipped_in_a_row < MAX_SKIPPED:
                    self._skipped_in_a_row += 1
                    self._record(path)
                    return None
                if self.skip:
                    message += f' ({MAX_SKIPPED} files before it were skipped)'
                raise UnreadableFileError(message) from error
            if found is None:
                return None
            results = found
        self._skipped_in_a_row = 0
        return results

    @staticmethod
    def _path(transform: Any, results: dict) -> Optional[str]:
        """Path of the file that a transform loads, None if it loads none."""
        if not loads_files(transform):
            return None
        path = results.get('img_path')
        if loads_annotations(transform):
            path = results.get('seg_map_path') or path
        return path

    def _record(self, path: str) -> None:
        if self.log_file is None:
            return
        os.makedirs(os.path.dirname(self.log_file) or '.', exist_ok=True)
        # A short write in append mode is not mixed with those of others.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        handle = os.open(self.log_file, flags, 0o666)
        try:
            os.write(handle, os.fsencode(f'{path}\n'))
        finally:
            os.close(handle)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(transforms={self.transforms}, '
            f'skip={self.skip}, log_file={self.log_file!r})'
        )
