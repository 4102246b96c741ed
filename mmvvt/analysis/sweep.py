"""Cost of backbones against the image size, and its growth exponents."""

import csv
import math
import multiprocessing
import os
import tempfile
from dataclasses import dataclass, fields
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..errors import UserError
from .benchmark import PEERS, Timing, alternate, build, forward, machine_line
from .complexity import count
from .memory import (
    available_gib,
    is_out_of_memory,
    memory_limit,
    peak_memory_gib,
    resident_gib,
)

MODELS = ('vvt-small', *PEERS)
# All sides are multiples of the largest stride.
STRIDE = 32
MEASURED, OUT_OF_MEMORY = 'measured', 'out of memory'
# GiB that are reserved for each process that waits for its turn: libraries,
# weights, image and memory that the C library has not returned.
WAITING_GIB = 1.5
# Smallest default limit in GiB: libraries and a small pass.
LOWEST_LIMIT_GIB = 1.5
# Part of the available memory that the sweep may use.
SHARE = 0.9
# Seconds between runs, in which the threads of the last process end to wait
# for work without sleeping.
PAUSE = 0.1
# Channels and side of the small map with which a process starts its threads.
START_CHANNELS, START_SIDE = 64, 64
# Smallest side of models that do not accept 32 pixels: the last stage of Swin
# must not be smaller than a window of 7 x 7.
LOWEST_SIDES = {'swin-tiny': 224}


@dataclass
class SweepRow:
    """Cost of a forward pass with one square image in float32.

    Attributes:
        model (str): One of :data:`mmvvt.analysis.benchmark.NAMES`.
        side (int): Height and width of the image, in pixels.
        status (str): 'measured' or 'out of memory'. Without memory, only
            multiply-adds and activations are known.
        multiply_adds (int): Multiply-adds, see
            :func:`mmvvt.analysis.complexity.count`.
        activations (int): Elements of the outputs of matrix products and
            convolutions.
        peak_gib (float, optional): Peak memory of the process, including the
            libraries, after its first pass, in GiB.
        start_gib (float, optional): Memory of the process before this pass:
            libraries, weights and image, in GiB.
        runs (int): Number of timed runs, 0 if out of memory.
        seconds (float, optional): Median time of a run.
        seconds_p20 (float, optional): 20th percentile.
        seconds_p80 (float, optional): 80th percentile.
        limit_gib (float): Limit of the memory of the process, in GiB.
        machine (str): Description returned by
            :func:`mmvvt.analysis.benchmark.machine_line`.
    """

    model: str
    side: int
    status: str
    multiply_adds: int
    activations: int
    peak_gib: Optional[float]
    start_gib: Optional[float]
    runs: int
    seconds: Optional[float]
    seconds_p20: Optional[float]
    seconds_p80: Optional[float]
    limit_gib: float
    machine: str

    @property
    def memory_gib(self) -> Optional[float]:
        """Memory of the pass: the peak less the memory before, in GiB."""
        if self.peak_gib is None or self.start_gib is None:
            return None
        return self.peak_gib - self.start_gib


# Quantities with a growth exponent: attribute of a row, and name.
QUANTITIES: Dict[str, str] = dict(
    multiply_adds='multiply-adds',
    activations='activations',
    memory_gib='memory of the pass',
    seconds='latency',
)


@dataclass
class Growth:
    """Growth exponent of one quantity of a model.

    Attributes:
        model (str): Name of the model.
        quantity (str): Key of :data:`QUANTITIES`.
        exponent (float, optional): Slope of the logarithm of the quantity
            against the logarithm of the number of pixels: 1 is linear and 2
            is quadratic. None with fewer than two sizes.
        sizes (int): Number of sizes of the fit.
        first_side (int): Side of the smallest image of the fit, in pixels.
        last_side (int): Side of the largest image of the fit, in pixels.
        machine (str): Machine of the rows.
    """

    model: str
    quantity: str
    exponent: Optional[float]
    sizes: int
    first_side: int
    last_side: int
    machine: str


def sweep_sides(lowest: int, highest: int) -> List[int]:
    """List the sides of a sweep.

    They grow by a factor of the square root of 2, so that the number of
    pixels doubles, and are rounded to multiples of 32. The last one is the
    upper bound.

    Args:
        lowest (int): Smallest side in pixels, a multiple of 32.
        highest (int): Largest side in pixels, a multiple of 32.

    Returns:
        list[int]: Sides in ascending order.

    Raises:
        UserError: If a bound is below 32 or not a multiple of 32, or if the
            bounds are reversed.
    """
    for side in (lowest, highest):
        if side < STRIDE or side % STRIDE:
            raise UserError(
                f'the sides of a sweep must be multiples of {STRIDE} from '
                f'{STRIDE} on, got {side}'
            )
    if lowest > highest:
        raise UserError(
            'the first side of a sweep must not be larger than the second, '
            f'got {lowest} and {highest}'
        )
    sides = {highest}
    for step in range(2 * math.ceil(math.log2(highest / lowest))):
        side = round(lowest * 2 ** (step / 2) / STRIDE) * STRIDE
        if side < highest:
            sides.add(side)
    return sorted(sides)


def fit_exponent(pixels: Sequence[float], costs: Sequence[float]) -> float:
    """Fit a power law with least squares of the logarithms.

    Args:
        pixels (Sequence[float]): Numbers of pixels, at least two different
            ones.
        costs (Sequence[float]): Costs, as many, all positive.

    Returns:
        float: Exponent of the number of pixels.
    """
    x = torch.tensor(pixels, dtype=torch.float64).log()
    y = torch.tensor(costs, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def fit_growth(rows: Sequence[SweepRow]) -> List[Growth]:
    """Fit the growth exponents of all models and quantities.

    The fit uses the larger half of the sizes at which the quantity is known,
    rounded up, and at least two. A model that runs out of memory is fitted
    over smaller images; the sides are listed.

    Args:
        rows (Sequence[SweepRow]): Rows of one machine.

    Returns:
        list[Growth]: One for each model and quantity, in the order of the
        models in ``rows`` and of :data:`QUANTITIES`. Quantities that were
        not measured at any size are left out.
    """
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        for quantity in QUANTITIES:
            known = sorted(
                (row.side, getattr(row, quantity), row.machine)
                for row in rows
                if row.model == model and (getattr(row, quantity) or 0) > 0
            )
            if not known:
                continue
            used = known[-max(2, (len(known) + 1) // 2) :]
            sides = [side for side, _, _ in used]
            exponent = None
            if len(used) > 1:
                exponent = fit_exponent(
                    [side**2 for side in sides], [cost for _, cost, _ in used]
                )
            found.append(
                Growth(
                    model,
                    quantity,
                    exponent,
                    len(used),
                    sides[0],
                    sides[-1],
                    used[-1][2],
                )
            )
    return found


def growth_path(path: str) -> str:
    """Return the path of the exponents of a CSV file of a sweep."""
    stem, suffix = os.path.splitext(path)
    return f'{stem}_exponents{suffix}'


def _number(text: str) -> Optional[float]:
    return float(text) if text else None


def read_sweep(path: str) -> List[SweepRow]:
    """Read the CSV file of a sweep.

    Args:
        path (str): Path of a file with rows of :class:`SweepRow`, written by
            :func:`mmvvt.analysis.benchmark.write_csv`.

    Returns:
        list[SweepRow]: Rows of the file.

    Raises:
        UserError: If the file cannot be read, has other columns or invalid
            values, or has no rows.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            lines: List[Any] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    names = [field.name for field in fields(SweepRow)]
    if not lines or list(lines[0]) != names:
        raise UserError(
            f'{path} was not written by get_flops.py --sweep: its columns '
            f'must be {", ".join(names)}'
        )
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            row = SweepRow(
                model=line['model'],
                side=int(line['side']),
                status=line['status'],
                multiply_adds=int(line['multiply_adds']),
                activations=int(line['activations']),
                peak_gib=_number(line['peak_gib']),
                start_gib=_number(line['start_gib']),
                runs=int(line['runs']),
                seconds=_number(line['seconds']),
                seconds_p20=_number(line['seconds_p20']),
                seconds_p80=_number(line['seconds_p80']),
                limit_gib=float(line['limit_gib']),
                machine=line['machine'],
            )
            if row.status not in (MEASURED, OUT_OF_MEMORY):
                raise ValueError(f'unknown status {row.status!r}')
        except (TypeError, ValueError) as error:
            raise UserError(f'{path}, line {number}: {error}') from error
        rows.append(row)
    return rows


def read_known(path: str) -> List[SweepRow]:
    """Read the rows with which a sweep is resumed.

    Args:
        path (str): Path of the CSV file.

    Returns:
        list[SweepRow]: Rows of the file, or no rows if it does not exist.

    Raises:
        UserError: If the file cannot be read, or has rows of another
            machine, number of threads or version.
    """
    if not os.path.exists(path):
        return []
    rows = read_sweep(path)
    machine = machine_line()
    for row in rows:
        if row.machine != machine:
            raise UserError(
                f'{path} has rows of another machine, number of threads or '
                f'version ({row.machine}): write the rows of this one '
                f'({machine}) to another file'
            )
    return rows


def merge(
    rows: Sequence[SweepRow], others: Sequence[SweepRow]
) -> List[SweepRow]:
    """Merge rows; later rows replace earlier ones of the same model and side.

    Args:
        rows (Sequence[SweepRow]): Rows.
        others (Sequence[SweepRow]): Later rows.

    Returns:
        list[SweepRow]: Rows by model, in the order in which the models
        appear, and by side.
    """
    found = {(row.model, row.side): row for row in [*rows, *others]}
    order = list(dict.fromkeys(model for model, _ in found))
    return sorted(
        found.values(), key=lambda row: (order.index(row.model), row.side)
    )


class _OutOfMemory(Exception):
    """A pass that does not fit into the memory.

    Args:
        name (str): Name of the model.
    """

    def __init__(self, name: str):
        super().__init__(f'{name} is out of memory')
        self.name = name


def start_threads() -> None:
    """Start the threads of PyTorch's convolutions and matrix products."""
    channels = torch.zeros(START_CHANNELS, START_CHANNELS)
    x = torch.zeros(1, START_CHANNELS, START_SIDE, START_SIDE)
    F.conv2d(x, channels[..., None, None])
    F.linear(x.flatten(2)[0].T, channels)  # (N, C)


def _serve(
    connection: Any, name: str, side: int, threads: int, gib: float, log: str
) -> None:
    """Run a forward pass for each message, in a process of its own.

    Answers with the memory before the pass and the peak memory in GiB, or
    with None if the memory is not sufficient.
    """
    with open(log, 'wb') as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    model = build(name)
    torch.manual_seed(0)
    image = torch.randn(1, 3, side, side)
    # Start the threads, which need memory too, without the limit. The model
    # is not run: what it keeps would not count as memory of the pass.
    start_threads()
    connection.send(None)  # ready
    while connection.recv():
        start = resident_gib()
        try:
            with memory_limit(gib):
                forward(model, image)
        except Exception as error:  # PyTorch has no class of its own for it
            if not is_out_of_memory(error):
                raise
            connection.send(None)
            return
        connection.send((start, peak_memory_gib()))


class _Worker:
    """A process that runs one model with one size, when it is told to."""

    def __init__(self, name: str, side: int, gib: float, folder: str):
        context = multiprocessing.get_context('spawn')
        self.name = name
        self._log = os.path.join(folder, f'{name}.log')
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(
                other,
                name,
                side,
                torch.get_num_threads(),
                gib,
                self._log,
            ),
            daemon=True,
        )
        self._process.start()
        other.close()  # so that reading ends when the process has ended
        self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
        code = self._process.exitcode
        with open(self._log, encoding='utf-8', errors='replace') as file:
            log = file.read()
        # SIGKILL is what the system sends if the memory is exhausted. A C++
        # library aborts if an allocation fails in one of its threads.
        if code == -9 or (code and is_out_of_memory(RuntimeError(log))):
            raise _OutOfMemory(self.name)
        raise RuntimeError(
            f'the process of {self.name} ended with code {code}: {log[-2000:]}'
        )

    def run(self) -> Tuple[float, float]:
        """Run a forward pass.

        Returns:
            tuple[float, float]: Memory of the process before the pass, and
            peak memory, in GiB.

        Raises:
            _OutOfMemory: If the memory is not sufficient. The process has
                ended.
        """
        try:
            self._connection.send(True)
        except BrokenPipeError:
            pass  # The process has ended, and _receive finds out why.
        answer = self._receive()
        if answer is None:
            raise _OutOfMemory(self.name)
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _time(workers: List[_Worker], runs: int) -> Dict[str, Timing]:
    """Time the runs of processes in turn.

    If one of them runs out of memory, the others are timed again without it.
    """
    while workers:
        try:
            timings = alternate(
                [worker.run for worker in workers],
                runs,
                warmup=0,
                pause=PAUSE,
            )
        except _OutOfMemory as error:
            workers = [
                worker for worker in workers if worker.name != error.name
            ]
            continue
        return {worker.name: t for worker, t in zip(workers, timings)}
    return {}


def _measure(
    names: Sequence[str], side: int, runs: int, gib: float
) -> Dict[str, Dict[str, Any]]:
    """Measure memory and latency at one size.

    Returns:
        dict: Fields of :class:`SweepRow` by model. Models that run out of
        memory are missing.
    """
    memory: Dict[str, Tuple[float, float]] = {}
    workers: List[_Worker] = []
    ready = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                try:
                    worker = _Worker(name, side, gib, folder)
                    workers.append(worker)
                    memory[name] = worker.run()
                except _OutOfMemory:
                    continue
                ready.append(worker)
            timings = _time(ready, runs)
        finally:
            for worker in workers:
                worker.close()
    return {
        name: dict(
            status=MEASURED,
            start_gib=memory[name][0],
            peak_gib=memory[name][1],
            runs=runs,
            seconds=timing.median,
            seconds_p20=timing.low,
            seconds_p80=timing.high,
        )
        for name, timing in timings.items()
    }


NOT_MEASURED: Dict[str, Any] = dict(
    status=OUT_OF_MEMORY,
    start_gib=None,
    peak_gib=None,
    runs=0,
    seconds=None,
    seconds_p20=None,
    seconds_p80=None,
)


def default_limit(models: int) -> float:
    """Return the default limit of the memory of a process, in GiB.

    It is 90 % of the available memory, without 1.5 GiB for each of the other
    models, whose processes wait for their turn.

    Args:
        models (int): Number of models.

    Returns:
        float: Limit in GiB.

    Raises:
        UserError: If this is less than 1.5 GiB, or if the system is not
            Linux.
    """
    available = available_gib()
    limit = SHARE * (available - (models - 1) * WAITING_GIB)
    if limit < LOWEST_LIMIT_GIB:
        raise UserError(
            f'{available:.1f} GiB of memory are available, not enough for '
            f'a sweep of {models} models: select fewer models, or set the '
            'memory limit of a process'
        )
    return limit


def sweep(
    names: Sequence[str],
    sides: Sequence[int],
    runs: int = 5,
    limit_gib: Optional[float] = None,
    known: Sequence[SweepRow] = (),
) -> Iterator[List[SweepRow]]:
    """Measure the cost of a forward pass for each model and size.

    Multiply-adds and activations are counted on the meta device. Memory and
    latency are measured on the CPU, with one image, float32, random weights,
    the default settings of the memory allocator and one process per model and
    size. The first pass of a process is the warm-up run, and its peak memory
    is recorded. Then the processes of one size run in turn, never two at the
    same time, so that changes in the speed of the machine affect all models
    equally.

    Args:
        names (Sequence[str]): From :data:`mmvvt.analysis.benchmark.NAMES`.
        sides (Sequence[int]): Sides of the images, in pixels.
        runs (int): Number of timed runs. Defaults to 5.
        limit_gib (float, optional): Limit of the memory of each process, in
            GiB. Defaults to :func:`default_limit`.
        known (Sequence[SweepRow]): Rows of an earlier sweep, see
            :func:`read_known`. Their models are not measured again at their
            sizes, except those out of memory with a limit lower than
            ``limit_gib``. Defaults to none.

    Yields:
        list[SweepRow]: Rows of one size, in the order of ``names``.

    Raises:
        UserError: If a name is unknown, a package is missing, a model does
            not accept one of the sides, ``runs`` or ``limit_gib`` is not
            positive, there is too little memory for the default limit,
            PyTorch uses a GPU, or the system is not Linux.
    """
    if runs < 1:
        raise UserError(f'the number of runs must be 1 or more, got {runs}')
    if limit_gib is not None and not 0 < limit_gib < math.inf:
        raise UserError(
            f'the memory limit must be a positive number of GiB, got '
            f'{limit_gib}'
        )
    if torch.cuda.is_available():
        raise UserError(
            'a sweep requires a machine without a GPU: hide the GPU with '
            'CUDA_VISIBLE_DEVICES='
        )
    resident_gib()  # raises if the system is not Linux
    names = list(dict.fromkeys(names))
    models = {name: build(name).to('meta') for name in names}
    for name in names:
        lowest = LOWEST_SIDES.get(name, STRIDE)
        if min(sides) < lowest:
            raise UserError(
                f'{name} requires sides of {lowest} pixels or more, got '
                f'{min(sides)}'
            )
    limit = default_limit(len(names)) if limit_gib is None else limit_gib
    kept = {
        (row.model, row.side): row
        for row in known
        if row.status == MEASURED
        or limit_gib is None
        or row.limit_gib >= float(f'{limit_gib:.4g}')  # as in the file
    }
    for side in sides:
        missing = [name for name in names if (name, side) not in kept]
        counts = {
            name: count(models[name], (1, 3, side, side)) for name in missing
        }
        measured = _measure(missing, side, runs, limit)
        for name in missing:
            kept[name, side] = SweepRow(
                model=name,
                side=side,
                multiply_adds=counts[name].multiply_adds,
                activations=counts[name].activations,
                limit_gib=limit,
                machine=machine_line(),
                **measured.get(name, NOT_MEASURED),
            )
        yield [kept[name, side] for name in names]
