"""The checkpoint to resume an interrupted run from."""

import os
import re
from typing import Dict, List, Optional, Tuple

from mmengine.runner import find_latest_checkpoint

from ..errors import CheckpointError
from .safe_load import READS_RUNNER_CHECKPOINTS, load_checkpoint_file


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
            raise CheckpointError(
                f'cannot resume from {path}: it has no {key}; to start a new '
                'run from its weights, set load_from'
            )
    meta = checkpoint.get('meta')
    numbers = tuple(
        meta.get(key) if isinstance(meta, dict) else None
        for key in ('iter', 'epoch')
    )
    if not all(type(number) is int for number in numbers):
        raise CheckpointError(
            f'cannot resume from {path}: its meta has no iter and epoch'
        )
    return numbers


def find_resumable(
    folders: List[str],
) -> Tuple[Optional[str], List[CheckpointError]]:
    """Find the newest checkpoint from which a run can be resumed.

    Files with the same name apart from the last number, such as
    ``epoch_9.pth`` and ``epoch_10.pth``, are tried from the highest number
    on until one can be used. Of the files that are found in this way, the one
    with the highest iteration is chosen. ``last_checkpoint`` is not used,
    because it may name a file that has not been written completely.

    Args:
        folders (list[str]): Folders to search, such as the work directory.

    Returns:
        tuple[str | None, list[CheckpointError]]: Path of the checkpoint, None
        if there is none; and why newer files were passed over.
    """
    if not READS_RUNNER_CHECKPOINTS:
        # Without the safe reader, files cannot be tried.
        return find_latest_checkpoint(folders[0]), []
    groups: Dict[str, List[Tuple[int, str]]] = {}
    for folder in dict.fromkeys(folders):
        if not os.path.isdir(folder):
            continue
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.endswith('.pth') and os.path.isfile(path):
                stem, number = re.fullmatch(r'(.*?)(\d*)\.pth', name).groups()
                group = os.path.join(folder, stem)
                groups.setdefault(group, []).append((int(number or 0), path))
    best: Optional[Tuple[Tuple[int, int], str]] = None
    passed: List[CheckpointError] = []
    for files in groups.values():
        for _, path in sorted(files, reverse=True):
            try:
                found = (check_resumable(path), path)
            except CheckpointError as error:
                passed.append(error)
                continue
            best = found if best is None else max(best, found)
            break
    if best is None:
        return None, passed
    # Files for other purposes, such as the best weights, are no news.
    return best[1], [e for e in passed if 'cannot resume' not in str(e)]
