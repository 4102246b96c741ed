"""Plot of an ablation study: every run as a point."""

import math
from typing import Sequence

from matplotlib.figure import Figure

from ..analysis.ablation import Summary


def plot_ablation(
    summaries: Sequence[Summary], metric: str, title: str, out: str
) -> None:
    """Draw the runs of each variant in a row: points, and their mean.

    Args:
        summaries (Sequence[Summary]): Variants, from top to bottom.
        metric (str): Name of the metric, the label of the axis.
        title (str): Title of the picture.
        out (str): Path of the PNG file to write.
    """
    figure = Figure(
        figsize=(7, 1.1 + 0.36 * len(summaries)), layout='constrained'
    )
    axis = figure.subplots()
    for row, summary in enumerate(summaries):
        axis.plot(
            summary.values,
            [row] * len(summary.values),
            'o',
            color='C0',
            alpha=0.6,
            markersize=6,
        )
        axis.plot([summary.mean], [row], '|', color='black', markersize=16)
        std = '' if math.isnan(summary.std) else f' \u00b1 {summary.std:#.2g}'
        axis.annotate(
            f'{summary.mean:#.4g}{std}',
            (1.01, row),
            xycoords=('axes fraction', 'data'),
            va='center',
            fontsize=9,
        )
    axis.set_yticks(range(len(summaries)), [s.variant for s in summaries])
    axis.set_ylim(len(summaries) - 0.4, -0.6)
    axis.set_xlabel(f'{metric} (points: seeds, bar: mean)')
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110, format='png')
