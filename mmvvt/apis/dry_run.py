"""Run everything up to the first step, and measure this step."""

import time
from typing import Any, List

import torch
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..analysis.memory import peak_memory_gib


class _Stop(Exception):
    """Ends the loop of the runner after the measured step."""


def _size(node: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(node, torch.Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(_size(child) for child in node.values())
    if isinstance(node, (list, tuple)):
        return sum(_size(child) for child in node)
    return 0


def _describe_batch(batch: Any) -> str:
    images = batch.get('inputs') if isinstance(batch, dict) else None
    if images is None or not len(images):
        return 'batch: not a batch of images'
    shapes = {' x '.join(map(str, image.shape)) for image in images}
    return f'batch of a process: {len(images)} images of {", ".join(shapes)}'


class _StepMeter(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.lines: List[str] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        loop = runner.train_loop
        wrapper = runner.optim_wrapper
        parameters = list(runner.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        start = time.perf_counter()
        runner.model.train_step(data_batch, optim_wrapper=wrapper)
        self._add_step(data_batch, time.perf_counter() - start)
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        epochs = f' in {loop.max_epochs} epochs' if by_epoch else ''
        size = _size(runner.model.state_dict()) + _size(wrapper.state_dict())
        self.lines += [
            f'parameters: {total / 1e6:.2f} M, of which '
            f'{trained / 1e6:.2f} M are trained',
            f'checkpoint: {size / 2**20:.1f} MiB',
            f'steps: {loop.max_iters}' + epochs,
        ]
        raise _Stop

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            runner.model.test_step(data_batch)
        self._add_step(data_batch, time.perf_counter() - start)
        self.lines.append(f'steps: {len(runner.test_dataloader)}')
        raise _Stop

    def _add_step(self, batch: Any, seconds: float) -> None:
        device = 'GPU' if torch.cuda.is_available() else 'process'
        self.lines += [
            _describe_batch(batch),
            f'first step: {seconds:.2f} s, without warm-up',
            f'peak memory of the {device}: {peak_memory_gib():.2f} GiB',
        ]


def dry_run(runner: Runner, training: bool) -> List[str]:
    """Start a run and stop after its first step.

    The runner loads the datasets and the weights, and builds the optimizer
    and its schedules. The first step is computed to measure its time and
    memory; nothing is saved.

    Args:
        runner (Runner): Runner with a temporary work directory. It cannot be
            used afterwards.
        training (bool): Whether to train or to test.

    Returns:
        list[str]: Resources that a step needs, one line each.
    """
    meter = _StepMeter()
    runner.register_hook(meter)
    try:
        runner.train() if training else runner.test()
    except _Stop:
        pass
    return meter.lines
