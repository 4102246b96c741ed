"""The curves of a training run, from what the runner logged."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Dict, List, Tuple

from matplotlib.figure import Figure

from ..errors import MissingFileError

Curve = Tuple[List[int], List[float]]


def read_scalars(work_dir: str) -> List[dict]:
    """Records of the newest training run in a work folder, in order.

    Args:
        work_dir (str): Work folder of ``tools/train.py``. A run that was
            resumed has several log folders: a later one replaces what an
            earlier one logged from the same iteration on.

    Returns:
        list[dict]: Training records hold ``loss``, ``iter`` and ``epoch``;
        validation records the metrics, and ``step``, the epoch.

    Raises:
        MissingFileError: If no training run was logged there.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    records: List[dict] = []
    for log in logs:
        run = [json.loads(line) for line in log.read_text().splitlines()]
        first = next((r['iter'] for r in run if 'iter' in r), None)
        if first is None:
            continue
        earlier = takewhile(
            lambda r, first=first: r.get('iter', 0) < first, records
        )
        records = [*earlier, *run]
    if not records:
        raise MissingFileError(f'no training run was logged in {work_dir}')
    return records


def curves(records: List[dict], metric: str) -> Dict[str, Curve]:
    """Loss and a metric over epochs.

    Args:
        records (list[dict]): From :func:`read_scalars`.
        metric (str): Name of a validation metric, such as
            'accuracy/top1'.

    Returns:
        dict[str, tuple[list, list]]: 'loss' and ``metric``, each with its
        epochs and values; the loss is the mean over an epoch's records.
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
    """Draw loss and a metric over the epochs into a PNG.

    Args:
        work_dir (str): Work folder of ``tools/train.py``.
        metric (str): Name of the validation metric.
        label (str): What to write beside its axis.
        out (str): The PNG to write.
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
