"""Parameters and multiply-adds of a model."""

from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from mmvvt.models import VicinityAttention


@dataclass
class Complexity:
    """What :func:`count` found.

    Attributes:
        parameters (int): Elements of all parameters.
        multiply_adds (int): Of matrix products and convolutions.
    """

    parameters: int
    multiply_adds: int


def _data_samples(model: nn.Module, input_shape: Tuple[int, ...]) -> dict:
    """What a model's forward pass takes beside the images."""
    if not hasattr(model, 'roi_head'):
        return {}
    # Detectors of two stages clip their proposals to the image.
    from mmdet.structures import DetDataSample
    height, width = input_shape[2:]
    meta = dict(
        img_shape=(height, width),
        ori_shape=(height, width),
        pad_shape=(height, width),
        scale_factor=(1., 1.))
    return dict(data_samples=[
        DetDataSample(metainfo=dict(meta)) for _ in range(input_shape[0])
    ])


def count(model: nn.Module, input_shape: Tuple[int, ...]) -> Complexity:
    """Count the parameters and multiply-adds of one forward pass.

    Counts matrix products and convolutions where PyTorch dispatches them, so
    also those that attention makes by calling a function. Additions,
    activations, norms and resizing are not counted. A VVT is counted in the
    plain linear form, with features four times as wide, as the paper counts
    it, whatever backend it would run with.

    mmengine models run in their 'tensor' mode: a classifier up to the class
    scores; a segmentor with its decode head and without the auxiliary one,
    which serves training alone (its parameters are counted); a detector with
    neck and heads, one of two stages with as many proposals as its RPN gives
    at random weights, mostly the configured most.

    Args:
        model (nn.Module): Called with one tensor, and with empty data
            samples where it has a ``roi_head``.
        input_shape (tuple[int, ...]): ``(B, C, H, W)``.

    Returns:
        Complexity: The counts, for the whole batch.
    """
    attentions = [
        m for m in model.modules() if isinstance(m, VicinityAttention)
    ]
    backends = [m.backend for m in attentions]
    clamps = [m.clamp for m in attentions]
    was_training = model.training
    model.eval()
    try:
        for module in attentions:
            # The reference is the plain linear form where clamps are on.
            module.backend, module.clamp = 'reference', True
        device = next(model.parameters()).device
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(
                torch.zeros(input_shape, device=device),
                **_data_samples(model, input_shape))
    finally:
        for module, backend, clamp in zip(attentions, backends, clamps):
            module.backend, module.clamp = backend, clamp
        model.train(was_training)
    # PyTorch counts a multiply-add as two.
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2)
