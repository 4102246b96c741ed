"""Checks of pretrained weights and checkpoints against a model."""

import os
from typing import Any, Dict, Iterator

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..checkpoint import READS_RUNNER_CHECKPOINTS, load_checkpoint_file
from ..errors import CheckpointError


def _pretrained(node, where: str = 'model') -> Iterator[tuple]:
    """Find each ``init_cfg`` of type 'Pretrained', and its path."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and 'checkpoint' in node:
            yield where, node
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}[{index}]')


def check_pretrained_files(cfg: Config) -> None:
    """Check that the pretrained checkpoints of all ``init_cfg`` exist.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.

    Raises:
        CheckpointError: If a file is missing. The message is one line.
    """
    for where, init_cfg in _pretrained(cfg.model):
        path = init_cfg['checkpoint']
        if '://' not in path and not os.path.isfile(path):
            raise CheckpointError(
                f'no such pretrained checkpoint: {path}; put it there, or '
                f'start from random weights with --cfg-options '
                f'{where}=None'
            )


def _read_state(path: str, prefix: str) -> Dict[str, Tensor]:
    """Read the tensors whose keys have a prefix, and remove the prefix."""
    checkpoint = load_checkpoint_file(path)
    state = checkpoint.get('state_dict', checkpoint)
    return {
        key[len(prefix) :]: tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def _check_fit(module: nn.Module, path: str, prefix: str, what: str) -> None:
    """Raise CheckpointError if a file does not have a module's weights."""
    if '://' in path or not READS_RUNNER_CHECKPOINTS:
        return  # Only the runner can read these checkpoints.
    state = _read_state(path, prefix)
    wanted = {
        key: tensor.shape
        for key, tensor in module.state_dict().items()
        if not key.endswith('num_batches_tracked')
    }
    missing = [key for key in wanted if key not in state]
    other = [
        key
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    if missing:
        example = f'there is no {missing[0]}'
    elif other:
        example = (
            f'{other[0]} has shape {tuple(state[other[0]].shape)}, '
            f'the model wants {tuple(wanted[other[0]])}'
        )
    else:
        return
    raise CheckpointError(
        f'{what} is of another architecture than the model: '
        f'{len(missing)} of {len(wanted)} tensors are missing and '
        f'{len(other)} have another shape; for example, {example}'
    )


def _unwrap(model: Any) -> Any:
    """Return the model inside distributed and test-time wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def check_pretrained_backbone(cfg: Config, model: nn.Module) -> None:
    """Check that the pretrained weights fit the backbone of the model.

    Without this check, mmengine loads the matching tensors, prints a warning
    for the others and continues training.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.
        model (nn.Module): Model built from the config.

    Raises:
        CheckpointError: If tensors are missing in the checkpoint or have a
            different shape. The message is one line.
    """
    init_cfg = cfg.model.get('backbone', {}).get('init_cfg')
    if not isinstance(init_cfg, dict) or init_cfg.get('type') != 'Pretrained':
        return
    path = init_cfg['checkpoint']
    _check_fit(
        _unwrap(model).backbone,
        path,
        init_cfg.get('prefix') or '',
        f'the pretrained backbone in {path}',
    )


def check_checkpoint(path: str, model: nn.Module) -> None:
    """Check that a checkpoint fits a model before testing.

    Without this check, mmengine loads the matching tensors, prints a warning
    for the others and tests a partly random model.

    Args:
        path (str): Checkpoint file; URLs are skipped.
        model (nn.Module): Model to be tested.

    Raises:
        CheckpointError: If tensors are missing in the checkpoint or have a
            different shape. The message is one line.
    """
    _check_fit(_unwrap(model), path, '', f'the checkpoint {path}')
