"""Sheets of several test images: ground truth and predictions.

Predictions are those of ``tools/test.py --out FILE.pkl``.
"""

from typing import List, Optional, Sequence, Tuple

import mmcv
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .predictions import draw_detection

Palette = Sequence[Sequence[int]]

RIGHT, WRONG = '#1a7f37', '#cf222e'
IGNORED = (0, 0, 0)
# Pictures of a detection sheet are shown at about a third of their size.
DETECTION_TEXT_SCALE = 2.0


def _grid(
    rows: int, columns: int, size: Tuple[float, float], title: str
) -> Tuple[Figure, np.ndarray]:
    """A figure with a title and empty axes, ``(rows, columns)``."""
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    figure.suptitle(title)
    return figure, axes


def _spread(predictions: List[dict], count: int) -> List[dict]:
    """At most ``count`` of the predictions, at even steps."""
    count = min(count, len(predictions))
    steps = np.linspace(0, len(predictions) - 1, count).astype(int)
    return [predictions[i] for i in steps]


def _read(sample: dict) -> np.ndarray:
    """The image of a prediction, ``(H, W, 3)``, uint8, RGB."""
    return mmcv.imread(sample['img_path'], channel_order='rgb')


# -- classification -----------------------------------------------------------


def choose_samples(predictions: List[dict], count: int) -> List[dict]:
    """Choose what a classification sheet shows.

    Args:
        predictions (list[dict]): With ``gt_label`` and ``pred_label``.
        count (int): How many to show.

    Returns:
        list[dict]: At most ``count`` of them: the wrong ones first, then
        right ones at even steps.
    """
    right, wrong = [], []
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
        predictions (list[dict]): With ``img_path``, ``gt_label``,
            ``pred_label`` and ``pred_score``.
        classes (Sequence[str]): Names by label.
        title (str): Line above the sheet.
        out (str): The PNG to write.
        columns (int): Images in a row. Defaults to 8.
        rows (int): Rows. Defaults to 6.
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
            f'true {classes[true]}\n'
            f'{"predicted" if is_right else "WRONG:"} {classes[predicted]}, '
            f'{probability:.0%}',
            fontsize=10,
            color=RIGHT if is_right else WRONG,
            fontweight='normal' if is_right else 'bold',
        )
    figure.savefig(out, dpi=100)


# -- segmentation -------------------------------------------------------------


def paint(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Colour a label map.

    Args:
        labels (np.ndarray): ``(H, W)``, the class of each pixel; values
            outside the palette are black.
        palette (Sequence[Sequence[int]]): RGB by class.

    Returns:
        np.ndarray: ``(H, W, 3)``, uint8.
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
    """Draw images beside their true and predicted labels.

    Args:
        predictions (list[dict]): With ``img_path``, ``gt_sem_seg`` and
            ``pred_sem_seg``; the sheet shows some of them, at even steps.
        classes (Sequence[str]): Names by label.
        palette (Sequence[Sequence[int]]): RGB by label.
        title (str): Line above the sheet.
        out (str): The PNG to write.
        rows (int): Rows. Defaults to 6.
        columns (int): Images in a row, three pictures each. Defaults to 2.
    """
    figure, axes = _grid(
        rows, 3 * columns, (5.4 * columns, 1.85 * rows + 0.9), title
    )
    for axis, name in zip(axes[0], ('image', 'truth', 'prediction') * columns):
        axis.set_title(name, fontsize=11)
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
    """COCO's run lengths of n masks as boolean ``(n, H, W)``."""
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
    """Draw images with their true and with their predicted objects.

    Args:
        predictions (list[dict]): With ``img_path``, ``gt_instances`` and
            ``pred_instances``; boxes are ``(left, top, right, bottom)`` in
            pixels of the image, masks COCO's run lengths. The sheet shows
            some of them, at even steps.
        classes (Sequence[str]): Names by label.
        palette (Sequence[Sequence[int]]): RGB by label.
        title (str): Line above the sheet.
        score_thr (float): Minimum score of a prediction that is drawn.
        out (str): The PNG to write.
        rows (int): Rows. Defaults to 4.
        columns (int): Images in a row, two pictures each. Defaults to 3.
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
            scores, shown = None, range(len(labels))
            if 'scores' in found:
                scores = np.asarray(found['scores'])
                # The highest scores first; the first box is drawn on top.
                order = np.argsort(-scores, kind='stable')
                shown = order[scores[order] >= score_thr]
                scores = scores[shown]
            masks = found.get('masks')
            picture = draw_detection(
                image,
                np.asarray(found['bboxes'])[list(shown)],
                [str(classes[labels[i]]) for i in shown],
                scores,
                [tuple(palette[labels[i]]) for i in shown],
                _masks(None if masks is None else [masks[i] for i in shown]),
                text_scale=DETECTION_TEXT_SCALE,
            )
            axis.imshow(picture)
    figure.savefig(out, dpi=100)
