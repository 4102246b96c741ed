"""The checkpoint to resume an interrupted run from."""

import os
import re
from typing import Dict, List, Optional, Tuple

from mmengine.runner import find_latest_checkpoint

from ..errors import CheckpointError
from .safe_load import READS_RUNNER_CHECKPOINTS, load_checkpoint_file


class _IncompleteError(CheckpointError):
    """A file for another purpose, such as the best weights."""


def check_resumable(path: str) -> Tuple[int, int]:
    """Check that a run can be resumed from a checkpoint.

    Args:
        path (str): Checkpoint file.

    Returns:
        tuple[int, int]: The iteration and the epoch it was saved at.

    Raises:
        CheckpointError: If the file cannot be read, or does not contain the
            weights, the state of the optimizer and the iteration.
    """
    checkpoint = load_checkpoint_file(path)
    for key in ('state_dict', 'optimizer'):
        if not isinstance(checkpoint.get(key), dict):
            raise _IncompleteError(
                f'cannot resume from {path}: it has no {key}; to start a new '
                'run from its weights, set load_from'
            )
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or not all(
        type(meta.get(key)) is int for key in ('iter', 'epoch')
    ):
        raise _IncompleteError(
            f'cannot resume from {path}: its meta has no iter and epoch'
        )
    return meta['iter'], meta['epoch']


def _named_checkpoint(folder: str) -> str:
    """Return the path in the file last_checkpoint, '' if there is none."""
    try:
        path = os.path.join(folder, 'last_checkpoint')
        with open(path, errors='replace') as file:
            named = file.read().strip()
    except OSError:
        return ''
    # The folder may have been moved since.
    moved = os.path.join(folder, os.path.basename(named))
    return moved if os.path.isfile(moved) else named


def _group_files(folders: List[str]) -> Dict[str, List[Tuple[int, str]]]:
    """Group checkpoints whose names differ in the last number only."""
    groups: Dict[str, List[Tuple[int, str]]] = {}
    for folder in dict.fromkeys(folders):
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            path = os.path.join(folder, name)
            match = re.fullmatch(r'(.*?)(\d*)\.pth', name)
            if match and os.path.isfile(path):
                group = os.path.join(folder, match[1])
                number = int(match[2] or 0)
                groups.setdefault(group, []).append((number, path))
    return groups


def find_resumable(
    folders: List[str],
) -> Tuple[Optional[str], List[CheckpointError]]:
    """Find the newest checkpoint from which a run can be resumed.

    Files with the same name apart from the last number, such as
    ``epoch_9.pth`` and ``epoch_10.pth``, are tried from the highest number
    on until one can be used. Of the files that are found in this way, the one
    with the highest iteration is chosen. If ``last_checkpoint`` names a file
    that can be used, files older than this one are passed over: they belong
    to an earlier run in the same folder.

    Args:
        folders (list[str]): Folders to search; the first one is the work
            directory.

    Returns:
        tuple[str | None, list[CheckpointError]]: Path of the checkpoint, None
        if there is none; and why newer files were passed over. A checkpoint
        with a URL, which can only be found by ``last_checkpoint``, is
        returned without reading it.
    """
    named = _named_checkpoint(folders[0])
    if not READS_RUNNER_CHECKPOINTS or '://' in named:
        return find_latest_checkpoint(folders[0]), []
    best: Optional[Tuple[Tuple[int, int], str]] = None
    oldest = 0
    passed: List[CheckpointError] = []
    if os.path.isfile(named):
        try:
            best = (check_resumable(named), named)
            oldest = os.stat(named).st_mtime_ns
        except CheckpointError as error:
            passed.append(error)
    elif named:
        passed.append(CheckpointError(f'no such checkpoint file: {named}'))
    for files in _group_files(folders).values():
        latest = {path: number for number, path in files}.get(named, 0)
        for number, path in sorted(files, reverse=True):
            if path == named:
                continue
            if os.stat(path).st_mtime_ns < oldest:
                if number > latest > 0:
                    passed.append(
                        CheckpointError(
                            f'{path} is older than {named}, which is named '
                            'by last_checkpoint'
                        )
                    )
                continue
            try:
                found = (check_resumable(path), path)
            except CheckpointError as error:
                passed.append(error)
                continue
            best = found if best is None or found[0] > best[0] else best
            break
    if best is None:
        return None, passed
    return best[1], [e for e in passed if not isinstance(e, _IncompleteError)]
