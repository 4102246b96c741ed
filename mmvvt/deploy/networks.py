"""Models as functions from images to tensors, ready for export.

The models of OpenMMLab return lists of data samples, and some of their layers
are written with the size of the example image when they are exported. Here
are the modules that are exported instead.
"""

import copy
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model.utils import revert_sync_batchnorm
from torch import Tensor

from ..errors import UserError
from ..models import VVT
from ..models.image_form import ImageForm
from ..models.stock import is_unmodified

# Options of mmcv's batched_nms
NMS_DEFAULTS = dict(type='nms', class_agnostic=False, max_num=-1)
EXPORTABLE = (
    'classifiers of mmpretrain with one head, EncoderDecoder of mmseg, '
    'RetinaNet of mmdet, and the backbone of every model'
)


# -- layers that keep the size of the image dynamic ---------------------------


class _Upsample(nn.Module):
    """Upsampling by a factor; mmseg's rounds the size to a Python int."""

    def __init__(self, layer: Any):
        super().__init__()
        self.factor = int(layer.scale_factor)
        self.options = dict(mode=layer.mode, align_corners=layer.align_corners)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, factor * h, factor * w)``."""
        size = (x.shape[2] * self.factor, x.shape[3] * self.factor)
        return F.interpolate(x, size, **self.options)


class _AdaptiveAvgPool(nn.Module):
    """Adaptive average pooling as two matrix products.

    ONNX has no adaptive pooling: exporters compute the windows from the size
    of the example image.
    """

    def __init__(self, layer: nn.AdaptiveAvgPool2d):
        super().__init__()
        size: Any = layer.output_size
        self.size = size if isinstance(size, tuple) else (size, size)

    @staticmethod
    def _weights(x: Tensor, length: int, bins: int) -> Tensor:
        """Weights ``(bins, length)`` of the averages along one axis."""
        index = torch.arange(length, device=x.device)  # (length,)
        first = torch.arange(bins, device=x.device)[:, None]  # (bins, 1)
        start = first * length // bins
        end = ((first + 1) * length + bins - 1) // bins
        inside = (index >= start) & (index < end)  # (bins, length)
        return inside.to(x.dtype) / (end - start).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to ``(B, C, *size)``."""
        rows = self._weights(x, x.shape[2], self.size[0])  # (bins, h)
        cols = self._weights(x, x.shape[3], self.size[1])  # (bins, w)
        return rows @ x @ cols.t()


def _dynamic_layer(layer: nn.Module, norm: str) -> Optional[nn.Module]:
    """Return a replacement with a dynamic size, or None to keep a layer."""
    if isinstance(layer, VVT) and is_unmodified(layer, VVT):
        return ImageForm(layer, norm)
    name = f'{type(layer).__module__}.{type(layer).__name__}'
    scale: Any = getattr(layer, 'scale_factor', None)
    if (
        name == 'mmseg.models.utils.wrappers.Upsample'
        and isinstance(scale, float)
        and scale == int(scale)
        and not getattr(layer, 'size', None)
    ):
        return _Upsample(layer)
    if type(layer) is nn.AdaptiveAvgPool2d and layer.output_size not in (
        1,
        (1, 1),
    ):
        return _AdaptiveAvgPool(layer)
    return None


def prepare(model: nn.Module, norm: Optional[str] = 'tokens') -> nn.Module:
    """Copy a model and replace the layers that engines run badly or wrongly.

    Args:
        model (nn.Module): Any model, with a VVT somewhere in it or without.
        norm (str, optional): Form of LayerNorm, see
            :class:`~mmvvt.models.image_form.ImageForm`. With None, all layers
            are kept. Defaults to 'tokens'.

    Returns:
        nn.Module: A copy in evaluation mode, without gradients.

    Raises:
        UserError: If PyTorch cannot copy the model.
    """
    try:
        model = revert_sync_batchnorm(copy.deepcopy(model))
    except RuntimeError as error:
        raise UserError(
            'a model with computed weights cannot be copied: call '
            'torch.nn.utils.remove_weight_norm or prune.remove first '
            f'({str(error).splitlines()[0]})'
        ) from error
    model.eval()
    model.requires_grad_(False)
    if norm is None:
        return model
    replaced = _dynamic_layer(model, norm)
    if replaced is not None:
        return replaced
    for parent in list(model.modules()):
        if isinstance(parent, ImageForm):
            continue
        for name, child in list(parent.named_children()):
            replaced = _dynamic_layer(child, norm)
            if replaced is not None:
                setattr(parent, name, replaced)
    return model


# -- one module for each kind of result ---------------------------------------


class Network(nn.Module):
    """Base class: a model as a function of a batch of images.

    Attributes:
        output_names (list[str]): Names of the outputs.
        fixed_batch (bool): Whether the batch must have one image.
    """

    output_names: List[str]
    fixed_batch = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model


class BackboneNetwork(Network):
    """Feature maps ``(B, C_i, h_i, w_i)``, one for each output stage."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        indices = getattr(model, 'out_indices', None)
        if not isinstance(indices, (tuple, list)):
            raise UserError(
                f'the backbone {type(model).__name__} has no out_indices, '
                'which name its outputs'
            )
        self.output_names = [f'feature_{index}' for index in indices]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the feature maps of images ``(B, C, H, W)``."""
        return tuple(self.model(x))


class ClassifierNetwork(Network):
    """Scores ``(B, K)`` of the classes, as the classifier predicts them."""

    output_names = ['scores']

    def __init__(self, model: nn.Module):
        super().__init__(model)
        from mmpretrain.models.heads import ClsHead, MultiLabelClsHead

        head = getattr(model, 'head', None)
        if isinstance(head, MultiLabelClsHead):
            self.multi_label = True
        elif isinstance(head, ClsHead):
            self.multi_label = False
        else:
            raise UserError(
                f'a classifier with {type(head).__name__} as head cannot be '
                f'exported; {EXPORTABLE} can'
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores of images ``(B, C, H, W)``."""
        logits = self.model(x, mode='tensor').float()  # (B, K)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


class SegmentorNetwork(Network):
    """Scores ``(B, K, H, W)`` of the classes, or label maps ``(B, H, W)``."""

    def __init__(self, model: nn.Module, label_map: bool = False):
        super().__init__(model)
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        head: Any = getattr(model, 'decode_head', None)
        if not isinstance(head, BaseDecodeHead):  # a cascade has a list
            raise UserError(
                f'a {type(model).__name__} cannot be exported; {EXPORTABLE} '
                'can'
            )
        self.label_map = label_map
        self.output_names = ['label_map' if label_map else 'scores']

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores or label maps of images ``(B, C, H, W)``."""
        head = self.model.decode_head
        logits = head.forward(self.model.extract_feat(x))  # (B, K, h, w)
        logits = F.interpolate(
            logits.float(),
            (x.shape[2], x.shape[3]),
            mode='bilinear',
            align_corners=head.align_corners,
        )
        if head.out_channels == 1:
            # One channel for two classes, compared with a threshold.
            scores = logits.sigmoid()
            if not self.label_map:
                return scores
            return (scores > head.threshold).to(torch.int32).squeeze(1)
        if not self.label_map:
            return logits.softmax(dim=1)
        return logits.argmax(dim=1).to(torch.int32)


class DenseHeadNetwork(Network):
    """Outputs of the dense head of RetinaNet at each level.

    ``cls_score_i`` has shape ``(B, A * K, h_i, w_i)`` and ``bbox_pred_i``
    ``(B, A * 4, h_i, w_i)`` with A anchors for each location.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        from mmdet.models.dense_heads import RetinaHead

        head: Any = getattr(model, 'bbox_head', None)
        if not isinstance(head, RetinaHead):
            raise UserError(
                f'a {type(model).__name__} cannot be exported as a whole; '
                f'{EXPORTABLE} can'
            )
        levels = range(head.prior_generator.num_levels)
        self.output_names = [
            f'{kind}_{level}'
            for kind in ('cls_score', 'bbox_pred')
            for level in levels
        ]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the outputs of images ``(B, C, H, W)``."""
        scores, boxes = self.model.bbox_head(self.model.extract_feat(x))
        return (*scores, *boxes)


class DetectorNetwork(DenseHeadNetwork):
    """Boxes of RetinaNet after non-maximum suppression, for one image.

    The number M of boxes is ``max_per_img`` of the config: ``boxes``
    ``(M, 4)`` in pixels (left, top, right, bottom), ``scores`` ``(M,)`` in
    descending order, and ``labels`` ``(M,)``. Where fewer boxes are found,
    the score is 0 and the label is -1. The steps are those of mmdet's
    ``predict_by_feat``.
    """

    fixed_batch = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.output_names = ['boxes', 'scores', 'labels']
        self.head = self.model.bbox_head
        self.test_cfg = cfg = self.head.test_cfg
        nms = dict(cfg.get('nms') or {})
        # Without the defaults, and what has no effect on the result.
        others = {
            key: value
            for key, value in nms.items()
            if value != NMS_DEFAULTS.get(key)
            and key not in ('iou_threshold', 'split_thr')
        }
        if others or 'iou_threshold' not in nms or cfg.get('nms_pre', -1) <= 0:
            raise UserError(
                "--nms requires test_cfg with nms of type 'nms', of whose "
                'options only iou_threshold is set, and nms_pre above 0, got '
                f'nms={cfg.get("nms")} and nms_pre={cfg.get("nms_pre", -1)}'
            )

    def _level(
        self, level: int, cls_score: Tensor, bbox_pred: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Select the best boxes of a level.

        Args:
            level (int): Index of the level.
            cls_score (Tensor): Class logits ``(1, A * K, h, w)``.
            bbox_pred (Tensor): Box deltas ``(1, A * 4, h, w)``.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Scores ``(P,)``, labels ``(P,)``
            and decoded boxes ``(P, 4)`` with P = ``nms_pre``.
        """
        head = self.head
        height, width = cls_score.shape[2], cls_score.shape[3]
        # (1, A * K, h, w) -> (h, w, A * K) -> (h * w * A, K)
        logits = (
            cls_score[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        )
        if head.use_sigmoid_cls:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(dim=-1)[:, :-1]
        classes = scores.shape[1]
        count = self.test_cfg.nms_pre
        # A small level has fewer boxes than are selected.
        scores, index = F.pad(scores.flatten(), (0, count)).topk(count)
        index = torch.where(scores > 0, index, 0)
        anchors = head.prior_generator.single_level_grid_priors(
            (height, width), level, scores.dtype, scores.device
        )  # (h * w * A, 4)
        # (1, A * 4, h, w) -> (h, w, A * 4) -> (h * w * A, 4)
        deltas = bbox_pred[0].permute(1, 2, 0).reshape(-1, 4)
        chosen = index // classes
        boxes = head.bbox_coder.decode(anchors[chosen], deltas[chosen])
        return scores, index % classes, boxes

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Detect the objects of one image ``(1, C, H, W)``."""
        from torchvision.ops import nms

        outs = [t.float() for t in super().forward(x)]
        half = len(outs) // 2
        levels = [
            self._level(level, *pair)
            for level, pair in enumerate(zip(outs[:half], outs[half:]))
        ]
        scores, labels, boxes = (torch.cat(parts) for parts in zip(*levels))
        if self.head.bbox_coder.clip_border:
            boxes = torch.stack(
                [
                    boxes[:, i].clamp(min=0).clamp(max=x.shape[3 - i % 2])
                    for i in range(4)
                ],
                dim=1,
            )
        valid = scores > self.test_cfg.get('score_thr', 0)
        smallest = self.test_cfg.get('min_bbox_size', -1)
        if smallest >= 0:
            sides = boxes[:, 2:] - boxes[:, :2]
            valid = valid & (sides > smallest).all(dim=1)
        # Boxes with a score of 0 come last and suppress no valid box.
        scores = torch.where(valid, scores, 0.0)
        # Boxes of different classes do not overlap after this shift.
        shift = labels.to(boxes.dtype)[:, None] * (boxes.max() + 1)
        keep = nms(boxes + shift, scores, self.test_cfg.nms.iou_threshold)
        kept = torch.zeros_like(scores).index_fill(0, keep, 1.0)
        count = min(self.test_cfg.max_per_img, scores.shape[0])
        scores, index = (scores * kept).topk(count)
        labels = torch.where(scores > 0, labels[index], -1)
        return boxes[index], scores, labels.to(torch.int32)


class Preprocess(nn.Module):
    """Normalise RGB images with values from 0 to 255.

    Args:
        network (Network): Network that takes normalised images.
        preprocessor (nn.Module): Data preprocessor of the model.
        rgb (bool): Whether the model takes RGB images. If False, the channels
            are reversed first.

    Raises:
        UserError: If the data preprocessor does not normalise images.
    """

    def __init__(self, network: Network, preprocessor: Any, rgb: bool):
        super().__init__()
        self.network = network
        self.output_names = network.output_names
        self.fixed_batch = network.fixed_batch
        if not getattr(preprocessor, '_enable_normalize', False):
            raise UserError(
                'the data_preprocessor of the config has no mean and std, so '
                'there is no preprocessing to include'
            )
        self.flip = not rgb  # no change for one channel
        # (C, 1, 1)
        self.register_buffer('mean', preprocessor.mean.detach().clone())
        self.register_buffer('std', preprocessor.std.detach().clone())

    def forward(self, x: Tensor):
        """Normalise images ``(B, C, H, W)`` and call the network."""
        if self.flip:
            x = x.flip(1)
        mean: Any = self.mean
        return self.network((x - mean) / self.std)

    def undo(self, x: Tensor) -> Tensor:
        """Turn normalised images ``(B, C, H, W)`` into RGB, 0 to 255."""
        mean: Any = self.mean
        std: Any = self.std
        x = x * std + mean
        return x.flip(1) if self.flip else x


class _Half(nn.Module):
    """A network in float16 with inputs and outputs in float32."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.half()
        self.output_names = network.output_names
        self.fixed_batch = network.fixed_batch

    def forward(self, x: Tensor):
        """Call the network with ``x`` in float16."""
        outs = self.network(x.half())
        if isinstance(outs, Tensor):
            outs = (outs,)
        outs = tuple(t.float() if t.is_floating_point() else t for t in outs)
        return outs if len(outs) > 1 else outs[0]


def _base_classes(model: nn.Module) -> Iterator[Tuple[str, str]]:
    for cls in type(model).__mro__:
        yield cls.__module__.partition('.')[0], cls.__name__


def build_network(
    model: nn.Module,
    *,
    backbone: bool = False,
    label_map: bool = False,
    nms: bool = False,
    norm: Optional[str] = 'tokens',
) -> Network:
    """Turn a model into a function of images for export.

    Args:
        model (nn.Module): Classifier, segmentor, detector or backbone. It is
            not changed.
        backbone (bool): Whether to take the backbone only. Defaults to False.
        label_map (bool): Whether a segmentor returns label maps instead of
            scores. Defaults to False.
        nms (bool): Whether a detector returns boxes after non-maximum
            suppression instead of the outputs of its head. Defaults to False.
        norm (str, optional): Form of LayerNorm. With None, all layers are
            kept, which gives the network to compare with. Defaults to
            'tokens'.

    Returns:
        Network: The function, in evaluation mode.

    Raises:
        UserError: If the model or the combination of options cannot be
            exported.
    """
    kinds = set(_base_classes(model))
    if backbone:
        model = getattr(model, 'backbone', model)
    build: Callable[[nn.Module], Network]
    if backbone or isinstance(model, VVT):
        build, task = BackboneNetwork, 'backbone'
    elif ('mmpretrain', 'BaseClassifier') in kinds:
        build, task = ClassifierNetwork, 'classifier'
    elif ('mmseg', 'EncoderDecoder') in kinds:
        task = 'segmentor'

        def build(m):
            return SegmentorNetwork(m, label_map)

    elif ('mmdet', 'SingleStageDetector') in kinds:
        build, task = DetectorNetwork if nms else DenseHeadNetwork, 'detector'
    else:
        raise UserError(
            f'a {type(model).__name__} cannot be exported as a whole; '
            f'{EXPORTABLE} can'
        )
    for option, given, wanted in (
        ('label_map', label_map, 'segmentor'),
        ('nms', nms, 'detector'),
    ):
        if given and task != wanted:
            raise UserError(f'{option} is for a {wanted}, this is a {task}')
    return build(prepare(model, norm)).eval()


def to_half(network: Any) -> Any:
    """Return a network in float16 that takes and returns float32."""
    return _Half(network).eval()
