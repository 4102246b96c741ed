"""Picture of attention maps on an image."""

from typing import Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure

from .predictions import fit

Panel = Tuple[str, np.ndarray]


def draw_attention(
    image: np.ndarray,
    rows: Sequence[Tuple[str, Tuple[float, float], Sequence[Panel]]],
    title: str,
    out: str,
) -> None:
    """Draw attention maps as heat maps on an image, one row for each query.

    The colours of each map extend from 0 to its maximum, which is written
    above it. Maps are not smoothed: each cell is one token.

    Args:
        image (np.ndarray): RGB image of shape ``(H, W, 3)``, uint8.
        rows (Sequence[tuple]): For each row, its label, the query as
            fractions ``(x, y)`` of width and height, and its panels: the name
            of each map and the map, of shape ``(h, w)``. All rows have the
            same number of panels.
        title (str): Title of the picture.
        out (str): Path of the PNG file to write.
    """
    picture = fit(image)
    height, width = picture.shape[:2]
    columns = 1 + len(rows[0][2])
    cell = (2.4, 2.4 * height / width)
    figure = Figure(
        figsize=(cell[0] * columns, (cell[1] + 0.45) * len(rows) + 0.5),
        layout='constrained',
    )
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, (x, y), panels) in zip(axes, rows):
        grey = picture.mean(axis=2)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.imshow(picture if axis is line[0] else grey, cmap='gray')
            axis.plot(
                x * width - 0.5,
                y * height - 0.5,
                marker='o',
                color='none',
                markeredgecolor='#00e5ff',
                markersize=7,
                markeredgewidth=1.8,
            )
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        line[0].set_title(label, fontsize=9, parse_math=False)
        for axis, (name, heat) in zip(line[1:], panels):
            axis.imshow(
                heat,
                cmap='inferno',
                vmin=0,
                alpha=0.75,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation='nearest',
            )
            axis.set_title(f'{name}\nmaximum {heat.max():.3g}', fontsize=8)
    figure.savefig(out, dpi=100, format='png')
