"""Class activation maps of a trained model for one image, by Grad-CAM.

The maps are computed by the package pytorch-grad-cam. This module gives it
what differs between the tasks: the class scores of a model as a function of
the image, and the score of a class that is differentiated.
"""

import difflib
from abc import abstractmethod
from contextlib import contextmanager
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import VVT
from .attention import find_backbone, read_input, to_picture
from .predictor import Predictor, faults_as_user_errors

INSTALL = 'pip install "grad-cam<1.5"'
SUPPORTED = (
    'classifiers of mmpretrain, segmentors of mmseg, and detectors of mmdet: '
    'RetinaNet and other single-stage detectors, Mask R-CNN and other '
    'two-stage detectors, and DINO'
)
MAX_CLASSES = 3  # number of classes that are chosen by default
MAX_LISTED = 30  # number of classes that are listed in a message


class ActivationMap(NamedTuple):
    """Class activation map of one class.

    Attributes:
        label (int): Class index.
        name (str): Class name.
        score (float): Value that is differentiated: the mean score of the
            class, before softmax or sigmoid.
        predicted (bool): Whether the class is predicted in the image.
        target (str): What the score is the mean of, in words.
        heat (np.ndarray): Map of shape ``(H, W)``, float32, from 0, its
            smallest value, to 1, its largest one, also counting the padding.
            It is 0 everywhere if it is constant, for example because nothing
            in the image increases the score.
    """

    label: int
    name: str
    score: float
    predicted: bool
    target: str
    heat: np.ndarray


class ActivationMaps(NamedTuple):
    """Result of :func:`class_activation_maps`.

    Attributes:
        image (np.ndarray): Input of the network as RGB image ``(H, W, 3)``,
            uint8, without padding.
        layer (str): Name of the layer.
        grid (tuple[int, int]): Height and width of the output of the layer.
        maps (list[ActivationMap]): One map for each class.
    """

    image: np.ndarray
    layer: str
    grid: Tuple[int, int]
    maps: List[ActivationMap]


# -- class scores, one class for each task ------------------------------------


class _Choice(NamedTuple):
    """Positions whose mean score is differentiated.

    Attributes:
        mask (Tensor): The positions, bool ``(P,)``.
        predicted (bool): Whether the class is predicted.
        text (str): The positions in words.
    """

    mask: Tensor
    predicted: bool
    text: str


class _Scores(nn.Module):
    """Class scores of a model as a function of the image.

    Args:
        model (nn.Module): The model.
        samples (list): Data samples of the batch of one image.
        size (tuple[int, int]): Height and width of the image without padding.
        score_thr (float): Minimum score of detections.
    """

    def __init__(
        self,
        model: Any,
        samples: list,
        size: Tuple[int, int],
        score_thr: float,
    ):
        super().__init__()
        self.model = model
        self.samples = samples
        self.size = size
        self.score_thr = score_thr

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(1, C, H, W)`` to scores ``(1, P, K)``.

        There are K classes and P positions: one for a classifier, the pixels
        for a segmentor, the boxes before non-maximum suppression for a
        detector. Scores are those before softmax or sigmoid.
        """

    def count_classes(self, scores: Tensor) -> int:
        """Return the number of classes of scores ``(P, K)``."""
        return scores.shape[1]

    @abstractmethod
    def find(self, scores: Tensor) -> List[int]:
        """Return the predicted classes in descending order."""

    @abstractmethod
    def choose(self, scores: Tensor, label: int) -> _Choice:
        """Choose the positions for a class from scores ``(P, K)``."""


class _Classification(_Scores):
    """Image classification: the score of the class."""

    def forward(self, x):
        scores = self.model(x, self.samples, mode='tensor')
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise UserError(
                f'the head {type(self.model.head).__name__} does not return '
                'one score for each class; class activation maps support '
                f'{SUPPORTED}'
            )
        return scores[:, None]  # (1, K) -> (1, 1, K)

    def find(self, scores):
        return [int(scores[0].argmax())]

    def choose(self, scores, label):
        mask = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        predicted = int(scores[0].argmax()) == label
        return _Choice(
            mask, predicted, 'predicted' if predicted else 'not predicted'
        )


class _Segmentation(_Scores):
    """Semantic segmentation: the mean over the pixels of the class."""

    def forward(self, x):
        height, width = self.size
        scores = self.model.encode_decode(
            x, [sample.metainfo for sample in self.samples]
        )[..., :height, :width]  # without padding
        if scores.shape[1] == 1:
            # A score for two classes: the second one above a threshold
            threshold = self.model.decode_head.threshold
            scores = scores - torch.tensor(threshold).logit().to(scores)
            scores = torch.cat([-scores, scores], dim=1)
        return scores.flatten(2).transpose(1, 2)  # (1, K, H, W) -> (1, P, K)

    def find(self, scores):
        counts = scores.argmax(dim=1).bincount(minlength=scores.shape[1])
        order = counts.argsort(descending=True, stable=True)
        return [int(label) for label in order if counts[label]]

    def choose(self, scores, label):
        mask = scores.argmax(dim=1) == label
        count = int(mask.sum())
        if count:
            return _Choice(mask, True, f'mean over {count} predicted pixels')
        return _Choice(
            torch.ones_like(mask),
            False,
            f'predicted nowhere, mean over all {len(mask)} pixels',
        )


@contextmanager
def _without_masks(roi_head: Any) -> Iterator[None]:
    """Remove the mask head in the block, which class scores do not need."""
    if not roi_head.with_mask:
        yield
        return
    mask_head = roi_head.mask_head
    roi_head.mask_head = None
    try:
        yield
    finally:
        roi_head.mask_head = mask_head


class _Detection(_Scores):
    """Object detection: the mean over the boxes with high scores.

    Boxes are those of the head before non-maximum suppression: the anchors,
    points or queries of the image, or the region proposals.
    """

    def forward(self, x):
        from mmdet.models import (
            DetectionTransformer,
            SingleStageDetector,
            TwoStageDetector,
        )

        if getattr(self.head, 'num_classes', None) is None:
            raise self._unsupported()
        if isinstance(self.model, TwoStageDetector):
            return self._score_proposals(x)
        if isinstance(self.model, DetectionTransformer):
            # Scores of all decoder layers (layers, 1, P, K) -> (1, P, K)
            scores = self.model(x, self.samples, mode='tensor')[0]
            if not isinstance(scores, Tensor) or scores.dim() != 4:
                raise self._unsupported()
            return scores[-1]
        if isinstance(self.model, SingleStageDetector):
            return self._score_anchors(x)
        raise self._unsupported()

    def _score_anchors(self, x: Tensor) -> Tensor:
        """Return the scores ``(1, P, K)`` of a head on feature maps."""
        channels = getattr(self.head, 'cls_out_channels', None)
        levels = self.model(x, self.samples, mode='tensor')[0]
        if channels is None or not all(
            isinstance(level, Tensor)
            and level.dim() == 4
            and level.shape[1] % channels == 0
            for level in levels
        ):
            raise self._unsupported()
        return torch.cat(
            [
                # (1, A * K, h, w) -> (1, h, w, A * K) -> (1, h * w * A, K)
                level.permute(0, 2, 3, 1).reshape(1, -1, channels)
                for level in levels
            ],
            dim=1,
        )

    def _score_proposals(self, x: Tensor) -> Tensor:
        """Return the scores ``(1, P, K + 1)`` of the region proposals.

        The last channel is the background. Those of a cascade are the mean
        over its stages, as in its predictions.
        """
        with _without_masks(self.model.roi_head):
            scores = self.model(x, self.samples, mode='tensor')[-1][0]
        if isinstance(scores, (list, tuple)):  # a cascade: one entry per image
            (scores,) = scores
        if scores.dim() != 2 or scores.shape[1] != self.head.num_classes + 1:
            raise self._unsupported()
        if not len(scores):
            raise UserError('the detector proposes no region of this image')
        return scores[None]  # (P, K + 1) -> (1, P, K + 1)

    @property
    def head(self) -> Any:
        """The head that classifies the boxes."""
        roi_head = getattr(self.model, 'roi_head', None)
        head = getattr(roi_head or self.model, 'bbox_head', None)
        return head[-1] if isinstance(head, nn.ModuleList) else head

    def _unsupported(self) -> UserError:
        return UserError(
            f'class activation maps do not support {type(self.model).__name__}'
            f', but {SUPPORTED}'
        )

    def count_classes(self, scores):
        return self.head.num_classes  # without the background

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities of scores ``(P, K)``, without the background."""
        head = self.head
        if getattr(head, 'use_sigmoid_cls', True) and getattr(
            head.loss_cls, 'use_sigmoid', True
        ):
            return scores.sigmoid()[:, : head.num_classes]
        return scores.softmax(dim=1)[:, : head.num_classes]

    def find(self, scores):
        best = self._probabilities(scores).amax(dim=0)
        order = best.argsort(descending=True, stable=True).tolist()
        found = [label for label in order if best[label] >= self.score_thr]
        return found or order[:1]

    def choose(self, scores, label):
        probabilities = self._probabilities(scores)[:, label]
        mask = probabilities >= self.score_thr
        count = int(mask.sum())
        if count:
            return _Choice(mask, True, f'mean over {count} boxes before NMS')
        best = probabilities.argmax()
        mask[best] = True
        return _Choice(
            mask,
            False,
            f'no score of {self.score_thr:g} or more, box with score '
            f'{float(probabilities[best]):.2g}',
        )


TASKS: Dict[str, Type[_Scores]] = dict(
    classification=_Classification,
    segmentation=_Segmentation,
    detection=_Detection,
)


class _Target:
    """Mean score of a class: the target of pytorch-grad-cam.

    Args:
        network (_Scores): Chooses the positions.
        label (int): Class index.
    """

    def __init__(self, network: _Scores, label: int):
        self.network = network
        self.label = label
        self.choice: Any = None
        self.score = float('nan')

    def __call__(self, scores: Tensor) -> Tensor:
        """Map scores ``(P, K)`` to a number."""
        self.choice = self.network.choose(scores.detach(), self.label)
        value = scores[self.choice.mask, self.label].mean()
        self.score = float(value.detach())
        return value


# -- layers -------------------------------------------------------------------


def _last_stage(model: Any, backbone: VVT) -> int:
    """Return the number of the last stage whose output is used."""
    head: Any = getattr(model, 'decode_head', None)
    if isinstance(head, nn.ModuleList):  # a cascade
        head = head[-1]
    outputs = backbone.out_indices
    if head is None or getattr(model, 'neck', None) is not None:
        return outputs[-1] + 1
    used = np.atleast_1d(head.in_index) % len(outputs)
    return outputs[int(used.max())] + 1


def _find_layer(
    model: Any, stage: Optional[int], layer: Optional[str]
) -> Tuple[str, nn.Module]:
    """Return the name of the layer and the layer."""
    if stage is not None and layer is not None:
        raise UserError('a stage and a layer cannot be given at the same time')
    layers = dict(model.named_modules())
    layers.pop('')
    if layer is None:
        name, backbone = find_backbone(model)
        last = backbone.out_indices[-1] + 1
        if stage is None:
            stage = _last_stage(model, backbone)
        if stage not in range(1, last + 1):
            raise UserError(
                f'the backbone of this model has the stages 1 to {last}, got '
                f'{stage}'
            )
        layer = f'{name}.norm{stage}' if name else f'norm{stage}'
    if layer not in layers:
        similar = difflib.get_close_matches(layer, layers, n=5, cutoff=0.5)
        examples = [name for name in layers if '.' in name][:5]
        raise UserError(
            f'no layer {layer}; '
            + (
                f'similar names: {", ".join(similar)}'
                if similar
                else f'for example {", ".join(examples)}'
            )
        )
    return layer, layers[layer]


class _Recorder:
    """Record the outputs of a layer, and the grid of its tokens."""

    def __init__(self):
        self.grid: Optional[Tuple[int, int]] = None
        self.outputs: List[Tuple[Any, Optional[Tuple[int, int]]]] = []

    @contextmanager
    def watch(self, model: nn.Module, layer: nn.Module) -> Iterator[None]:
        """Record the calls in the block."""

        def keep_grid(module, args, output):
            self.grid = (output.shape[2], output.shape[3])

        def keep_output(module, args, output):
            self.outputs.append((output, self.grid))

        backbones = [m for m in model.modules() if isinstance(m, VVT)]
        handles = [
            # (B, C, h, w), from which the tokens of a stage are made
            getattr(
                backbone, f'patch_embed{i + 1}'
            ).proj.register_forward_hook(keep_grid)
            for backbone in backbones
            for i in range(len(backbone.depths))
        ]
        handles.append(layer.register_forward_hook(keep_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def find_grid(self, name: str) -> Tuple[int, int]:
        """Return the grid of the output of the layer.

        Raises:
            UserError: If the output has no grid of more than one position, or
                if the layer is not called exactly once.
        """
        if len(self.outputs) != 1:
            raise UserError(
                f'{name} is called {len(self.outputs)} times for an image; '
                'use a layer that is called once'
            )
        output, grid = self.outputs[0]
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        if shape is not None and len(shape) == 4 and shape[0] == 1:
            grid = shape[2:]
        elif (
            shape is None
            or len(shape) != 3
            or grid is None
            or shape[1] != grid[0] * grid[1]
        ):
            found = (
                type(output).__name__ if shape is None else f'shape {shape}'
            )
            raise UserError(
                f'the output of {name} is no map (1, C, h, w), and has no '
                f'token for each position of a stage (1, h * w, C): got '
                f'{found}'
            )
        if grid == (1, 1):
            raise UserError(
                f'the output of {name} has one position for an image of this '
                'size, which is no map; use a layer of an earlier stage or a '
                'larger image'
            )
        return grid


@contextmanager
def _only_activation_gradients(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters in the block."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


# -- classes ------------------------------------------------------------------


def _find_class(wanted: Union[int, str], names: List[str], count: int) -> int:
    """Return the index of a class that is given by its name or index."""
    matches = [label for label in range(count) if names[label] == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f'several classes are called {wanted}: use one of the indices '
            f'{", ".join(map(str, matches))}'
        )
    try:
        label = int(wanted)
    except ValueError:
        label = -1
    if 0 <= label < count:
        return label
    raise UserError(f'no class {wanted}; {_list_classes(wanted, names)}')


def _list_classes(wanted: Union[int, str], names: List[str]) -> str:
    """Describe the classes of a model; of many classes, the similar ones."""
    if len(names) <= MAX_LISTED:
        return 'the classes are ' + ', '.join(
            f'{label}: {name}' for label, name in enumerate(names)
        )
    text = str(wanted).lower()
    lower = [name.lower() for name in names]
    similar = [i for i, name in enumerate(lower) if text in name]
    for name in difflib.get_close_matches(text, lower, n=5):
        similar += [i for i, other in enumerate(lower) if other == name]
    listed = [f'{i}: {names[i]}' for i in dict.fromkeys(similar)][:5]
    hint = f'similar classes: {", ".join(listed)}; ' if listed else ''
    return f'{hint}the classes have the indices 0 to {len(names) - 1}'


# -- the function -------------------------------------------------------------


def _import_grad_cam() -> Any:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise UserError(
            f'class activation maps need pytorch-grad-cam: {INSTALL} ({error})'
        ) from error
    return GradCAM


def class_activation_maps(
    predictor: Predictor,
    image: Union[str, np.ndarray],
    classes: Optional[Sequence[Union[int, str]]] = None,
    stage: Optional[int] = None,
    layer: Optional[str] = None,
) -> ActivationMaps:
    """Compute which parts of an image increase the score of a class.

    Grad-CAM weights the channels of the output of a layer by the mean
    gradient of a score over the positions, and adds them up. Negative values
    become 0. pytorch-grad-cam resizes the map to the input of the network,
    padding included, and scales it so that its smallest value is 0 and its
    largest one 1.

    The score, before softmax or sigmoid, is

    - for a classifier: the score of the class;
    - for a segmentor: the mean over the pixels that are predicted as the
      class, or over all pixels if there are none. The network is applied to
      the whole image, also if the config says ``mode='slide'``;
    - for a detector: the mean over all boxes of the head, before non-maximum
      suppression, for which the probability of the class is at least
      ``predictor.score_thr``, or the score of the best box if there are none.
      The boxes of a two-stage detector are its region proposals.

    The image is transformed by the test pipeline of the config. The model is
    not changed.

    Examples:
        >>> predictor = Predictor(config, checkpoint)
        >>> result = class_activation_maps(predictor, 'photo.jpg', ['cat', 7])
        >>> result.maps[0].heat.shape  # (H, W) of result.image

    Args:
        predictor (Predictor): Model and pipeline.
        image (str | np.ndarray): Path of an image, or an array as
            ``mmcv.imread`` returns it.
        classes (Sequence[int | str], optional): Names or indices of classes.
            A text is a name if there is a class of that name, and otherwise
            an index. Defaults to None: the predicted class for a classifier,
            and at most three predicted classes otherwise, of the largest area
            for a segmentor and of the highest scores for a detector.
        stage (int, optional): Number of a stage of the backbone, 1 to 4,
            whose norm is the layer. Defaults to None, the last stage that is
            used by the head.
        layer (str, optional): Name of a layer of the model, such as
            'backbone.block3.1.norm1' or 'neck.fpn_convs.0'. Its output is a
            map ``(1, C, h, w)`` or the tokens ``(1, h * w, C)`` of a stage.
            Defaults to None, the norm of the stage.

    Returns:
        ActivationMaps: Input of the network, and the maps.

    Raises:
        UserError: If pytorch-grad-cam is missing, the model is not supported,
            a class, stage or layer does not exist or cannot be used, or the
            image cannot be processed.
    """
    grad_cam = _import_grad_cam()
    model = predictor.model
    layer, module = _find_layer(model, stage, layer)
    x, samples = read_input(predictor, image)
    height, width = samples[0].metainfo.get('img_shape', x.shape[2:])[:2]
    size = min(height, x.shape[2]), min(width, x.shape[3])
    network = TASKS[predictor.task](model, samples, size, predictor.score_thr)

    recorder = _Recorder()
    with recorder.watch(model, module):
        with faults_as_user_errors(), torch.no_grad():
            (scores,) = network(x)
    grid = recorder.find_grid(layer)
    if not scores.isfinite().all():
        raise UserError('the scores are not finite')
    if classes is None:
        labels = network.find(scores)[:MAX_CLASSES]
    else:
        count = network.count_classes(scores)
        names = [predictor.name(label) for label in range(count)]
        labels = [_find_class(wanted, names, count) for wanted in classes]

    def to_map(output: Tensor) -> Tensor:
        """Convert an output or its gradient to a map ``(1, C, h, w)``."""
        if output.dim() == 3:
            output = output.transpose(1, 2).unflatten(2, grid)
        # Later layers may modify the output in place.
        return output.detach().float().clone()

    cam = grad_cam(network, [module], reshape_transform=to_map)
    x = x.detach().requires_grad_()
    maps = []
    try:
        with _only_activation_gradients(model), faults_as_user_errors():
            for label in labels:
                target = _Target(network, label)
                heat = _compute(cam, x, target, layer)[: size[0], : size[1]]
                maps.append(
                    ActivationMap(
                        label,
                        predictor.name(label),
                        target.score,
                        target.choice.predicted,
                        target.choice.text,
                        heat,
                    )
                )
    finally:
        cam.activations_and_grads.release()
    picture = to_picture(x.detach(), predictor)[: size[0], : size[1]]
    return ActivationMaps(picture, layer, grid, maps)


def _compute(cam: Any, x: Tensor, target: _Target, layer: str) -> np.ndarray:
    """Compute the map ``(H, W)`` of a target."""
    try:
        (heat,) = cam(input_tensor=x, targets=[target])
    except (AttributeError, IndexError) as error:
        # pytorch-grad-cam does not check that there is a gradient.
        if not cam.activations_and_grads.gradients:
            raise UserError(
                f'the class scores do not depend on the output of {layer}'
            ) from error
        raise
    x.grad = None
    return heat
