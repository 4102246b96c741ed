"""Plot of a sweep: the cost of models against the image size."""

from typing import List

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..analysis.sweep import OUT_OF_MEMORY, Growth, SweepRow
from ..errors import UserError
from ..fileio import atomic_write

SUFFIXES = ('.png', '.svg')
# Panels: attribute of a row, quantity of the exponent, label and divisor.
PANELS = (
    ('multiply_adds', 'multiply_adds', 'multiply-adds (G)', 1e9),
    ('activations', 'activations', 'activations (M)', 1e6),
    ('peak_gib', 'memory_gib', 'peak memory of the process (GiB)', 1.0),
    ('seconds', 'seconds', 'seconds per forward pass', 1.0),
)
MEASURED_PANELS = ('peak_gib', 'seconds')
# Height of the marks of models out of memory, as a fraction of the panel, and
# the distance between those of two models.
TOP, STEP = 0.96, 0.045
# Factor by which the panels extend above the largest value, for these marks.
MARGIN = 6


def check_picture(path: str) -> None:
    """Check the suffix of the path of a plot.

    Args:
        path (str): Path of the plot.

    Raises:
        UserError: If the suffix is not one of :data:`SUFFIXES`.
    """
    if not path.lower().endswith(SUFFIXES):
        raise UserError(
            f'the plot must be a file with the suffix '
            f'{" or ".join(SUFFIXES)}, got {path}'
        )


def plot_sweep(
    rows: List[SweepRow], growth: List[Growth], path: str
) -> Figure:
    """Plot multiply-adds, activations, peak memory and latency.

    Each model is a line in each panel. The legends list the growth exponents
    of the models. A cross at the top marks an image size at which a model is
    out of memory. A vertical bar is the range from the 20th to the 80th
    percentile of the latency.

    Args:
        rows (list[SweepRow]): Rows of one machine, at least one.
        growth (list[Growth]): Exponents of the rows, see
            :func:`mmvvt.analysis.sweep.fit_growth`.
        path (str): Path of the PNG or SVG file to write.

    Returns:
        Figure: The figure that was written.

    Raises:
        UserError: If the path has another suffix.
        WriteError: If the file cannot be written.
    """
    check_picture(path)
    models = list(dict.fromkeys(row.model for row in rows))
    sides = sorted({row.side for row in rows})
    exponents = {(g.model, g.quantity): g.exponent for g in growth}
    figure = Figure(figsize=(13, 9.5))
    for axis, (name, quantity, label, divisor) in zip(
        figure.subplots(2, 2).flat, PANELS
    ):
        for index, model in enumerate(models):
            own = sorted(
                (row for row in rows if row.model == model),
                key=lambda row: row.side,
            )
            known = [row for row in own if getattr(row, name) is not None]
            exponent = exponents.get((model, quantity))
            shown = 'N/A' if exponent is None else f'{exponent:.2f}'
            axis.plot(
                [row.side for row in known],
                [getattr(row, name) / divisor for row in known],
                color=f'C{index}',
                linewidth=2.5 if model.startswith('vvt') else 1.3,
                marker='o',
                markersize=4,
                label=f'{model}: {shown}',
            )
            if name == 'seconds':
                axis.vlines(
                    [row.side for row in known],
                    [row.seconds_p20 for row in known],
                    [row.seconds_p80 for row in known],
                    color=f'C{index}',
                )
            lost = [row.side for row in own if row.status == OUT_OF_MEMORY]
            if lost and name in MEASURED_PANELS:
                axis.plot(
                    lost,
                    [TOP - STEP * index] * len(lost),
                    color=f'C{index}',
                    linestyle='',
                    marker='X',
                    markersize=8,
                    label=f'{model}: out of memory',
                    # x in pixels of the image, y as a fraction of the panel
                    transform=axis.get_xaxis_transform(),
                )
        axis.set_xscale('log', base=2)
        axis.set_yscale('log')
        if name in MEASURED_PANELS:
            axis.set_ylim(top=axis.get_ylim()[1] * MARGIN)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f'{value:g}')
        )
        axis.set_xticks(sides)
        axis.set_xticklabels([str(side) for side in sides], rotation=45)
        axis.set_xlim(sides[0] / 1.1, sides[-1] * 1.1)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel('height and width of the image (pixels)')
        axis.set_ylabel(label)
        axis.grid(True, which='both', alpha=0.25)
        axis.legend(
            title='memory of the pass' if name == 'peak_gib' else None,
            title_fontsize=8,
            fontsize=8,
            loc='upper left',
        )
    figure.suptitle(
        'One image, float32, forward pass. The legends list the growth '
        'exponents: 1 is linear in the number of pixels.\n'
        f'{rows[0].machine}; memory limit '
        f'{max(row.limit_gib for row in rows):.3g} GiB',
        fontsize=9,
    )
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path[-3:].lower())
    return figure
