"""A sheet of scenes: image, truth and prediction, with a legend."""

from typing import List, Sequence

import matplotlib
import mmcv
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

IGNORED = (0, 0, 0)


def paint(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colour a label map.

    Args:
        labels (np.ndarray): ``(H, W)``, a class a pixel; values outside the
            palette are black.
        palette (Sequence[Sequence[int]]): RGB by class.

    Returns:
        np.ndarray: ``(H, W, 3)``, uint8.
    """
    table = np.full((256, 3), IGNORED, np.uint8)
    table[:len(palette)] = palette
    return table[labels.astype(np.uint8)]


def draw_segmentation_sheet(predictions: List[dict],
                            classes: Sequence[str],
                            palette: Sequence[Sequence[int]],
                            title: str,
                            out: str,
                            rows: int = 6,
                            columns: int = 2) -> None:
    """Draw images beside their true and predicted labels.

    Args:
        predictions (list[dict]): Of ``tools/test.py --out FILE.pkl``, with
            ``img_path``, ``gt_sem_seg`` and ``pred_sem_seg``. Even steps
            through them are shown.
        classes (Sequence[str]): Names by label.
        palette (Sequence[Sequence[int]]): RGB by label.
        title (str): Line above the sheet.
        out (str): The PNG to write.
        rows (int): Rows. Defaults to 6.
        columns (int): Scenes in a row, three pictures each. Defaults to 2.
    """
    figure, axes = plt.subplots(
        rows,
        3 * columns,
        figsize=(5.4 * columns, 1.85 * rows + 0.9),
        squeeze=False,
        layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, name in zip(axes[0], ('image', 'truth', 'prediction') * columns):
        axis.set_title(name, fontsize=11)

    count = min(rows * columns, len(predictions))
    chosen = np.linspace(0, len(predictions) - 1, count).astype(int)
    for place, index in enumerate(chosen):
        sample = predictions[index]
        truth, predicted = (
            sample[key]['data'].squeeze().numpy()
            for key in ('gt_sem_seg', 'pred_sem_seg'))
        pictures = (mmcv.imread(sample['img_path'], channel_order='rgb'),
                    paint(truth, palette), paint(predicted, palette))
        row, first = place // columns, 3 * (place % columns)
        for axis, picture in zip(axes[row, first:first + 3], pictures):
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
        columnspacing=1.2)
    figure.suptitle(title)
    figure.savefig(out, dpi=100)
    plt.close(figure)
