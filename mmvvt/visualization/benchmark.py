"""Plot of a benchmark: speed and memory against the image size."""

from typing import Any, Dict, List

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..analysis.benchmark import Row

# Line styles and markers of engines. PyTorch's line is solid or, for the
# reference implementation, dashed.
LINES = dict(compiled=':', onnxruntime='-.', openvino='-.')
MARKERS = dict(onnxruntime='^', openvino='s')
TITLES = dict(forward='forward pass', train_step='training step')


def _base(model: str) -> str:
    return model.removesuffix('-plain').removesuffix('-triton')


def plot_benchmark(rows: List[Row], path: str) -> None:
    """Plot megapixels per second, and peak memory where it was measured.

    Each model and engine is one line, with a bar from the 20th to the 80th
    percentile. VVT models are drawn with thicker lines, the reference
    implementation with dashed lines, the Triton kernels with diamonds as
    markers, compiled models with dotted lines, and models in ONNX Runtime and
    OpenVINO with dash-dotted lines and triangles and squares as markers.

    Args:
        rows (list[Row]): Rows returned by
            :func:`mmvvt.analysis.benchmark.read_csv`.
        path (str): Path of the PNG or SVG file to write.
    """
    modes = [mode for mode in TITLES if any(r.mode == mode for r in rows)]
    panels = [(mode, 'speed') for mode in modes]
    panels += [
        (mode, 'memory')
        for mode in modes
        if any(r.mode == mode and r.peak_gib for r in rows)
    ]
    series = list(dict.fromkeys((r.model, r.engine) for r in rows))
    models = list(dict.fromkeys(r.model for r in rows))
    # All implementations of a VVT have the same colour.
    base = list(dict.fromkeys(map(_base, models)))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * lines))
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (mode, what) in zip(axes.flat, panels):
        for model, engine in series:
            picked = sorted(
                (
                    r
                    for r in rows
                    if (r.model, r.engine, r.mode) == (model, engine, mode)
                    and (what == 'speed' or r.peak_gib)
                ),
                key=lambda r: r.side,
            )
            if not picked:
                continue
            style = dict(
                color=f'C{base.index(_base(model))}',
                linewidth=2.5 if model.startswith('vvt') else 1.3,
                linestyle=LINES.get(
                    engine, '--' if model.endswith('-plain') else '-'
                ),
                marker='D'
                if model.endswith('-triton')
                else MARKERS.get(engine, 'o'),
                markersize=4,
                label=picked[0].label,
            )
            sides = [r.side for r in picked]
            if what == 'memory':
                axis.plot(sides, [r.peak_gib for r in picked], **style)
                continue
            pixels = [r.batch * r.side**2 / 1e6 for r in picked]
            speed = [p / r.seconds for p, r in zip(pixels, picked)]
            low = [p / r.seconds_p80 for p, r in zip(pixels, picked)]
            high = [p / r.seconds_p20 for p, r in zip(pixels, picked)]
            axis.plot(sides, speed, **style)
            axis.vlines(sides, low, high, color=style['color'])
        shown = sorted(
            {
                (r.side, r.batch)
                for r in rows
                if r.mode == mode and (what == 'speed' or r.peak_gib)
            }
        )
        axis.set_xscale('log', base=2)
        axis.set_yscale('log')
        axis.set_xticks([side for side, _ in shown])
        axis.set_xticklabels([f'{b} x {s}' for s, b in shown])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f'{value:g}')
        )
        axis.set_xlabel('batch size x image size (pixels)')
        axis.set_ylabel(
            'megapixels per second' if what == 'speed' else 'peak memory (GiB)'
        )
        axis.set_title(TITLES[mode])
        axis.grid(True, which='both', alpha=0.25)
    figure.suptitle(f'{rows[0].machine}, {rows[0].dtype}', fontsize=9)
    figure.tight_layout()
    handles: Dict[str, Any] = {}  # a model may be missing in a panel
    for axis in axes.flat[: len(panels)]:
        handles.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc='upper center',
        bbox_to_anchor=(0.5, 0),
        ncols=3 * columns // 2 + 1,
        fontsize=8,
    )
    figure.savefig(path, dpi=130, bbox_inches='tight')
