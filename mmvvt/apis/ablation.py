"""Run an ablation grid with the stock runner, resumable run by run."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from ..analysis.ablation import (
    Grid,
    Result,
    check_variants,
    digest,
    find_value,
    last_value,
    read_results,
    write_results,
)
from ..analysis.benchmark import machine_line
from ..analysis.complexity import Complexity, count
from ..errors import UserError
from ..fileio import atomic_write, check_writable
from ..preflight import build_model, read_config

try:
    import fcntl
except ImportError:  # Windows: two commands must not share a work directory
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = 'ablation_config.py'
LOG_FILE = 'output.txt'
SECONDS_FILE = 'seconds.txt'
LOCK_FILE = 'lock'
VALIDATION_CONFIG_FILE = 'validation_config.py'
VALIDATION_FILE = 'validation.json'


@dataclass
class Variant:
    """A variant of a grid, as returned by :func:`prepare_variants`.

    Attributes:
        name (str): Name of the variant.
        cfg (Config): Complete config, without a seed.
        digest (str): See :func:`mmvvt.analysis.ablation.digest`.
        complexity (Complexity): Parameters and multiply-adds.
    """

    name: str
    cfg: Config
    digest: str
    complexity: Complexity


def prepare_variants(
    grid: Grid, names: Optional[Sequence[str]] = None
) -> List[Variant]:
    """Build the model of each variant once and count its cost.

    Args:
        grid (Grid): The grid.
        names (Sequence[str], optional): Names of the variants. Defaults to
            None, all of them.

    Returns:
        list[Variant]: The variants, in the order of the grid.

    Raises:
        UserError: If a name is unknown, or a config is invalid.
    """
    base = read_config(grid.config)
    variants = []
    for name in check_variants(grid, names):
        settings = copy.deepcopy(grid.variants[name])
        unknown = [key for key in settings if key.split('.')[0] not in base]
        if unknown:
            raise UserError(
                f'variant {name}: {grid.config} has no setting '
                f'{", ".join(unknown)}'
            )
        try:
            cfg = read_config(grid.config, settings)
            complexity = count(build_model(cfg), (1, *grid.input_shape))
        except UserError as error:
            raise UserError(f'variant {name}: {error}') from error
        except (RuntimeError, TypeError, ValueError) as error:
            # For example, the channels of the head are not those of the
            # backbone, or an argument of another backbone is wrong.
            raise UserError(
                f'variant {name}: the model cannot be built, or not process '
                f'an image of shape {grid.input_shape}: {error}'
            ) from error
        variants.append(Variant(name, cfg, digest(cfg), complexity))
    return variants


def select_results(
    grid: Grid,
    variants: Sequence[Variant],
    results: Sequence[Result],
    seeds: Optional[Sequence[int]] = None,
) -> List[Result]:
    """Select the results of the present configs and metric of a grid.

    Args:
        grid (Grid): The grid.
        variants (Sequence[Variant]): Variants, from :func:`prepare_variants`.
        results (Sequence[Result]): Results of any variants, seeds, configs
            and metrics, such as all rows of a CSV file.
        seeds (Sequence[int], optional): Seeds. Defaults to None, those of the
            grid.

    Returns:
        list[Result]: Results of these variants and seeds, in the order of the
        variants, with the cost for the input shape of the grid.
    """
    seeds = list(grid.seeds if seeds is None else seeds)
    names = [variant.name for variant in variants]
    found = {variant.name: variant for variant in variants}
    selected = [
        replace(
            result,
            parameters=found[result.variant].complexity.parameters,
            multiply_adds=found[result.variant].complexity.multiply_adds,
        )
        for result in results
        if result.variant in found
        and result.seed in seeds
        and result.metric == grid.metric
        and result.config == found[result.variant].digest
    ]
    return sorted(selected, key=lambda r: (names.index(r.variant), r.seed))


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[List[int]]:
    """Lock a file in this process and in the processes that it starts.

    Args:
        path (Path): Path of the lock. It is created, with its folder.
        wait (bool): Whether to wait for a lock that another process holds.

    Yields:
        list[int]: File descriptor of the lock. A process that gets it keeps
        the lock, also if this process ends first.

    Raises:
        UserError: If another process holds the lock.
        WriteError: If the file cannot be created.
    """
    check_writable(str(path))
    if fcntl is None:
        yield []
        return
    with open(path, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f'another process is training in {path.parent}'
            ) from error
        yield [file.fileno()]


def _run_tool(
    command: List[str], folder: Path, env: Dict[str, str], lock: List[int]
) -> None:
    """Run ``python -m mmvvt``; its output is appended to the log.

    Raises:
        UserError: If it fails. The message has the last line of its output.
    """
    log = folder / LOG_FILE
    with open(log, 'ab') as output:
        done = subprocess.run(
            [sys.executable, '-m', 'mmvvt', *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=lock,
        )
    if done.returncode:
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
        raise UserError(
            f'mmvvt {command[0]} exited with code {done.returncode}: '
            f'{lines[-1] if lines else "no output"} (see {log})'
        )


def _train(
    variant: Variant,
    seed: int,
    metric: str,
    folder: Path,
    env: Dict[str, str],
    lock: List[int],
) -> float:
    """Train one run, or resume it; return the metric.

    Raises:
        UserError: If the run fails or logs no such metric.
    """
    cfg = Config(variant.cfg.to_dict())
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    config = str(folder / CONFIG_FILE)
    cfg.dump(config)
    before = _find_logs(folder)
    command = ['train', config, '--work-dir', str(folder), '--resume']
    _run_tool(command, folder, env, lock)
    new = [log for log in _find_logs(folder) if log not in before]
    value = last_value(new, metric)
    if value is None:
        # Every step was done by an earlier attempt, which may have ended
        # before the last validation. The runner does not repeat it.
        value = _validate(cfg, metric, folder, env, lock)
    return value


def _find_logs(folder: Path) -> List[Path]:
    """Return the logs of all attempts, whose folders are named by time."""
    return sorted(folder.glob('*/vis_data/scalars.json'))


def _validate(
    cfg: Config,
    metric: str,
    folder: Path,
    env: Dict[str, str],
    lock: List[int],
) -> float:
    """Test the last checkpoint of a run with the data of its validation."""
    checkpoint = find_latest_checkpoint(str(folder))
    if checkpoint is None or not cfg.get('val_dataloader'):
        raise UserError(f'no {metric} was logged')
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = cfg.val_evaluator
    cfg.test_cfg = dict(fp16=(cfg.get('val_cfg') or {}).get('fp16', False))
    config, out = folder / VALIDATION_CONFIG_FILE, folder / VALIDATION_FILE
    cfg.dump(str(config))
    command = ['test', str(config), checkpoint, '--out', str(out)]
    command += ['--work-dir', str(folder / 'validation')]
    _run_tool(command, folder, env, lock)
    return find_value(json.loads(out.read_text(encoding='utf-8')), metric)


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Add the time of the block to that of the earlier attempts of a run.

    While the block runs, the file also has its start, for the next attempt
    if this process is killed.
    """
    earlier, start = _seconds(folder), time.time()
    path = str(folder / SECONDS_FILE)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(f'{earlier:.1f} {start:.1f}\n')
    try:
        yield
    finally:
        seconds = earlier + time.time() - start
        with atomic_write(path) as temporary:
            Path(temporary).write_text(f'{seconds:.1f}\n')


def _seconds(folder: Path) -> float:
    """Read the time of the earlier attempts of a run.

    An attempt that was killed lasted until the last line of its output.
    """
    try:
        seconds, *start = map(
            float, (folder / SECONDS_FILE).read_text().split()
        )
        if start:
            end = (folder / LOG_FILE).stat().st_mtime
            seconds += max(0.0, end - start[0])
        return seconds
    except (FileNotFoundError, ValueError):
        return 0.0


def _num_processors() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_grid(
    grid: Grid,
    variants: Sequence[Variant],
    csv: str,
    work_dir: str,
    seeds: Optional[Sequence[int]] = None,
    jobs: int = 1,
    report: Callable[[str], None] = print,
) -> List[Result]:
    """Train all runs of a grid that are not in the CSV file.

    Each run is a process of ``python -m mmvvt train``. Its result is added to
    the CSV file at once, so that a grid that was interrupted continues with
    the next call: finished runs are skipped, and an interrupted run resumes
    from its newest checkpoint. Results of the same variant and seed with
    another config or metric are replaced. The first seed of all variants runs
    first.

    A run that fails does not stop the others; the error is raised at the end.
    Several processes may run parts of the same grid in one work directory.

    Args:
        grid (Grid): The grid.
        variants (Sequence[Variant]): Variants to run, from
            :func:`prepare_variants`.
        csv (str): CSV file with the results. It may exist.
        work_dir (str): Folder for the work directories of the runs.
        seeds (Sequence[int], optional): Seeds to run. Defaults to None, those
            of the grid.
        jobs (int): Number of runs at the same time; each of them has its share
            of the processors as threads. Defaults to 1.
        report (Callable): Function that prints a line. Defaults to print.

    Returns:
        list[Result]: All results of these variants and seeds.

    Raises:
        WriteError: If the CSV file or the folder cannot be written.
        UserError: If runs failed; the message has a line for each of them.
    """
    if jobs < 1:
        raise UserError(f'jobs must be at least 1, got {jobs}')
    check_writable(csv)
    check_writable(str(Path(work_dir, LOCK_FILE)))
    seeds = list(dict.fromkeys(grid.seeds if seeds is None else seeds))
    results = select_results(grid, variants, read_results(csv), seeds)
    done = {(r.variant, r.seed) for r in results}
    todo = [
        (variant, seed)
        for seed in seeds
        for variant in variants
        if (variant.name, seed) not in done
    ]
    total = len(seeds) * len(variants)
    report(
        f'{total} runs: {total - len(todo)} finished before, {len(todo)} to do'
    )
    threads = max(1, _num_processors() // jobs) if jobs > 1 else None
    env = dict(os.environ)
    if threads is not None:
        env['OMP_NUM_THREADS'] = str(threads)
    machine = machine_line(threads)
    lock = threading.Lock()
    start = time.time()
    failures: List[str] = []
    finished = 0

    def add(result: Result) -> None:
        """Replace the result of a variant and seed in the CSV file."""
        with _locked(Path(f'{csv}.lock'), wait=True):
            others = [
                r
                for r in read_results(csv)
                if (r.variant, r.seed) != (result.variant, result.seed)
            ]
            write_results(csv, [*others, result])

    def measure(variant: Variant, seed: int) -> str:
        """Train a run; return its metric and time, for the report."""
        folder = Path(work_dir, variant.name, f'{variant.digest}-seed{seed}')
        with _locked(folder / LOCK_FILE, wait=False) as file:
            if select_results(grid, [variant], read_results(csv), [seed]):
                return 'finished by another command'
            with _timed(folder):
                value = _train(variant, seed, grid.metric, folder, env, file)
            seconds = _seconds(folder)
            result = Result(
                variant=variant.name,
                seed=seed,
                metric=grid.metric,
                value=value,
                seconds=seconds,
                parameters=variant.complexity.parameters,
                multiply_adds=variant.complexity.multiply_adds,
                config=variant.digest,
                machine=machine,
            )
            with lock:
                add(result)
        return f'{grid.metric} {value:#.4g} in {seconds:.0f} s'

    def run(variant: Variant, seed: int) -> None:
        nonlocal finished
        name = f'{variant.name}, seed {seed}'
        try:
            text = measure(variant, seed)
        except UserError as error:
            with lock:
                finished += 1
                failures.append(f'{name}: {error}')
                report(f'failed: {failures[-1]}')
            return
        with lock:
            finished += 1
            left = (time.time() - start) / finished * (len(todo) - finished)
            report(
                f'[{finished}/{len(todo)}] {name}: {text}, about '
                f'{left / 60:.0f} min left'
            )

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, *item) for item in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    if failures:
        raise UserError('\n'.join(failures))
    return select_results(grid, variants, read_results(csv), seeds)
