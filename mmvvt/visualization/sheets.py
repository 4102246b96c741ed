"""Grids of test images with ground truth and predictions.

The predictions are read from the file written by ``tools/test.py --out
FILE.pkl``.
"""

from typing import List, Optional, Sequence, Tuple

import mmcv
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .predictions import distinct_colour, draw_detection

Palette = Sequence[Sequence[int]]

RIGHT, WRONG = '#1a7f37', '#cf222e'
IGNORED = (0, 0, 0)
# A detection sheet displays images at about a third of their size.
DETECTION_TEXT_SCALE = 2.0


def _grid(
    rows: int, columns: int, size: Tuple[float, float], title: str
) -> Tuple[Figure, np.ndarray]:
    """Create a figure with a title and a grid of empty axes."""
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    figure.suptitle(title)
    return figure, axes


def _spread(predictions: List[dict], count: int) -> List[dict]:
    """Select at most ``count`` evenly spaced predictions."""
    count = min(count, len(predictions))
    steps = np.linspace(0, len(predictions) - 1, count).astype(int)
    return [predictions[i] for i in steps]


def _name(classes: Sequence[str], label: int) -> str:
    """Return the name of a class; some checkpoints have no names."""
    return str(classes[label]) if label < len(classes) else f'class {label}'


def _complete(palette: Palette, count: int) -> List[Tuple[int, ...]]:
    """Add colours to a palette of fewer than ``count`` colours."""
    missing = range(len(palette), count)
    return [tuple(rgb) for rgb in palette] + [
        distinct_colour(label) for label in missing
    ]


def _read(sample: dict) -> np.ndarray:
    """Read the image of a prediction: ``(H, W, 3)``, uint8, RGB."""
    return mmcv.imread(sample['img_path'], channel_order='rgb')


# -- classification -----------------------------------------------------------


def choose_samples(predictions: List[dict], count: int) -> List[dict]:
    """Select the samples of a classification sheet.

    Args:
        predictions (list[dict]): Predictions with the keys ``gt_label`` and
            ``pred_label``.
        count (int): Maximum number of samples.

    Returns:
        list[dict]: At most ``count`` predictions: wrong predictions first,
        followed by evenly spaced correct predictions.
    """
    right: List[dict] = []
    wrong: List[dict] = []
    for sample in predictions:
        is_right = int(sample['pred_label']) == int(sample['gt_label'])
        (right if is_right else wrong).append(sample)
    wrong = wrong[:count]
    return wrong + _spread(right, count - len(wrong))


def draw_classification_sheet(
    predictions: List[dict],
    classes: Sequence[str],
    title: str,
    out: str,
    columns: int = 8,
    rows: int = 6,
) -> None:
    """Draw images with true label, predicted label and its probability.

    Args:
        predictions (list[dict]): Predictions with the keys ``img_path``,
            ``gt_label``, ``pred_label`` and ``pred_score``.
        classes (Sequence[str]): Class names.
        title (str): Title of the sheet.
        out (str): Path of the PNG file to write.
        columns (int): Number of images per row. Defaults to 8.
        rows (int): Number of rows. Defaults to 6.
    """
    figure, axes = _grid(rows, columns, (1.6 * columns, 2.0 * rows), title)
    for axis, sample in zip(
        axes.flat, choose_samples(predictions, rows * columns)
    ):
        true, predicted = int(sample['gt_label']), int(sample['pred_label'])
        probability = float(sample['pred_score'][predicted])
        is_right = true == predicted
        axis.imshow(_read(sample), interpolation='nearest')
        axis.set_title(
            f'true {_name(classes, true)}\n'
            f'{"predicted" if is_right else "WRONG:"} '
            f'{_name(classes, predicted)}, {probability:.0%}',
            fontsize=10,
            color=RIGHT if is_right else WRONG,
            fontweight='normal' if is_right else 'bold',
        )
    figure.savefig(out, dpi=100)


# -- segmentation -------------------------------------------------------------


def paint(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Convert a segmentation map to an RGB image.

    Args:
        labels (np.ndarray): Segmentation map of shape ``(H, W)``: the class
            index of each pixel. Indices outside the palette become black.
        palette (Sequence[Sequence[int]]): RGB colour of each class.

    Returns:
        np.ndarray: RGB image of shape ``(H, W, 3)``, uint8.
    """
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(palette)] = palette
    return table[labels.astype(np.uint8)]


def draw_segmentation_sheet(
    predictions: List[dict],
    classes: Sequence[str],
    palette: Palette,
    title: str,
    out: str,
    rows: int = 6,
    columns: int = 2,
) -> None:
    """Draw images with their true and predicted segmentation maps.

    Args:
        predictions (list[dict]): Predictions with the keys ``img_path``,
            ``gt_sem_seg`` and ``pred_sem_seg``. The sheet shows an evenly
            spaced subset.
        classes (Sequence[str]): Class names.
        palette (Sequence[Sequence[int]]): RGB colour of each class.
        title (str): Title of the sheet.
        out (str): Path of the PNG file to write.
        rows (int): Number of rows. Defaults to 6.
        columns (int): Number of samples per row; each sample takes three
            pictures. Defaults to 2.
    """
    figure, axes = _grid(
        rows, 3 * columns, (5.4 * columns, 1.85 * rows + 0.9), title
    )
    for axis, name in zip(axes[0], ('image', 'truth', 'prediction') * columns):
        axis.set_title(name, fontsize=11)
    palette = _complete(palette, len(classes))
    for place, sample in enumerate(_spread(predictions, rows * columns)):
        truth, predicted = (
            sample[key]['data'].squeeze().numpy()
            for key in ('gt_sem_seg', 'pred_sem_seg')
        )
        pictures = (
            _read(sample),
            paint(truth, palette),
            paint(predicted, palette),
        )
        row, first = place // columns, 3 * (place % columns)
        for axis, picture in zip(axes[row, first : first + 3], pictures):
            axis.imshow(picture, interpolation='nearest')

    colours = [tuple(channel / 255 for channel in rgb) for rgb in palette]
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor='grey', label=name)
            for name, colour in zip(classes, colours)
        ],
        loc='outside lower center',
        ncols=len(classes),
        fontsize=10,
        handlelength=1,
        columnspacing=1.2,
    )
    figure.savefig(out, dpi=100)


# -- detection ----------------------------------------------------------------


def _masks(run_lengths: Optional[Sequence[dict]]) -> Optional[np.ndarray]:
    """Decode COCO RLE masks to a boolean array ``(n, H, W)``."""
    if not run_lengths:
        return None
    from pycocotools.mask import decode

    # (H, W, n) -> (n, H, W)
    return decode(list(run_lengths)).astype(bool).transpose(2, 0, 1)


def draw_detection_sheet(
    predictions: List[dict],
    classes: Sequence[str],
    palette: Palette,
    title: str,
    score_thr: float,
    out: str,
    rows: int = 4,
    columns: int = 3,
) -> None:
    """Draw images with their true and predicted objects.

    Args:
        predictions (list[dict]): Predictions with the keys ``img_path``,
            ``gt_instances`` and ``pred_instances``. Boxes are (left, top,
            right, bottom) in pixels of the image, masks are COCO RLE. The
            sheet shows an evenly spaced subset.
        classes (Sequence[str]): Class names.
        palette (Sequence[Sequence[int]]): RGB colour of each class.
        title (str): Title of the sheet.
        score_thr (float): Minimum score of the predictions to draw.
        out (str): Path of the PNG file to write.
        rows (int): Number of rows. Defaults to 4.
        columns (int): Number of samples per row; each sample takes two
            pictures. Defaults to 3.
    """
    figure, axes = _grid(
        rows, 2 * columns, (5 * columns, 2.5 * rows + 0.6), title
    )
    for axis, name in zip(axes[0], ('truth', 'prediction') * columns):
        axis.set_title(name, fontsize=11)
    for place, sample in enumerate(_spread(predictions, rows * columns)):
        image = _read(sample)
        row, first = place // columns, 2 * (place % columns)
        for axis, key in zip(
            axes[row, first : first + 2], ('gt_instances', 'pred_instances')
        ):
            found = sample[key]
            labels = np.asarray(found['labels'])
            palette = _complete(palette, 1 + max(labels, default=-1))
            scores: Optional[np.ndarray] = None
            shown: np.ndarray = np.arange(len(labels))
            if 'scores' in found:
                scores = np.asarray(found['scores'])
                # Sort by descending score; the first box is drawn on top.
                order = np.argsort(-scores, kind='stable')
                shown = order[scores[order] >= score_thr]
                scores = scores[shown]
            masks = found.get('masks')
            picture = draw_detection(
                image,
                np.asarray(found['bboxes'])[shown],
                [_name(classes, labels[i]) for i in shown],
                None if scores is None else scores.tolist(),
                [tuple(palette[labels[i]]) for i in shown],
                _masks(None if masks is None else [masks[i] for i in shown]),
                text_scale=DETECTION_TEXT_SCALE,
            )
            axis.imshow(picture)
    figure.savefig(out, dpi=100)
