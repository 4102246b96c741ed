"""Attention maps of a trained model for one image."""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import torch

from ..analysis.attention import AttentionMap, attention_map
from ..errors import UserError
from ..models import VVT, VicinityAttention
from ..models.vvt import VVTBlock
from .predictor import Predictor, faults_as_user_errors


class AttentionMaps(NamedTuple):
    """Result of :func:`attention_maps`.

    Attributes:
        image (np.ndarray): Input of the network as RGB image ``(H, W, 3)``,
            uint8.
        maps (list[dict[str, AttentionMap]]): For each point, the maps of the
            blocks by their names.
    """

    image: np.ndarray
    maps: List[Dict[str, AttentionMap]]


def find_backbone(model: Any) -> Tuple[str, VVT]:
    """Find the backbone of a model.

    Args:
        model (nn.Module): A classifier, segmentor or detector.

    Returns:
        tuple[str, VVT]: Name of the backbone in the model, and the backbone.

    Raises:
        UserError: If the model has no VVT backbone.
    """
    for name, module in model.named_modules():
        if isinstance(module, VVT):
            return name, module
    raise UserError('the model has no VVT backbone')


def _find_blocks(model: Any, names: Sequence[str]) -> Tuple[VVT, dict]:
    _, backbone = find_backbone(model)
    blocks = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, VVTBlock)
    }
    for name in names:
        if name not in blocks:
            raise UserError(
                f'no block {name}; the blocks are {", ".join(blocks)}'
            )
        attn: Any = blocks[name].attn
        if not isinstance(attn, VicinityAttention):
            raise UserError(
                f'{name} has no attention maps: its attention is a '
                f'{type(attn).__name__}'
            )
    return backbone, {name: blocks[name] for name in names}


def read_input(
    predictor: Predictor, image: Union[str, np.ndarray]
) -> Tuple[torch.Tensor, list]:
    """Transform an image as the test pipeline and the preprocessor do.

    Args:
        predictor (Predictor): Model and pipeline.
        image (str | np.ndarray): Path of an image, or an array as
            ``mmcv.imread`` returns it.

    Returns:
        tuple[Tensor, list]: Input ``(1, C, H, W)`` of the network, and the
        data samples.

    Raises:
        UserError: If the image cannot be processed. The message names it.
    """
    try:
        batch, _ = predictor.pipeline(image)
    except UserError as error:
        if isinstance(image, str):
            raise UserError(f'{image}: {error}') from error
        raise
    predictor.check_channels(batch)
    with faults_as_user_errors(), torch.no_grad():
        data = predictor.model.data_preprocessor(batch, False)
    return data['inputs'], data['data_samples']


def to_picture(x: torch.Tensor, predictor: Predictor) -> np.ndarray:
    """Convert the input of a network to an RGB image.

    Args:
        x (Tensor): Normalised input ``(1, C, H, W)`` of the network.
        predictor (Predictor): Its mean, standard deviation and order of
            channels are used.

    Returns:
        np.ndarray: RGB image of shape ``(H, W, 3)``, uint8.
    """
    preprocessor: Any = predictor.model.data_preprocessor
    x = x[0].float().cpu()
    if hasattr(preprocessor, 'mean'):
        # mean and std have the shape (C, 1, 1)
        x = x * preprocessor.std.cpu() + preprocessor.mean.cpu()
    low, high = x.min(), x.max()
    if low < -0.5 or high > 255.5:  # more than 8 bits
        x = (x - low) * (255 / (high - low).clamp(min=1e-12))
    # (C, H, W) -> (H, W, C)
    picture = x.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if picture.shape[2] < 3:
        return picture[..., :1].repeat(3, axis=2)
    picture = picture[..., :3]
    is_rgb = predictor.pipeline.network_sees_rgb
    return np.ascontiguousarray(picture if is_rgb else picture[..., ::-1])


def attention_maps(
    predictor: Predictor,
    image: Union[str, np.ndarray],
    blocks: Sequence[str],
    points: Sequence[Tuple[float, float]],
) -> AttentionMaps:
    """Compute where query pixels of an image attend to.

    The image is transformed by the test pipeline of the config, and the maps
    are computed from the tokens that the backbone computes for it. The
    backbone is applied to the whole image, also if a segmentor's config says
    ``mode='slide'``, and without test-time augmentation.

    Examples:
        >>> predictor = Predictor(config, checkpoint)
        >>> result = attention_maps(
        ...     predictor, 'photo.jpg', ['block3.1'], [(0.5, 0.5)])
        >>> result.maps[0]['block3.1'].attention.shape  # (heads, h, w)

    Args:
        predictor (Predictor): Model and pipeline.
        image (str | np.ndarray): Path of an image, or an array as
            ``mmcv.imread`` returns it.
        blocks (Sequence[str]): Names of blocks of the backbone, such as
            'block3.1' for the second block of the third stage.
        points (Sequence[tuple[float, float]]): Query pixels as fractions
            ``(x, y)`` of the width and height of the network's input, from 0
            to 1.

    Returns:
        AttentionMaps: Input of the network, and the maps.

    Raises:
        UserError: If the model has no VVT backbone, a block does not exist or
            has a global context block in place of attention, a point is
            outside the image, or the image cannot be processed.
    """
    for x, y in points:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(
                f'a point must have x and y from 0 to 1, got ({x:g}, {y:g})'
            )
    backbone, found = _find_blocks(predictor.model, blocks)
    maps: List[Dict[str, AttentionMap]] = [{} for _ in points]

    def compute(name):
        def hook(attn, args):
            tokens, (height, width) = args
            for (x, y), result in zip(points, maps):
                query = (
                    min(int(y * height), height - 1),
                    min(int(x * width), width - 1),
                )
                result[name] = attention_map(
                    attn, tokens, (height, width), query
                )

        return hook

    inputs, _ = read_input(predictor, image)
    # With a hook, the block calls its layers instead of running in strips.
    handles = [
        block.attn.register_forward_pre_hook(compute(name))
        for name, block in found.items()
    ]
    try:
        with faults_as_user_errors(), torch.no_grad():
            backbone(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return AttentionMaps(to_picture(inputs, predictor), maps)
