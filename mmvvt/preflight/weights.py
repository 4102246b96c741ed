"""Checks of pretrained weights and checkpoints against a model."""

import os
import re
from typing import Any, Dict, Iterator, Optional

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..checkpoint import READS_RUNNER_CHECKPOINTS, load_checkpoint_file
from ..errors import CheckpointError
from .config import type_name


def _pretrained(node, where: str = 'model') -> Iterator[tuple]:
    """Find each ``init_cfg`` of type 'Pretrained', and its path."""
    if isinstance(node, dict):
        names = ('Pretrained', 'PretrainedInit')
        if type_name(node) in names and 'checkpoint' in node:
            yield where, node
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}[{index}]')


def find_pretrained_problems(cfg: Config) -> Iterator[CheckpointError]:
    """Check that the pretrained checkpoints of all ``init_cfg`` exist.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.

    Yields:
        CheckpointError: If a file is missing.
    """
    for where, init_cfg in _pretrained(cfg.get('model')):
        path = init_cfg['checkpoint']
        if not is_url(path) and not os.path.isfile(os.path.expanduser(path)):
            yield CheckpointError(
                f'no such pretrained checkpoint: {path}; download it, or '
                f'start from random weights with --cfg-options '
                f'{where}=None'
            )


def is_url(path: str) -> bool:
    """Whether a checkpoint is not a local file for mmengine."""
    return '://' in path


def _read_state(path: str, prefix: Optional[str]) -> Dict[str, Tensor]:
    """Read the tensors that mmengine would load, with the names of a module.

    With a prefix, these are the tensors below this prefix; mmengine accepts
    it with and without the final dot. Without a prefix, mmengine removes
    ``module.`` from the names, which a distributed model writes.
    """
    checkpoint = load_checkpoint_file(os.path.expanduser(path))
    state = checkpoint.get('state_dict', checkpoint)
    if prefix is None:
        return {re.sub(r'^module\.', '', k): v for k, v in state.items()}
    prefix = prefix if prefix.endswith('.') else f'{prefix}.'
    return {
        key[len(prefix) :]: tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def _check_fit(
    module: nn.Module, path: str, prefix: Optional[str], what: str
) -> None:
    """Raise CheckpointError if a file does not have a module's weights."""
    if is_url(path) or not READS_RUNNER_CHECKPOINTS:
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
        example = f'{missing[0]} is missing'
    elif other:
        example = (
            f'{other[0]} has shape {tuple(state[other[0]].shape)}, '
            f'the model requires {tuple(wanted[other[0]])}'
        )
    else:
        return
    raise CheckpointError(
        f'{what} does not match the architecture of the model: '
        f'{len(missing)} of {len(wanted)} tensors are missing and '
        f'{len(other)} have a different shape; for example, {example}'
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
    init_cfg = (cfg.model.get('backbone') or {}).get('init_cfg')
    if init_cfg is None or type_name(init_cfg) not in (
        'Pretrained',
        'PretrainedInit',
    ):
        return
    path = init_cfg['checkpoint']
    _check_fit(
        _unwrap(model).backbone,
        path,
        init_cfg.get('prefix'),
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
    _check_fit(_unwrap(model), path, None, f'the checkpoint {path}')
