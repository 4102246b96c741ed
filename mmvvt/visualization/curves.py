"""Training curves, read from the logs of the runner."""

import json
from pathlib import Path
from typing import Dict, List, Tuple

from matplotlib.figure import Figure

from ..errors import MissingFileError

Curve = Tuple[List[int], List[float]]


def read_scalars(work_dir: str) -> List[dict]:
    """Read the records of the latest training run in a work directory.

    Args:
        work_dir (str): Work directory of ``tools/train.py``. A resumed run
            has several log directories. The records of a later log replace
            those of earlier logs, starting at its first iteration.

    Returns:
        list[dict]: Records in the order in which they were logged. Training
        records contain ``loss``, ``iter`` and ``epoch``. Validation records
        contain the metrics and ``step``, which is the epoch.

    Raises:
        MissingFileError: If the work directory contains no training log.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    records: List[dict] = []
    for log in logs:
        run = [json.loads(line) for line in log.read_text().splitlines()]
        first = next((r['iter'] for r in run if 'iter' in r), None)
        if first is None:
            continue
        length = next(
            (i for i, r in enumerate(records) if r.get('iter', 0) >= first),
            len(records),
        )
        records = [*records[:length], *run]
    if not records:
        raise MissingFileError(f'no training log in {work_dir}')
    return records


def curves(records: List[dict], metric: str) -> Dict[str, Curve]:
    """Extract the loss and a metric by epoch.

    Args:
        records (list[dict]): Records returned by :func:`read_scalars`.
        metric (str): Name of a validation metric, such as
            'accuracy/top1'.

    Returns:
        dict[str, tuple[list, list]]: Epochs and values of 'loss' and of
        ``metric``. The loss is averaged over the records of an epoch.
    """
    losses: Dict[int, List[float]] = {}
    metrics: Dict[int, float] = {}
    for record in records:
        if 'loss' in record:
            losses.setdefault(record['epoch'], []).append(record['loss'])
        elif metric in record:
            metrics[record['step']] = record[metric]
    mean = {epoch: sum(v) / len(v) for epoch, v in losses.items()}
    return {
        'loss': (sorted(mean), [mean[e] for e in sorted(mean)]),
        metric: (sorted(metrics), [metrics[e] for e in sorted(metrics)]),
    }


def plot_curves(work_dir: str, metric: str, label: str, out: str) -> None:
    """Plot the loss and a metric against the epoch.

    Args:
        work_dir (str): Work directory of ``tools/train.py``.
        metric (str): Name of the validation metric.
        label (str): Axis label of the metric.
        out (str): Path of the PNG file to write.
    """
    lines = curves(read_scalars(work_dir), metric)
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    for axis, (name, title) in zip(
        axes, (('loss', 'training loss'), (metric, label))
    ):
        epochs, values = lines[name]
        axis.plot(epochs, values, marker='.')
        last = f', {values[-1]:.4g} at the end' if values else ''
        axis.set(xlabel='epoch', ylabel=title, title=f'{title}{last}')
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
