"""Checks of pretrained weights and of checkpoints against a model."""

import os
from typing import Dict, Iterator

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..checkpoint import READS_RUNNER_CHECKPOINTS, load_checkpoint_file
from ..errors import CheckpointError


def _pretrained(node, where: str = 'model') -> Iterator[tuple]:
    """Each ``init_cfg`` of type 'Pretrained' below a node, and its place."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and 'checkpoint' in node:
            yield where, node
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}[{index}]')


def check_pretrained_files(cfg: Config) -> None:
    """Stop with one line where a file that ``init_cfg`` names is not there.

    Args:
        cfg (Config): The whole config.
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
    """Tensors of a checkpoint file below a prefix, without the prefix."""
    checkpoint = load_checkpoint_file(path)
    state = checkpoint.get('state_dict', checkpoint)
    return {
        key[len(prefix) :]: tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def _check_fit(module: nn.Module, path: str, prefix: str, what: str) -> None:
    """Stop with one line where a module's weights are not in a file."""
    if '://' in path or not READS_RUNNER_CHECKPOINTS:
        return  # the runner will fetch it, or can alone read it
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


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for processes and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def check_pretrained_backbone(cfg: Config, model: nn.Module) -> None:
    """Stop with one line where the pretrained backbone is another one.

    mmengine would load what fits, print the rest, and train on.

    Args:
        cfg (Config): The whole config.
        model (nn.Module): The model that was built from it.
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
    """Stop with one line where a checkpoint to test is of another model.

    mmengine would load what fits, print the rest, and test the mixture.

    Args:
        path (str): Checkpoint file; one behind a URL is passed over.
        model (nn.Module): The model that is to be tested.
    """
    _check_fit(_unwrap(model), path, '', f'the checkpoint {path}')
