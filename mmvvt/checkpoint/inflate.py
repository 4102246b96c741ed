"""Change the number of input channels of a checkpoint."""

from typing import Sequence

import torch

from ..errors import CheckpointError, UserError
from .convert import State

FIRST_CONV = 'patch_embed1.proj.weight'
EXTRA = ('zeros', 'mean')


def inflate_input(
    checkpoint: dict,
    in_channels: int,
    rgb: Sequence[int] = (0, 1, 2),
    extra: str = 'zeros',
) -> dict:
    """Convert a checkpoint of an RGB model to another number of channels.

    Only the weight of the first convolution changes:

    - One or two channels: each gets the sum of the three kernels, divided by
      the number of channels. The output for equal channels is that of the RGB
      model for the grey image.
    - Three or more channels, ``extra='zeros'``: three channels keep the
      kernels of red, green and blue, and the kernels of the others are zero.
      The output is that of the RGB model for these three channels, whatever
      the others contain. They are used as soon as training changes them.
    - Three or more channels, ``extra='mean'``: the kernels of the others are
      the mean of the three, and all kernels are multiplied by
      ``3 / in_channels``. The output for equal channels is that of the RGB
      model for the grey image.

    All of this holds for the inputs of the network, which the data
    preprocessor has normalised.

    Args:
        checkpoint (dict): Checkpoint of a classifier, segmentor or detector
            of mmvvt, or of the backbone alone.
        in_channels (int): New number of channels, at least 1.
        rgb (Sequence[int]): Indices of the new channels that are red, green
            and blue. Ignored for one or two channels. Defaults to (0, 1, 2).
        extra (str): Kernels of the other channels, 'zeros' or 'mean'.
            Defaults to 'zeros'.

    Returns:
        dict: ``state_dict`` and ``meta``. Tensors that do not change are
        shared with the input.

    Raises:
        UserError: If an argument is invalid.
        CheckpointError: If the checkpoint has no first convolution of a VVT
            with three input channels.
    """
    rgb = tuple(rgb)
    if not isinstance(in_channels, int) or in_channels < 1:
        raise UserError(f'in_channels must be at least 1, got {in_channels!r}')
    if extra not in EXTRA:
        raise UserError(f'extra must be one of {EXTRA}, got {extra!r}')
    if in_channels > 2 and (
        len(set(rgb)) != 3 or not set(rgb) <= set(range(in_channels))
    ):
        raise UserError(
            f'rgb must be three different channels from 0 to '
            f'{in_channels - 1}, got {rgb}'
        )
    state: State = dict(checkpoint.get('state_dict', checkpoint))
    keys = [key for key in state if str(key).endswith(FIRST_CONV)]
    if len(keys) != 1 or not torch.is_tensor(state[keys[0]]):
        raise CheckpointError(
            f'the checkpoint must have one tensor backbone.{FIRST_CONV}, '
            f'found {len(keys)}; official checkpoints must be converted first'
        )
    weight = state[keys[0]]  # (C_out, 3, 7, 7)
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise CheckpointError(
            f'{keys[0]} must have three input channels, got shape '
            f'{tuple(weight.shape)}'
        )
    mean = weight.mean(dim=1, keepdim=True)
    shape = (-1, in_channels, -1, -1)
    if in_channels < 3:
        inflated = (mean * (3 / in_channels)).expand(shape).contiguous()
    else:
        inflated = mean.expand(shape).clone()
        if extra == 'zeros':
            inflated.zero_()
        inflated[:, list(rgb)] = weight
        if extra == 'mean':
            inflated *= 3 / in_channels
    state[keys[0]] = inflated
    return dict(state_dict=state, meta=dict(checkpoint.get('meta') or {}))
