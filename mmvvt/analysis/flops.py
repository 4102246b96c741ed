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


def count(model: nn.Module, input_shape: Tuple[int, ...]) -> Complexity:
    """Count the parameters and multiply-adds of one forward pass.

    Counts matrix products and convolutions where PyTorch dispatches them, so
    also those that attention makes by calling a function. Additions,
    activations, norms and resizing are not counted. A VVT is counted in the
    plain linear form, with features four times as wide, as the paper counts
    it, whatever backend it would run with.

    Args:
        model (nn.Module): Called with one tensor; mmengine models in their
            'tensor' mode.
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
            model(torch.zeros(input_shape, device=device))
    finally:
        for module, backend, clamp in zip(attentions, backends, clamps):
            module.backend, module.clamp = backend, clamp
        model.train(was_training)
    # PyTorch counts a multiply-add as two.
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2)
