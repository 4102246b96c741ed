"""Parameters, multiply-adds and activations of a model."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..models import ConvMLP, VicinityAttention


@dataclass
class Complexity:
    """Complexity of a model, as computed by :func:`count`.

    Attributes:
        parameters (int): Total number of elements of all parameters.
        multiply_adds (int): Multiply-adds of matrix products and
            convolutions.
        activations (int): Total number of elements of the outputs of the
            same operations.
    """

    parameters: int
    multiply_adds: int
    activations: int


# RoI heads of two-stage detectors. Their FLOPs are counted with the usual
# numbers of proposals per image for the box heads and for the mask heads.
TWO_STAGES = ('StandardRoIHead', 'CascadeRoIHead')
NUM_PROPOSALS = 1000
NUM_MASKS = 100


class _ActivationCounter(TorchDispatchMode):
    """Counts the elements of the outputs of products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += out.numel()
        return out


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """Let PyTorch compute attention as matrix products, which are counted.

    Its fused kernels are single operations without a formula for their
    multiply-adds on the CPU.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _is_detector(model: nn.Module) -> bool:
    # Backbones of mmdet take one tensor.
    return any(
        cls.__module__.startswith('mmdet.models.detectors.')
        for cls in type(model).__mro__
    )


def _run_detector(model: Any, images: Tensor) -> None:
    """Run a detector in 'tensor' mode, with empty data samples."""
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


def _run_two_stages(model: Any, images: Tensor) -> None:
    """Run a forward pass with a fixed number of proposals.

    The proposals do not depend on the weights of the RPN.
    """
    features = model.extract_feat(images)
    if model.with_rpn:
        model.rpn_head(features)
    # (B, 5): image index, and a box that covers the whole image
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
        if not isinstance(stages, nn.ModuleList):  # not a cascade
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
    """Count parameters, multiply-adds and activations of one forward pass.

    Matrix products and convolutions are counted where PyTorch dispatches
    them, which includes functional calls in attention.
    ``scaled_dot_product_attention`` and ``nn.MultiheadAttention`` are counted
    as the matrix products that define them, whichever kernel would compute
    them. Additions, activation functions, normalization and resizing are not
    counted. The number of activations is the number of elements of the
    outputs of the same matrix products and convolutions. VVT is counted
    with the reference implementation of linear attention, whose features
    have four times the head dimension, as in the paper. The count does not
    depend on the backend that the model is configured with.

    mmengine models run in 'tensor' mode. A classifier is counted up to its
    class scores. A segmentor is counted without its auxiliary head, which is
    used only in training; the parameters of that head are included. A
    detector is counted with its neck and heads. Two-stage and cascade
    detectors use 1000 proposals for each box head and 100 for each mask
    head. The sampling in RoIAlign and in deformable attention is not
    counted.

    The values of the tensors are not needed: a model on the meta device is
    counted without computing and without memory for its tensors.

    Args:
        model (nn.Module): Model that takes one tensor. A detector of mmdet
            also takes data samples and is called with empty ones.
        input_shape (tuple[int, ...]): Input shape ``(B, C, H, W)``.

    Returns:
        Complexity: Parameters, and multiply-adds and activations for the
        whole batch.
    """
    attentions = [
        m for m in model.modules() if isinstance(m, VicinityAttention)
    ]
    mlps = [m for m in model.modules() if isinstance(m, ConvMLP)]
    both: List[Any] = [*attentions, *mlps]
    backends = [m.backend for m in both]
    clamps = [m.clamp for m in attentions]
    was_training = model.training
    model.eval()
    try:
        for module in both:
            module.backend = 'reference'
        for attention in attentions:
            # With clamps, the reference computes plain linear attention.
            attention.clamp = True
        device = next(model.parameters()).device
        counter = FlopCounterMode(display=False)
        outputs = _ActivationCounter()
        # The outer mode receives the operations that the inner one counts.
        with torch.no_grad(), _attention_as_products(), outputs, counter:
            _run(model, torch.zeros(input_shape, device=device))
    finally:
        for module, backend in zip(both, backends):
            module.backend = backend
        for attention, clamp in zip(attentions, clamps):
            attention.clamp = clamp
        model.train(was_training)
    # PyTorch counts a multiply-add as two operations.
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
        activations=outputs.total,
    )
