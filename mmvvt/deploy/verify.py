"""Compare the outputs of an exported file with those of PyTorch."""

from typing import Any, List, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .formats import Runner

# Maximum relative errors of exported files by precision.
TOLERANCES = dict(float32=1e-4, float16=3e-2, int8=0.3)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error ``|found - expected| / |expected|``."""
    found = found.astype(np.float64)
    expected = expected.astype(np.float64)
    norm = max(float(np.linalg.norm(expected)), 1e-12)
    return float(np.linalg.norm(found - expected)) / norm


def _label_map_error(
    found: np.ndarray, expected: np.ndarray, scores: np.ndarray, tie: float
) -> float:
    """Fraction of differing pixels of label maps ``(B, H, W)``.

    Pixels whose two best scores ``(B, K, H, W)`` are closer than ``tie`` do
    not count.
    """
    if scores.shape[1] == 1:
        clear = abs(scores[:, 0] - 0.5) > tie
    else:
        best = np.sort(scores, axis=1)
        clear = best[:, -1] - best[:, -2] > tie
    return float(((found != expected) & clear).mean())


def _box_error(
    found: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    size: int,
    tie: float,
) -> float:
    """Largest distance of a detection to its nearest counterpart.

    The order of boxes with equal scores may differ, so each detection is
    compared with all of the other side. Detections with the lowest scores may
    be cut off on one side only, and do not count.
    """

    def rows(outs):  # (M, 6): boxes as fractions of the image, score, label
        boxes, scores, labels = outs
        table = np.concatenate(
            [boxes / size, scores[:, None], labels[:, None]], axis=1
        )
        return table[scores > 0]

    ours, theirs = rows(found), rows(expected)
    if not len(ours) or not len(theirs):
        return 0.0 if len(ours) == len(theirs) else float('inf')
    distance = abs(ours[:, None] - theirs[None]).max(axis=-1)
    lowest = max(ours[:, 4].min(), theirs[:, 4].min()) + tie
    errors = [
        *distance.min(axis=1)[ours[:, 4] > lowest],
        *distance.min(axis=0)[theirs[:, 4] > lowest],
    ]
    return float(max(errors, default=0.0))


def _outputs(network: Any, images: Tensor) -> List[np.ndarray]:
    with torch.no_grad():
        outs = network(images)
    return [t.numpy() for t in ((outs,) if isinstance(outs, Tensor) else outs)]


def compare(
    run: Runner,
    network: Any,
    scores_network: Any,
    images: Tensor,
    precision: str,
) -> float:
    """Run images in both and compute the largest error of an output.

    Args:
        run (Callable): Function that runs the exported file.
        network (Network): The network in PyTorch.
        scores_network (Network, optional): If the network returns label maps,
            one that returns scores.
        images (Tensor): Images ``(B, C, H, W)``.
        precision (str): 'float32', 'float16' or 'int8'.

    Returns:
        float: Largest relative error. For label maps, the fraction of pixels
        that differ, and for detections the largest distance to a counterpart;
        ties within the tolerance do not count. Infinity if a shape differs or
        an output is not finite.
    """
    found = run(images.numpy())
    expected = _outputs(network, images)
    if [a.shape for a in found] != [b.shape for b in expected] or not all(
        np.isfinite(a).all() for a in found
    ):
        return float('inf')
    tie = TOLERANCES[precision]
    names = network.output_names
    if names == ['label_map']:
        (scores,) = _outputs(scores_network, images)
        return _label_map_error(found[0], expected[0], scores, tie)
    if names == ['boxes', 'scores', 'labels']:
        if precision != 'float32':
            # A small error of a score can change which boxes are suppressed.
            return _relative(found[1], expected[1])
        return _box_error(found, expected, max(images.shape[2:]), tie)
    return max(_relative(a, b) for a, b in zip(found, expected))


def verification_shapes(
    channels: int,
    size: Tuple[int, int],
    fixed_size: bool,
    fixed_batch: bool,
    min_size: int = 32,
) -> List[Tuple[int, int, int, int]]:
    """Return shapes of images that differ from the exported example.

    If the size is dynamic, the last one is the smallest image.
    """
    sizes = [(96, 160), (75, 45), (min_size, min_size)]
    if fixed_size:
        sizes = [size, size]
    batches = [1, 1, 1] if fixed_batch else [1, 3, 2]
    return [(b, channels, *hw) for b, hw in zip(batches, sizes)]
