"""Ablation grids: variants of a config, and the table of their results."""

import csv
import hashlib
import json
import math
import os
import re
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import yaml
from mmengine.config import Config

from ..errors import MissingFileError, UserError
from ..fileio import atomic_write

# Names of variants are names of folders.
NAME = re.compile(r'[A-Za-z0-9_+-][A-Za-z0-9_.+-]*')
# Numbers as in YAML 1.2 and Python: PyYAML takes 1e-3 for text.
FLOAT = re.compile(r'[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+')
REQUIRED_KEYS = ('config', 'metric', 'input_shape', 'seeds', 'variants')
DIGEST_LENGTH = 10


@dataclass
class Grid:
    """An ablation grid, as read by :func:`read_grid`.

    Attributes:
        name (str): Name of the file without its extension.
        config (str): Path or name of the base config of all variants.
        metric (str): Metric of the validation, such as 'accuracy/top1'.
        input_shape (tuple[int, int, int]): Shape ``(C, H, W)`` of the image
            for which the multiply-adds are counted.
        seeds (list[int]): Seeds of the runs of each variant.
        variants (dict[str, dict]): For each variant, the settings that differ
            from the base config: dotted keys and values, as in
            ``--cfg-options``.
    """

    name: str
    config: str
    metric: str
    input_shape: Tuple[int, int, int]
    seeds: List[int]
    variants: Dict[str, Dict[str, Any]]


@dataclass
class Result:
    """Result of one run, a row of the CSV file.

    Attributes:
        variant (str): Name of the variant.
        seed (int): Seed of the run.
        metric (str): Name of the metric.
        value (float): Metric of the last validation.
        seconds (float): Wall-clock time of the run.
        parameters (int): Number of elements of all parameters.
        multiply_adds (int): Multiply-adds for one image of ``input_shape``.
        config (str): Digest of the complete config without the seed. Results
            with different digests are of different experiments.
        machine (str): Machine, threads and versions.
    """

    variant: str
    seed: int
    metric: str
    value: float
    seconds: float
    parameters: int
    multiply_adds: int
    config: str
    machine: str


@dataclass
class Summary:
    """All results of one variant.

    Attributes:
        variant (str): Name of the variant.
        values (list[float]): The metric of each seed.
        mean (float): Mean of the values.
        std (float): Sample standard deviation, NaN for a single value.
        parameters (int): Number of elements of all parameters.
        multiply_adds (int): Multiply-adds for one image.
    """

    variant: str
    values: List[float]
    mean: float
    std: float
    parameters: int
    multiply_adds: int


class _Loader(yaml.SafeLoader):
    """YAML as users of PyTorch write it; keys must not be repeated."""

    def construct_mapping(self, node, deep=False):
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != 'tag:yaml.org,2002:merge'  # <<: *anchor
        ]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key {key} is repeated', node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', FLOAT, list('-+.0123456789')
)


def read_grid(path: str) -> Grid:
    """Read an ablation grid from a YAML file.

    The file has the keys ``config``, ``metric``, ``input_shape``, ``seeds``
    and ``variants``, see :class:`Grid`. A relative path of the config is
    searched next to the file first.

    Args:
        path (str): Path of the YAML file.

    Returns:
        Grid: The grid.

    Raises:
        MissingFileError: If the file does not exist.
        UserError: If the file is not valid.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
    except FileNotFoundError as error:
        raise MissingFileError(f'no such grid file: {path}') from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{path} is not valid YAML: {reason}') from error
    if not isinstance(content, dict) or set(content) != set(REQUIRED_KEYS):
        found = list(content) if isinstance(content, dict) else content
        raise UserError(
            f'{path} must have the keys {", ".join(REQUIRED_KEYS)}, got '
            f'{found!r}'
        )
    for key in ('config', 'metric'):
        if not isinstance(content[key], str):
            raise UserError(
                f'{path}: {key} must be a string, got {content[key]!r}'
            )
    shape, seeds, variants = (
        content[key] for key in ('input_shape', 'seeds', 'variants')
    )
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(type(length) is int and length > 0 for length in shape)
    ):
        raise UserError(
            f'{path}: input_shape must be [channels, height, width], got '
            f'{shape!r}'
        )
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and seed >= 0 for seed in seeds)
        or len(set(seeds)) != len(seeds)
    ):
        raise UserError(
            f'{path}: seeds must be a list of different integers of at least '
            f'0, got {seeds!r}'
        )
    if not isinstance(variants, dict) or not variants:
        raise UserError(
            f'{path}: variants must map names to settings, got {variants!r}'
        )
    for name, settings in variants.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f'{path}: the name of a variant must be text of letters, '
                f'digits and the characters _ . + -, and not begin with a '
                f'dot, got {name!r}'
            )
        if not isinstance(settings, dict) or not all(
            isinstance(key, str) for key in settings
        ):
            raise UserError(
                f'{path}: the settings of {name} must map dotted keys to '
                f'values, {{}} for none, got {settings!r}'
            )
    beside = Path(path).parent / content['config']
    return Grid(
        name=Path(path).stem,
        config=str(beside if beside.is_file() else content['config']),
        metric=content['metric'],
        input_shape=(shape[0], shape[1], shape[2]),
        seeds=seeds,
        variants={name: dict(s) for name, s in variants.items()},
    )


def check_variants(grid: Grid, names: Optional[Sequence[str]]) -> List[str]:
    """Select variants of a grid.

    Args:
        grid (Grid): The grid.
        names (Sequence[str], optional): Names of variants; None selects all.

    Returns:
        list[str]: The names, in the order of the grid.

    Raises:
        UserError: If the grid has no such variant.
    """
    unknown = sorted(set(names or ()) - set(grid.variants))
    if unknown:
        raise UserError(
            f'{grid.name} has no variant {", ".join(unknown)}; its variants '
            f'are {", ".join(grid.variants)}'
        )
    return [name for name in grid.variants if not names or name in names]


def _with_text_keys(value: Any) -> Any:
    """Convert all keys to strings, so that they can be sorted."""
    if isinstance(value, dict):
        return {str(k): _with_text_keys(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(v) for v in value]
    return value


def digest(cfg: Config) -> str:
    """Return a short hash of a config, without its seed and folder.

    Args:
        cfg (Config): The complete config.

    Returns:
        str: Hexadecimal digits. Two configs have the same digest if they have
        the same settings.
    """
    settings = cfg.to_dict()
    settings.pop('work_dir', None)
    settings['randomness'] = {
        key: value
        for key, value in (settings.get('randomness') or {}).items()
        if key != 'seed'
    }
    text = json.dumps(_with_text_keys(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def last_value(logs: Iterable[Path], metric: str) -> Optional[float]:
    """Read the last value of a metric that the runner logged.

    Args:
        logs (Iterable[Path]): Files ``scalars.json`` in the order in which
            they were written.
        metric (str): Name of the metric.

    Returns:
        float, optional: The last value, None if nothing was logged.

    Raises:
        UserError: If other values were logged, but not that of the metric,
            or if it is not a finite number.
    """
    logged: Dict[str, Any] = {}
    for path in logs:
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # the run was killed while it wrote the line
            logged.update(found)
    return find_value(logged, metric) if logged else None


def find_value(values: Dict[str, Any], metric: str) -> float:
    """Return the value of a metric.

    Args:
        values (dict): Values by name.
        metric (str): Name of the metric.

    Returns:
        float: The value.

    Raises:
        UserError: If there is no such value, or it is not a finite number.
    """
    value = values.get(metric)
    if value is None:
        raise UserError(
            f'no {metric} was logged, only {", ".join(sorted(values))}'
        )
    if not math.isfinite(value):
        raise UserError(f'{metric} is {value}')
    return float(value)


def write_results(path: str, results: Sequence[Result]) -> None:
    """Write results to a CSV file, completely or not at all.

    Args:
        path (str): Path of the file.
        results (Sequence[Result]): The results.

    Raises:
        WriteError: If the file cannot be written.
    """
    with atomic_write(path) as temporary:
        with open(temporary, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Result)])
            writer.writeheader()
            for result in results:
                row = asdict(result)
                row['value'] = f'{result.value:.6g}'
                row['seconds'] = f'{result.seconds:.0f}'
                writer.writerow(row)


def read_results(path: str) -> List[Result]:
    """Read a CSV file written by :func:`write_results`.

    Args:
        path (str): Path of the file.

    Returns:
        list[Result]: The results; empty if the file does not exist.

    Raises:
        UserError: If the file cannot be read or has other columns.
    """
    if not os.path.exists(path):
        return []
    types: Dict[str, Any] = {f.name: f.type for f in fields(Result)}
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(types):
                raise UserError(
                    f'{path} is not a table of results: its columns must be '
                    f'{", ".join(types)}'
                )
            return [
                Result(**{key: types[key](row[key]) for key in types})
                for row in reader
            ]
    except UserError:
        raise
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f'cannot read {path}: {error}') from error


def summarize(results: Sequence[Result]) -> List[Summary]:
    """Compute the mean and the spread of each variant.

    Args:
        results (Sequence[Result]): Results of one metric.

    Returns:
        list[Summary]: One entry for each variant, in the order of their first
        results.
    """
    variants: Dict[str, List[Result]] = {}
    for result in results:
        variants.setdefault(result.variant, []).append(result)
    return [
        Summary(
            variant=variant,
            values=[r.value for r in rows],
            mean=statistics.fmean(r.value for r in rows),
            std=statistics.stdev([r.value for r in rows])
            if len(rows) > 1
            else math.nan,
            parameters=rows[-1].parameters,
            multiply_adds=rows[-1].multiply_adds,
        )
        for variant, rows in variants.items()
    ]


def to_markdown(summaries: Sequence[Summary], metric: str) -> str:
    """Format summaries as a table in Markdown.

    Args:
        summaries (Sequence[Summary]): The rows.
        metric (str): Name of the metric, the title of a column.

    Returns:
        str: The table, with millions of multiply-adds (MMACs), and N/A as the
        standard deviation of a single run.
    """
    lines = [
        f'| variant | params (M) | MMACs | {metric} | std | runs |',
        '|---|---|---|---|---|---|',
    ]
    for s in summaries:
        std = 'N/A' if math.isnan(s.std) else f'{s.std:#.2g}'
        lines.append(
            f'| {s.variant} | {s.parameters / 1e6:.3f} | '
            f'{s.multiply_adds / 1e6:.2f} | {s.mean:#.4g} | {std} | '
            f'{len(s.values)} |'
        )
    return '\n'.join(lines)
