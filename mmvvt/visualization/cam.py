"""Picture of class activation maps on images."""

from typing import Any, Sequence, Tuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .predictions import fit, shorten

Panel = Tuple[str, np.ndarray]

COLOURS = 'inferno'
MAX_LENGTH = 36  # maximum number of characters of a line above a panel
# Opacity of the lowest and of the highest value of a map
OPACITY = (0.25, 0.75)


def draw_activation_maps(
    rows: Sequence[Tuple[str, np.ndarray, Sequence[Panel]]],
    title: str,
    out: str,
) -> None:
    """Draw class activation maps as heat maps on images, one row per image.

    A row shows the image, and the heat map of each class on the image in
    grey. The colours of each map extend from 0 to 1; low values are more
    transparent.

    Args:
        rows (Sequence[tuple]): For each row, its label, an RGB image of shape
            ``(H, W, 3)``, uint8, and its panels: the name of each map and the
            map, of shape ``(H, W)``, from 0 to 1. Rows may have different
            numbers of panels. Labels and names may have several lines; long
            lines are shortened.
        title (str): Title of the picture.
        out (str): Path of the PNG file to write.
    """
    columns = 1 + max(len(panels) for _, _, panels in rows)
    heights = [
        # A very tall image does not make its row taller than that.
        2.3 * min(image.shape[0] / image.shape[1], 2.0) + 0.5
        for _, image, _ in rows
    ]
    figure = Figure(
        figsize=(2.4 * columns + 0.8, sum(heights) + 0.5), layout='constrained'
    )
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw=dict(height_ratios=heights),
    )
    style: Any = dict(fontsize=8, parse_math=False)
    low, high = OPACITY
    for axis in axes.flat:
        axis.axis('off')
    for line, (label, image, panels) in zip(axes, rows):
        picture = fit(image)
        line[0].imshow(picture)
        line[0].set_title(_shorten_lines(label), **style)
        for axis, (name, heat) in zip(line[1:], panels):
            axis.imshow(picture.mean(axis=2), cmap='gray', vmin=0, vmax=255)
            axis.imshow(
                heat,
                cmap=COLOURS,
                vmin=0,
                vmax=1,
                alpha=low + (high - low) * np.clip(heat, 0, 1),
                extent=(
                    -0.5,
                    picture.shape[1] - 0.5,
                    picture.shape[0] - 0.5,
                    -0.5,
                ),
            )
            axis.set_title(_shorten_lines(name), **style)
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 1), COLOURS),
        ax=axes,
        shrink=min(0.8, 2 / sum(heights)),
        aspect=15,
    )
    scale.set_label('activation, scaled for each map', fontsize=8)
    figure.savefig(out, dpi=100, format='png')


def _shorten_lines(text: str) -> str:
    return '\n'.join(shorten(line, MAX_LENGTH) for line in text.split('\n'))
