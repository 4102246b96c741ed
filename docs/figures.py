"""Draw the figures of the documentation: ``python docs/figures.py``.

The vicinity weights are those of the reference implementation, and the speed
and memory are those of the CSV files in benchmarks/.
"""

import sys
from pathlib import Path
from typing import Dict, List

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from mmvvt.analysis.benchmark import Row, read_csv
from mmvvt.ops.reference import vicinity_weight

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / 'docs' / 'images'
RESULTS = ['cpu_224_512.csv', 'cpu_1024_2048.csv']
GRID = (28, 28)  # of stage 2 at 224 x 224 pixels
NAMES = {
    'vvt-small': ('VVT-small', '#1f5fbf', '-'),
    'vvt-small-plain': ('reference impl.', '#1f5fbf', ':'),
    'swin-tiny': ('Swin-T', '#b8860b', '-'),
    'convnext-tiny': ('ConvNeXt-T', '#2e8b57', '-'),
    'pvtv2-b2': ('PVTv2-B2', '#b03060', '-'),
    'twins-svt-small': ('Twins-SVT-S', '#7a5fa8', '-'),
    'resnet-50': ('ResNet-50', '#707070', '-'),
}


def save(figure: Figure, path: Path) -> None:
    # The same figure is the same file.
    with matplotlib.rc_context({'svg.hashsalt': path.name}):
        figure.savefig(path, metadata={'Date': None}, bbox_inches='tight')


def weight_map(token: tuple, locality: str) -> torch.Tensor:
    """Vicinity weight between a token and all others, ``(h, w)``."""
    h, w = GRID
    like = torch.empty(0, dtype=torch.float64)
    weights = vicinity_weight(GRID, GRID, locality, like)  # (N, N)
    return weights[token[0] * w + token[1]].reshape(h, w)


def draw_maps(panels: List[tuple], path: Path, relative: bool = False) -> None:
    """Draw one map for each (title, token, locality).

    Args:
        panels (list[tuple]): Titles, tokens as (row, column) and localities.
        path (Path): SVG file to write.
        relative (bool): Divide each map by its weight at the token.
            Defaults to False.
    """
    figure = Figure(
        figsize=(2.5 * len(panels) + 0.8, 2.8), layout='constrained'
    )
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, token, locality) in zip(axes, panels):
        weights = weight_map(token, locality)
        if relative:
            weights = weights / weights[token]
        image = axis.imshow(weights, vmin=0, vmax=1 if relative else 2)
        axis.plot(
            token[1], token[0], 'o', color='white', markeredgecolor='black'
        )
        axis.set_title(title, fontsize=10)
        axis.set_xticks([0, 14, 27])
        axis.set_yticks([0, 14, 27])
        axis.tick_params(labelsize=8)
    label = 'relative weight' if relative else 'weight'
    figure.colorbar(image, ax=axes, shrink=0.85, label=label)
    save(figure, path)


def ends_apart(values: Dict[str, float], gap: float) -> Dict[str, float]:
    """Move labels apart, so that neighbours differ by a factor of ``gap``."""
    placed: Dict[str, float] = {}
    last = None
    for name in sorted(values, key=values.__getitem__):
        last = values[name] if last is None else max(values[name], last * gap)
        placed[name] = last
    return placed


def draw_lines(rows: List[Row], what: str, path: Path, gap: float) -> None:
    """Draw the speed or the peak memory of a forward pass by image size."""
    figure = Figure(figsize=(5, 3.4), layout='tight')
    axis = figure.subplots()
    ends = {}
    for model, (_, color, style) in NAMES.items():
        picked = sorted(
            (r for r in rows if r.model == model and r.mode == 'forward'),
            key=lambda r: r.side,
        )
        values = [
            r.peak_gib
            if what == 'memory'
            else r.batch * r.side**2 / 1e6 / r.seconds
            for r in picked
        ]
        axis.plot(
            [r.side for r in picked],
            values,
            style,
            color=color,
            marker='o',
            markersize=4,
            linewidth=3 if model == 'vvt-small' else 1.5,
        )
        ends[model] = values[-1]
    for model, y in ends_apart(ends, gap).items():
        label, color, _ = NAMES[model]
        weight = 'bold' if model == 'vvt-small' else 'normal'
        axis.text(
            2048 * 1.06, y, label, color=color, va='center', weight=weight
        )
    axis.set_xscale('log', base=2)
    axis.set_yscale('log')
    sides = sorted({r.side for r in rows})
    axis.set_xticks(sides, [f'{s}²' for s in sides])
    ticks = [0.05, 0.1, 0.2, 0.5] if what == 'speed' else [1, 2, 4, 8]
    axis.set_yticks(ticks)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axis.set_xlabel('pixels of an image')
    axis.set_title(
        'megapixels per second'
        if what == 'speed'
        else 'peak memory of the process (GiB)',
        fontsize=11,
    )
    axis.grid(True, alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    save(figure, path)


def main(folder: Path = IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    middle, corner = (10, 12), (25, 3)
    draw_maps(
        [
            ('a token', middle, 'sum'),
            ('a token near the corner', corner, 'sum'),
        ],
        folder / 'vicinity.svg',
    )
    draw_maps(
        [
            ("'sum'", middle, 'sum'),
            ("'product'", middle, 'product'),
            ("'1d'", middle, '1d'),
        ],
        folder / 'localities.svg',
        relative=True,
    )
    rows = [
        row for name in RESULTS for row in read_csv(ROOT / 'benchmarks' / name)
    ]
    draw_lines(rows, 'speed', folder / 'speed.svg', gap=1.2)
    draw_lines(rows, 'memory', folder / 'memory.svg', gap=1.16)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
