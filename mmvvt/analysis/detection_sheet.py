"""A sheet of images: true boxes and masks beside predicted ones."""

from typing import List, Sequence

import matplotlib
import mmcv
import numpy as np
from pycocotools.mask import decode

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def _draw_instances(axis, image: np.ndarray, instances: dict,
                    classes: Sequence[str],
                    palette: Sequence[Sequence[int]]) -> None:
    boxes, labels = (np.asarray(instances[k]) for k in ('bboxes', 'labels'))
    scores = instances.get('scores')
    image = image.astype(np.float32)
    for run_lengths, label in zip(instances.get('masks', []), labels):
        mask = decode(run_lengths).astype(bool)  # (H, W)
        image[mask] = 0.45 * image[mask] + 0.55 * np.array(palette[label])
    axis.imshow(image.astype(np.uint8), interpolation='nearest')
    for index, (box, label) in enumerate(zip(boxes, labels)):
        colour = tuple(channel / 255 for channel in palette[label])
        left, top, right, bottom = box
        axis.add_patch(
            plt.Rectangle((left - 0.5, top - 0.5),
                          right - left,
                          bottom - top,
                          fill=False,
                          linewidth=1.4,
                          edgecolor=colour))
        text = classes[label]
        if scores is not None:
            text += f' {float(scores[index]):.2f}'
        axis.text(
            left,
            max(top - 1, 8),
            text,
            fontsize=7,
            color='white',
            verticalalignment='bottom',
            bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))
    height, width = image.shape[:2]
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def draw_detection_sheet(predictions: List[dict],
                         classes: Sequence[str],
                         palette: Sequence[Sequence[int]],
                         title: str,
                         score_thr: float,
                         out: str,
                         rows: int = 4,
                         columns: int = 3) -> None:
    """Draw images with their true and with their predicted instances.

    Args:
        predictions (list[dict]): Of ``tools/test.py --out FILE.pkl``, with
            ``img_path``, ``gt_instances`` and ``pred_instances``; boxes are
            ``(left, top, right, bottom)`` in pixels of the image, masks
            COCO's run lengths. Even steps through them are shown.
        classes (Sequence[str]): Names by label.
        palette (Sequence[Sequence[int]]): RGB by label.
        title (str): Line above the sheet.
        score_thr (float): Least score of a prediction that is drawn.
        out (str): The PNG to write.
        rows (int): Rows. Defaults to 4.
        columns (int): Images in a row, two pictures each. Defaults to 3.
    """
    figure, axes = plt.subplots(
        rows,
        2 * columns,
        figsize=(5 * columns, 2.5 * rows + 0.6),
        squeeze=False,
        layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, name in zip(axes[0], ('truth', 'prediction') * columns):
        axis.set_title(name, fontsize=11)

    count = min(rows * columns, len(predictions))
    chosen = np.linspace(0, len(predictions) - 1, count).astype(int)
    for place, index in enumerate(chosen):
        sample = predictions[index]
        image = mmcv.imread(sample['img_path'], channel_order='rgb')
        found = sample['pred_instances']
        scores = np.asarray(found['scores'])
        sure = np.argsort(scores, kind='stable')  # the best come to lie on top
        sure = sure[scores[sure] >= score_thr]
        found = {
            key: [values[i] for i in sure]
            if isinstance(values, list) else values[sure]
            for key, values in found.items()
        }
        row, first = place // columns, 2 * (place % columns)
        for axis, instances in zip(axes[row, first:first + 2],
                                   (sample['gt_instances'], found)):
            _draw_instances(axis, image, instances, classes, palette)
    figure.suptitle(title)
    figure.savefig(out, dpi=100)
    plt.close(figure)
