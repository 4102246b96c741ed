"""Checkpoints that survive a run that is killed while it saves."""

import datetime
import io
import os
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import apply_to

from ..checkpoint import READS_RUNNER_CHECKPOINTS, read_checkpoint
from ..errors import CheckpointError
from ..fileio import TEMPORARY_PREFIX, atomic_write


@register_backend('mmvvt.atomic')
class AtomicBackend(LocalBackend):
    """Local file backend that writes a file completely or not at all.

    It can hold back the removal of files until new ones have been written.
    """

    def __init__(self) -> None:
        self._held: Optional[List[Tuple[Callable, str]]] = None

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file under a temporary name, then rename it.

        Args:
            obj (bytes): Content of the file.
            filepath (str | Path): File to write.

        Raises:
            WriteError: If the file cannot be written, for example because
                the disk is full.
        """
        with atomic_write(str(filepath), size=len(obj)) as temporary:
            with open(temporary, 'wb') as file:
                file.write(obj)

    def _remove(self, function: Callable, path: str) -> None:
        if self._held is None:
            function(path)
        else:
            self._held.append((function, path))

    def remove(self, filepath: Union[str, Path]) -> None:
        """Remove a file, or remember it while removals are held back."""
        self._remove(super().remove, str(filepath))

    def rmtree(self, dir_path: Union[str, Path]) -> None:
        """Remove a folder, or remember it while removals are held back."""
        self._remove(super().rmtree, str(dir_path))

    @contextmanager
    def hold_removals(self) -> Iterator[List[Tuple[Callable, str]]]:
        """Collect removals, as functions and their paths."""
        self._held = []
        try:
            yield self._held
        finally:
            self._held = None


@register_backend('mmvvt.check')
class CheckBackend(LocalBackend):
    """File backend that reads checkpoints back instead of storing them."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Read a checkpoint with the safe reader.

        Raises:
            CheckpointError: If the reader refuses it.
        """
        read_checkpoint(io.BytesIO(obj), str(filepath))


def to_plain(node: Any) -> Any:
    """Convert metadata to types that every reader of checkpoints accepts.

    Args:
        node (Any): Nested metadata.

    Returns:
        Any: The same with plain dicts, lists, strings and numbers in place of
        config dicts, NumPy strings, arrays of strings, paths and dates. Other
        objects are not changed.
    """
    if isinstance(node, dict):
        return {to_plain(key): to_plain(value) for key, value in node.items()}
    if type(node) in (list, tuple, set):
        return type(node)(to_plain(child) for child in node)
    if isinstance(node, np.ndarray) and node.dtype.kind not in 'biufc':
        return to_plain(node.tolist())
    if isinstance(node, (str, PurePath)):
        return str(node)
    if isinstance(node, (np.bytes_, np.datetime64)):
        return node.item()
    if isinstance(node, (datetime.date, datetime.time)):
        return node.isoformat()
    if isinstance(node, range):
        return list(node)
    return node


def _without_data(node: Any) -> Any:
    """Replace all tensors of a checkpoint by the same empty tensor."""
    empty = torch.empty(0)
    return apply_to(
        node, lambda child: type(child) is torch.Tensor, lambda child: empty
    )


def _is_readable(node: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(dict(node=node), buffer)
        buffer.seek(0)
        read_checkpoint(buffer, '')
    except Exception:  # An object may refuse to be pickled with any error.
        return False
    return True


def _find_unreadable(node: Any, where: str) -> str:
    """Name the innermost part of a checkpoint that cannot be read back."""
    if isinstance(node, dict):
        prefix = where and f'{where}.'
        children = [(f'{prefix}{key}', child) for key, child in node.items()]
    elif isinstance(node, (list, tuple)):
        children = [(f'{where}[{i}]', child) for i, child in enumerate(node)]
    else:
        children = []
    for name, child in children:
        if not _is_readable(child):
            return _find_unreadable(child, name)
    kind = type(node)
    name = f'{kind.__module__}.{kind.__qualname__}'
    return f'{where or "the checkpoint"} is a {name}'


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` with atomic writing and a self-check.

    A checkpoint is written under a temporary name, flushed to the disk and
    renamed. Only then are older checkpoints removed, so that a run which is
    killed at any moment leaves at least one complete checkpoint. This needs
    space for one more checkpoint than ``max_keep_ckpts``. Other file backends
    than the local one work as in mmengine.

    Before training, the state of the run, without the data of its tensors, is
    written to memory and read back as ``--resume`` and ``tools/test.py`` will
    do.

    The arguments are those of mmengine's ``CheckpointHook``.
    """

    _is_checking = False
    _checked: Optional[dict] = None
    backend_args: Optional[dict]

    def before_train(self, runner) -> None:
        """Select the file backend and check that the state can be read.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            CheckpointError: If the state of the run contains an object that
                the safe reader refuses.
        """
        if self.file_client_args is None:
            folder = self.out_dir or runner.work_dir
            backend = get_file_backend(folder, backend_args=self.backend_args)
            if type(backend) is LocalBackend:
                self.backend_args = dict(backend='mmvvt.atomic')
        super().before_train(runner)
        if isinstance(self.file_backend, AtomicBackend) and is_main_process():
            self._remove_temporary_files()
        if READS_RUNNER_CHECKPOINTS and isinstance(runner, Runner):
            self._check_state(runner)

    def _remove_temporary_files(self) -> None:
        """Remove what a run left that was killed while it saved."""
        if not os.path.isdir(self.out_dir):
            return
        for entry in os.scandir(self.out_dir):
            if entry.name.startswith(TEMPORARY_PREFIX) and entry.is_file():
                os.unlink(entry.path)

    def _check_state(self, runner) -> None:
        self._is_checking = True
        try:
            runner.save_checkpoint(
                self.out_dir,
                'state of the run',
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler
                and runner.param_schedulers is not None,
                by_epoch=self.by_epoch,
                backend_args=dict(backend='mmvvt.check'),
            )
        except Exception as error:
            # CheckpointError of the reader, or any error of torch.save
            if self._checked is None:
                raise
            found = _find_unreadable(self._checked, '')
            raise CheckpointError(
                f'{found}, which cannot be loaded from a checkpoint: use '
                'plain numbers, strings, tensors, lists and dicts'
            ) from error
        finally:
            self._is_checking, self._checked = False, None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Convert the metadata to plain types.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): Checkpoint to be saved; modified in place.
        """
        checkpoint['meta'] = to_plain(checkpoint['meta'])
        hub = checkpoint.get('message_hub')
        if isinstance(hub, dict) and 'runtime_info' in hub:
            hub['runtime_info'] = to_plain(hub['runtime_info'])
        if self._is_checking:
            self._checked = checkpoint
            checkpoint.update(_without_data(checkpoint))

    @contextmanager
    def _removals_last(self) -> Iterator[None]:
        backend = self.file_backend
        if not isinstance(backend, AtomicBackend):
            yield
            return
        with backend.hold_removals() as removals:
            yield
        best = getattr(self, 'best_ckpt_path_dict', None) or {}
        written = {
            self.last_ckpt,
            getattr(self, 'best_ckpt_path', None),
            *best.values(),
        }
        for remove, path in removals:
            if path not in written and backend.exists(path):
                remove(path)

    def after_train_epoch(self, runner) -> None:
        """Save a checkpoint after an epoch, then remove older ones."""
        with self._removals_last():
            super().after_train_epoch(runner)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Save a checkpoint after an iteration, then remove older ones."""
        if self.by_epoch:
            return
        with self._removals_last():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Save the best checkpoint, then remove the previous one.

        Validation without training (``runner.val()``) saves nothing.
        """
        if not hasattr(self, 'file_backend'):  # set by before_train
            return
        with self._removals_last():
            super().after_val_epoch(runner, metrics)
