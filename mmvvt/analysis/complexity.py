"""Parameters and multiply-adds of a model."""

from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..models import ConvMLP, VicinityAttention


@dataclass
class Complexity:
    """What :func:`count` found.

    Attributes:
        parameters (int): Elements of all parameters.
        multiply_adds (int): Of matrix products and convolutions.
    """

    parameters: int
    multiply_adds: int


# Heads of detectors of two stages, and what papers count these with: the
# proposals of each image, and those that get a mask.
TWO_STAGES = ('StandardRoIHead', 'CascadeRoIHead')
NUM_PROPOSALS = 1000
NUM_MASKS = 100


def _is_detector(model: nn.Module) -> bool:
    return any(
        cls.__module__.startswith('mmdet.') for cls in type(model).__mro__
    )


def _run_detector(model: nn.Module, images: Tensor) -> None:
    """A detector's forward pass in mode 'tensor', with empty data samples."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[2:])
    meta = dict(
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
    )
    model(images, [DetDataSample(metainfo=dict(meta)) for _ in images])


def _run_two_stages(model: nn.Module, images: Tensor) -> None:
    """A pass whose proposals do not hang on the weights of the RPN."""
    features = model.extract_feat(images)
    if model.with_rpn:
        model.rpn_head(features)
    # (B, 5): number of the image, then the whole of it as a box
    boxes = images.new_tensor(
        [
            [number, 0, 0, images.shape[3], images.shape[2]]
            for number in range(len(images))
        ]
    )
    head = model.roi_head
    branches = [(head.bbox_roi_extractor, head.bbox_head, NUM_PROPOSALS)]
    if head.with_mask:
        branches.append((head.mask_roi_extractor, head.mask_head, NUM_MASKS))
    for extractors, stages, number in branches:
        if not isinstance(stages, nn.ModuleList):  # a cascade has several
            extractors, stages = [extractors], [stages]
        for extractor, stage in zip(extractors, stages):
            found = extractor(
                features[: extractor.num_inputs], boxes.repeat(number, 1)
            )
            if head.with_shared_head:
                found = head.shared_head(found)
            stage(found)


def _run(model: nn.Module, images: Tensor) -> None:
    if not _is_detector(model):
        model(images)
    elif type(getattr(model, 'roi_head', None)).__name__ in TWO_STAGES:
        _run_two_stages(model, images)
    else:
        _run_detector(model, images)


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
    neck and heads, one of two stages or a cascade with 1000 proposals for
    each box head and 100 for each mask head. The sampling in RoIAlign and in
    deformable attention is not counted.

    Args:
        model (nn.Module): Called with one tensor, a detector of mmdet also
            with empty data samples.
        input_shape (tuple[int, ...]): ``(B, C, H, W)``.

    Returns:
        Complexity: The counts, for the whole batch.
    """
    attentions = [
        m for m in model.modules() if isinstance(m, VicinityAttention)
    ]
    mlps = [m for m in model.modules() if isinstance(m, ConvMLP)]
    backends = [m.backend for m in (*attentions, *mlps)]
    clamps = [m.clamp for m in attentions]
    was_training = model.training
    model.eval()
    try:
        for module in attentions:
            # The reference is the plain linear form where clamps are on.
            module.backend, module.clamp = 'reference', True
        for module in mlps:
            module.backend = 'reference'
        device = next(model.parameters()).device
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            _run(model, torch.zeros(input_shape, device=device))
    finally:
        for module, backend in zip((*attentions, *mlps), backends):
            module.backend = backend
        for module, clamp in zip(attentions, clamps):
            module.clamp = clamp
        model.train(was_training)
    # PyTorch counts a multiply-add as two.
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
    )
