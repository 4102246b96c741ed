"""A sheet of test images with what the classifier says of them."""

from typing import List, Sequence

import matplotlib
import mmcv
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

RIGHT, WRONG = '#1a7f37', '#cf222e'


def choose_samples(predictions: List[dict], count: int) -> List[dict]:
    """Pick what the sheet shows: the wrong ones first, then even steps.

    Args:
        predictions (list[dict]): Of ``tools/test.py --out FILE.pkl``.
        count (int): How many to show.

    Returns:
        list[dict]: At most ``count`` of them.
    """
    wrong, right = [], []
    for sample in predictions:
        is_right = int(sample['pred_label']) == int(sample['gt_label'])
        (right if is_right else wrong).append(sample)
    wrong = wrong[:count]
    room = min(count - len(wrong), len(right))
    steps = np.linspace(0, len(right) - 1, room).astype(int)
    return wrong + [right[i] for i in steps]


def draw_sheet(predictions: List[dict],
               classes: Sequence[str],
               title: str,
               out: str,
               columns: int = 8,
               rows: int = 6) -> None:
    """Draw images with true label, predicted label and its probability.

    Args:
        predictions (list[dict]): Of ``tools/test.py --out FILE.pkl``, with
            ``img_path``, ``gt_label``, ``pred_label`` and ``pred_score``.
        classes (Sequence[str]): Names by label.
        title (str): Line above the sheet.
        out (str): The PNG to write.
        columns (int): Images in a row. Defaults to 8.
        rows (int): Rows. Defaults to 6.
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 2.0 * rows),
        layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    samples = choose_samples(predictions, rows * columns)
    for axis, sample in zip(axes.flat, samples):
        true, predicted = int(sample['gt_label']), int(sample['pred_label'])
        probability = float(sample['pred_score'][predicted])
        image = mmcv.imread(sample['img_path'], channel_order='rgb')
        axis.imshow(image, interpolation='nearest')
        is_right = true == predicted
        axis.set_title(
            f'true {classes[true]}\n'
            f'{"says" if is_right else "WRONG:"} {classes[predicted]}, '
            f'{probability:.0%}',
            fontsize=10,
            color=RIGHT if is_right else WRONG,
            fontweight='normal' if is_right else 'bold')
    figure.suptitle(title)
    figure.savefig(out, dpi=100)
    plt.close(figure)
