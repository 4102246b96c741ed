"""Build the model of a config and load a checkpoint."""

import os
import pickle
import re
import warnings
from typing import Any, Dict, List, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from ..checkpoint import (
    CONVERT,
    CONVERTER,
    READS_RUNNER_CHECKPOINTS,
    load_checkpoint_file,
)
from ..errors import CheckpointError, UserError
from ..preflight import build_model, check_checkpoint, check_frozen_weights


def load_model(cfg: Config, checkpoint: str) -> Tuple[nn.Module, dict]:
    """Build the model of a config and load a checkpoint.

    Args:
        cfg (Config): The complete config.
        checkpoint (str): Path or URL of a checkpoint.

    Returns:
        tuple[nn.Module, dict]: The model on the CPU, and the metadata of the
        checkpoint, which is empty if there is none.

    Raises:
        UserError: If the model cannot be built, or the checkpoint does not
            exist, cannot be read or does not fit the model.
    """
    checkpoint = os.path.expanduser(checkpoint)
    if not os.path.isfile(checkpoint) and '://' not in checkpoint:
        raise UserError(f'no such checkpoint file: {checkpoint}')
    check_frozen_weights(cfg)
    with warnings.catch_warnings():
        # Losses warn about settings that matter in training only.
        warnings.simplefilter('ignore')
        model: Any = build_model(cfg)
    check_checkpoint(checkpoint, model)
    loaded = load_checkpoint(
        model, checkpoint, map_location='cpu', logger='silent'
    )
    return model, loaded.get('meta') or {}


def read_checkpoint(checkpoint: str) -> dict:
    """Read a checkpoint.

    Args:
        checkpoint (str): Path or URL. Files from HTTP servers are stored in
            the folder of ``torch.hub``.

    Returns:
        dict: Content of the checkpoint, with all tensors on the CPU.

    Raises:
        CheckpointError: If the checkpoint does not exist or cannot be read.
    """
    checkpoint = os.path.expanduser(checkpoint)
    if '://' not in checkpoint:
        if READS_RUNNER_CHECKPOINTS or not os.path.isfile(checkpoint):
            return load_checkpoint_file(checkpoint)
        return CheckpointLoader.load_checkpoint(checkpoint, 'cpu', 'silent')
    try:
        if re.match('https?://', checkpoint):
            # Unlike mmengine, execute no code from the file.
            loaded = torch.hub.load_state_dict_from_url(
                checkpoint,
                map_location='cpu',
                weights_only=READS_RUNNER_CHECKPOINTS,
            )
        else:
            loaded = CheckpointLoader.load_checkpoint(
                checkpoint, 'cpu', 'silent'
            )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f'cannot load {checkpoint}: {reason}') from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f'{checkpoint} is not a dict of tensors')
    return loaded


def load_fitting_parts(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load the parts of a checkpoint that fit a model.

    The backbone must fit completely. Other parts of the model, such as neck
    and head, keep their weights if the checkpoint does not have them or has
    them for another architecture. If only the number of outputs of a layer is
    different, for example because of another number of classes, this layer
    keeps its weights and the rest of the part is loaded. The log contains one
    line if not everything is loaded.

    Args:
        model (nn.Module): Initialised model; modified in place.
        checkpoint (dict): Content of a checkpoint.
        path (str): Its path or URL, for messages.

    Raises:
        CheckpointError: If the checkpoint does not contain the backbone of
            the model.
    """
    state = {
        re.sub(r'^module\.', '', str(key)): tensor
        for key, tensor in checkpoint.get('state_dict', checkpoint).items()
        if isinstance(tensor, torch.Tensor)
    }
    _check_backbone(model, state, path)
    wanted = model.state_dict()
    weights: Dict[str, torch.Tensor] = {}
    fresh: List[str] = []  # parts and layers that keep their weights
    for part in dict.fromkeys(key.partition('.')[0] for key in wanted):
        keys = [key for key in wanted if key.partition('.')[0] == part]
        missing = [
            key
            for key in keys
            if key not in state and not key.endswith('num_batches_tracked')
        ]
        given = [key for key in keys if key in state]
        other = [k for k in given if state[k].shape != wanted[k].shape]
        if not given:
            fresh.append(f'{part} (not in the checkpoint)')
        elif missing or not all(
            _differs_in_outputs(state[key], wanted[key]) for key in other
        ):
            fresh.append(f'{part} (has another architecture)')
        else:
            fresh += _describe_layers(other, state, wanted)
            weights.update((k, state[k]) for k in given if k not in other)
    model.load_state_dict(weights, strict=False)
    if fresh:
        name = os.path.basename(path)
        print_log(
            f'loaded {name} except for the newly initialised '
            f'{", ".join(fresh)}',
            'current',
        )


def _check_backbone(
    model: nn.Module, state: Dict[str, torch.Tensor], path: str
) -> None:
    """Raise CheckpointError if the state is not that of the backbone."""
    wanted = {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if key.startswith('backbone.')
    }
    found = {
        key: tuple(tensor.shape)
        for key, tensor in state.items()
        if key.startswith('backbone.')
    }
    if not found:
        official = any('patch_embed1.' in key for key in state)
        hint = (
            'if it is an official checkpoint, convert it with '
            f'{CONVERT} ({CONVERTER})'
            if official or not state
            else f'it has the keys {", ".join(list(state)[:3])}, ...'
        )
        raise CheckpointError(
            f'{path} fits no part of the model: no key starts with backbone.; '
            f'{hint}'
        )
    wrong = [key for key in {**wanted, **found} if key not in wanted]
    wrong += [key for key in wanted if wanted[key] != found.get(key)]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f'{path} is for another backbone: {len(wrong)} tensors differ; '
            f'for example, {key} has shape {found.get(key, "none")} in the '
            f'checkpoint and {wanted.get(key, "none")} in the model'
        )


def _differs_in_outputs(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors differ in the size of the first axis at most."""
    return (
        given.dim() == wanted.dim() > 0 and given[0].shape == wanted[0].shape
    )


def _describe_layers(
    keys: List[str],
    state: Dict[str, torch.Tensor],
    wanted: Dict[str, torch.Tensor],
) -> List[str]:
    """Describe the layers of tensors of another size, one entry for several.

    Layers that differ only in their index, such as those of the stages of a
    cascade, have one entry.
    """
    layers = {}
    for key in keys:
        layer = key.rpartition('.')[0] or key  # a parameter of the model
        layer = re.sub(r'\.\d+(?=\.|$)', '.*', layer)
        layers[layer] = f'{len(wanted[key])} instead of {len(state[key])}'
    return [f'{layer} ({sizes})' for layer, sizes in layers.items()]
