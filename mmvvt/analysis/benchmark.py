"""Time two models against each other in one process, in alternation."""

import platform
import time
from dataclasses import dataclass
from typing import Callable, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor


@dataclass
class Timing:
    """Seconds of one side.

    Attributes:
        median (float): Middle of the runs.
        low (float): 20th percentile.
        high (float): 80th percentile.
    """

    median: float
    low: float
    high: float


def machine_line() -> str:
    """Processor or GPU, threads, and versions, for the head of a table."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
        try:
            with open('/proc/cpuinfo', encoding='utf-8') as file:
                device = next(
                    line.split(':', 1)[1].strip() for line in file
                    if line.startswith('model name'))
        except (OSError, StopIteration):
            pass  # not Linux
    return (f'{device}, {torch.get_num_threads()} threads, Python '
            f'{platform.python_version()}, torch {torch.__version__}')


def check_same(first: nn.Module, second: nn.Module, image: Tensor,
               tolerance: float) -> float:
    """Hold the outputs of two models against each other.

    Args:
        first (nn.Module): A backbone, gives a tuple of feature maps.
        second (nn.Module): Another one with the same weights.
        image (Tensor): ``(B, C, H, W)``.
        tolerance (float): Largest relative error allowed.

    Returns:
        float: Largest relative error ``|a - b| / |b|`` over the outputs.

    Raises:
        AssertionError: If the error is larger, or not a number.
    """
    with torch.no_grad():
        error = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(first(image), second(image)))
    if not error <= tolerance:
        raise AssertionError(
            f'the two sides differ by {error:.1e}, more than {tolerance:.0e}: '
            'not worth timing')
    return error


def forward(model: nn.Module, image: Tensor) -> None:
    """One forward pass without gradients, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        model(image)


def train_step(model: nn.Module, image: Tensor) -> None:
    """One forward and backward pass, in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    sum(out.float().mean() for out in model(image)).backward()


def alternate(sides: List[Callable[[], None]], runs: int,
              warmup: int = 1) -> List[Timing]:
    """Time functions in turn, so that drift of the machine hits all alike.

    Args:
        sides (list[Callable]): What to time.
        runs (int): Counted runs of each.
        warmup (int): Runs of each before. Defaults to 1.

    Returns:
        list[Timing]: One for each side, in their order.
    """
    seconds: List[List[float]] = [[] for _ in sides]
    for run in range(warmup + runs):
        for side, times in zip(sides, seconds):
            _wait()
            start = time.perf_counter()
            side()
            _wait()
            if run >= warmup:
                times.append(time.perf_counter() - start)
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return [
        Timing(*torch.tensor(times, dtype=torch.float64).quantile(
            quantiles).tolist()) for times in seconds
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parse_size(text: str) -> Tuple[int, int]:
    """``BxS`` or ``B x S``: batch and side of a square image.

    Raises:
        ValueError: If it is anything else.
    """
    parts = text.lower().split('x')
    if len(parts) != 2 or not all(p.strip().isdigit() for p in parts):
        raise ValueError(f'a size is BATCHxSIDE, such as 4x224, got {text!r}')
    return int(parts[0]), int(parts[1])
