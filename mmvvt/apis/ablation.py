"""Run an ablation grid with the stock runner, resumable run by run."""

import copy
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

from mmengine.config import Config

from ..analysis.ablation import (
    Grid,
    Result,
    check_variants,
    digest,
    last_value,
    read_results,
    write_results,
)
from ..analysis.benchmark import machine_line
from ..analysis.complexity import Complexity, count
from ..errors import UserError
from ..preflight import build_model, read_config

CONFIG_FILE = 'ablation_config.py'
LOG_FILE = 'output.txt'
SECONDS_FILE = 'seconds.txt'


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
    variants = []
    for name in check_variants(grid, names):
        cfg = read_config(grid.config, copy.deepcopy(grid.variants[name]))
        try:
            complexity = count(build_model(cfg), (1, *grid.input_shape))
        except UserError as error:
            raise UserError(f'variant {name}: {error}') from error
        except RuntimeError as error:
            # For example, the channels of the head are not those of the
            # backbone.
            raise UserError(
                f'variant {name}: the model cannot process an image of '
                f'shape {grid.input_shape}: {error}'
            ) from error
        variants.append(Variant(name, cfg, digest(cfg), complexity))
    return variants


def _train(
    variant: Variant, seed: int, metric: str, folder: Path, env: Dict[str, str]
) -> float:
    """Train one run, or resume it; return the metric.

    Raises:
        UserError: If the run fails or logs no such metric.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg = Config(variant.cfg.to_dict())
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    config = folder / CONFIG_FILE
    cfg.dump(str(config))
    log = folder / LOG_FILE
    command = [sys.executable, '-m', 'mmvvt', 'train', str(config)]
    command += ['--work-dir', str(folder), '--resume']
    start = time.time()
    try:
        with open(log, 'ab') as output:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=env
            )
    finally:
        # The time of a run that is interrupted and resumed is the sum.
        seconds = _seconds(folder) + time.time() - start
        (folder / SECONDS_FILE).write_text(f'{seconds:.1f}\n')
    if done.returncode:
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
        raise UserError(
            f'{variant.name}, seed {seed}: training exited with code '
            f'{done.returncode}: {lines[-1] if lines else "no output"} (see '
            f'{log})'
        )
    value = last_value(str(folder), metric)
    if value is None:
        raise UserError(
            f'{variant.name}, seed {seed}: the validation logged no {metric}, '
            f'see {log}'
        )
    return value


def _seconds(folder: Path) -> float:
    path = folder / SECONDS_FILE
    return float(path.read_text()) if path.is_file() else 0.0


def _environment(threads: Optional[int]) -> Dict[str, str]:
    env = dict(os.environ)
    if threads is not None:
        env['OMP_NUM_THREADS'] = str(threads)
    return env


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
    another config are replaced. The first seed of all variants runs first.

    A run that fails does not stop the others; the error is raised at the end.

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
        UserError: If runs failed; the message has a line for each of them.
    """
    if jobs < 1:
        raise UserError(f'jobs must be at least 1, got {jobs}')
    seeds = list(grid.seeds if seeds is None else seeds)
    results = read_results(csv)
    done = {(r.variant, r.seed, r.config) for r in results}
    todo = [
        (variant, seed)
        for seed in seeds
        for variant in variants
        if (variant.name, seed, variant.digest) not in done
    ]
    total = len(seeds) * len(variants)
    report(
        f'{total} runs: {total - len(todo)} finished before, {len(todo)} to do'
    )
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    machine = machine_line(threads)
    env = _environment(threads)
    lock = threading.Lock()
    start = time.time()
    failures: List[str] = []
    finished = 0

    def run(variant: Variant, seed: int) -> None:
        nonlocal finished
        folder = Path(work_dir, variant.name, f'{variant.digest}-seed{seed}')
        try:
            value = _train(variant, seed, grid.metric, folder, env)
        except UserError as error:
            with lock:
                finished += 1
                failures.append(str(error))
                report(f'failed: {error}')
            return
        result = Result(
            variant=variant.name,
            seed=seed,
            metric=grid.metric,
            value=value,
            seconds=_seconds(folder),
            parameters=variant.complexity.parameters,
            multiply_adds=variant.complexity.multiply_adds,
            config=variant.digest,
            machine=machine,
        )
        with lock:
            finished += 1
            results[:] = [
                r
                for r in results
                if (r.variant, r.seed) != (variant.name, seed)
            ] + [result]
            write_results(csv, results)
            left = (time.time() - start) / finished * (len(todo) - finished)
            report(
                f'[{finished}/{len(todo)}] {variant.name}, seed {seed}: '
                f'{grid.metric} {value:.2f} in {result.seconds:.0f} s, about '
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
    names = [variant.name for variant in variants]
    return sorted(
        (r for r in results if r.variant in names and r.seed in seeds),
        key=lambda r: (names.index(r.variant), r.seed),
    )
