"""Build the model of a config and load a checkpoint."""

import os
import warnings
from typing import Any, Tuple

import torch.nn as nn
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from ..errors import UserError
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
