"""Hooks for reproducible and compiled training, and for several processes."""

import os
import random
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UserError

MAX_SEED = 2**32  # Exclusive upper limit of seeds in NumPy
# A VVT needs up to 32 graphs of its blocks: four stages, in training and
# evaluation, for one image and several, for square grids and others.
MAX_GRAPHS = 64


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % MAX_SEED)
    torch.manual_seed(seed)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed the random number generators before each training epoch.

    Drop path, dropout and mixing then depend on the seed of the run, the epoch
    and the rank, but not on the random numbers drawn before. A run that is
    interrupted and resumed therefore ends with the same weights as an
    uninterrupted run. To make augmentations in worker processes reproducible
    as well, use ``worker_init_fn=dict(type='seed_worker')`` and do not use
    persistent workers, which are not seeded again in the next epoch.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        """Set the seed of the sampler to the seed of the run.

        The sampler is built before the checkpoint of a resumed run restores
        the seed of the run. If the config does not set a seed, the sampler
        therefore has a different seed. Nothing is changed if the data loader
        has no sampler with a seed, or if ``diff_rank_seed`` is set.

        Args:
            runner (Runner): The runner of the training process.
        """
        sampler: Any = getattr(runner.train_dataloader, 'sampler', None)
        # The runner has no public attribute for its randomness settings, and
        # runner.cfg lacks them if the runner was built without a config.
        different_seeds = runner._randomness_cfg.get('diff_rank_seed', False)
        if hasattr(sampler, 'seed') and not different_seeds:
            sampler.seed = runner.seed

    def before_train_epoch(self, runner) -> None:
        """Seed Python, NumPy and PyTorch; only in epoch-based training."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        sequence = np.random.SeedSequence(
            [runner.seed, runner.epoch, get_rank()]
        )
        _seed_everything(int(sequence.generate_state(1)[0]))


@FUNCTIONS.register_module()
def seed_worker(worker_id: int) -> None:
    """Seed a data loader worker from its initial PyTorch seed.

    mmengine's ``worker_init_fn`` uses the same seed each time a worker starts,
    so that without persistent workers the augmentations are the same in every
    epoch.

    Args:
        worker_id (int): Index of the worker. It is not used, because PyTorch
            already includes it in the initial seed of the worker.
    """
    _seed_everything(torch.initial_seed())


@HOOKS.register_module()
class SkippedFilesHook(Hook):
    """Report the files that training skipped because they cannot be loaded.

    Args:
        log_file (str): File with the path of a skipped file per line, as
            written by :class:`mmvvt.datasets.GuardedPipeline`.
    """

    def __init__(self, log_file: str):
        self.log_file = log_file

    def after_train(self, runner) -> None:
        """Log the number of different files and where they are listed."""
        if not os.path.isfile(self.log_file):
            runner.logger.info('no files were skipped')
            return
        with open(
            self.log_file, encoding='utf-8', errors='backslashreplace'
        ) as file:
            paths = sorted(set(file.read().splitlines()))
        runner.logger.warning(
            f'{len(paths)} files could not be loaded and were skipped, such '
            f'as {paths[0]}; all are listed in {self.log_file}'
        )


@HOOKS.register_module()
class MeanLossHook(Hook):
    """Log the mean of the losses over all processes.

    mmengine logs only the losses of the first process, computed on its part
    of the batch. With this hook, the log of several processes corresponds to
    the log of a single process with the complete batch.
    """

    priority = 'HIGHEST'  # Runs before RuntimeInfoHook logs the losses

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Replace each loss with its mean over all processes.

        All processes exchange their losses in a single collective operation,
        so that it does not matter which losses each of them has. A loss that
        some processes lack, for example because their images have no
        objects, is averaged over the processes that have it.
        """
        if get_world_size() == 1:
            return
        losses = outputs if isinstance(outputs, dict) else {}
        own = {
            name: float(value)
            for name, value in losses.items()
            if isinstance(value, torch.Tensor) and value.numel() == 1
        }
        values: Dict[str, List[float]] = {}
        for one in all_gather_object(own):
            for name, value in one.items():
                values.setdefault(name, []).append(value)
        for name, parts in values.items():
            losses[name] = torch.tensor(sum(parts) / len(parts))


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compile the backbone with ``torch.compile``, and nothing else.

    The setting ``compile=True`` of mmengine compiles the complete
    ``train_step``: the data preprocessor with its batch augmentations, the
    head and the optimizer step. With PyTorch 2.11, inductor fails to compile
    mmpretrain's Mixup, which indexes a batch with ``torch.randperm``, and
    mmpretrain's losses, which read labels in Python, split the graph. The
    backbone compiles to a single graph.

    The backbone is compiled in place by :meth:`torch.nn.Module.compile`, so
    that checkpoints have the same keys as those of a model that is not
    compiled. It is compiled at its first call, which takes minutes.

    With ``block_type``, only the blocks are compiled, for all sizes, and the
    blocks of a stage share a graph (regional compilation). This takes a
    fraction of the time, see ``docs/deploy.md``: the sizes of a VVT's fourth
    stage are long expressions of the image size, those of a block are not.
    All blocks share one limit of graphs,
    ``torch._dynamo.config.cache_size_limit``, which is raised to
    :data:`MAX_GRAPHS`.

    With ``dynamic=True`` and neither ``mode`` nor ``options``, inductor's
    ``layout_optimization`` is switched off. On CPUs, it makes the strides of
    saved activations constants, and training would be compiled again at each
    image width.

    Args:
        block_type (str, optional): Name of the class of the blocks, such as
            'VVTBlock', to compile only these. Defaults to None, the complete
            backbone.
        **options: Arguments of :func:`torch.compile`, such as
            ``dynamic=True`` for images of many sizes, which is the default
            if ``block_type`` is set.

    Raises:
        UserError: When the run starts, if the model has no backbone, the
            backbone has no such blocks, or ``torch.compile`` does not accept
            the options.
    """

    def __init__(self, block_type: Optional[str] = None, **options):
        self.block_type = block_type
        self.options = options
        if block_type is not None:
            options.setdefault('dynamic', True)
        if (
            options.get('dynamic')
            and options.get('backend', 'inductor') == 'inductor'
            and not {'mode', 'options'} & options.keys()
        ):
            options['options'] = dict(layout_optimization=False)

    def _find_modules(self, backbone: nn.Module) -> List[nn.Module]:
        """Find the modules to compile."""
        if self.block_type is None:
            return [backbone]
        classes = [type(module).__name__ for module in backbone.modules()]
        if self.block_type not in classes:
            raise UserError(
                f'CompileBackboneHook found no block_type={self.block_type!r} '
                f'in the backbone, whose modules are '
                f'{", ".join(sorted(set(classes)))}'
            )
        torch._dynamo.config.cache_size_limit = max(
            torch._dynamo.config.cache_size_limit, MAX_GRAPHS
        )
        return [
            module
            for module, name in zip(backbone.modules(), classes)
            if name == self.block_type
        ]

    def _compile(self, runner) -> None:
        model = runner.model
        # Wrappers for several processes or test-time augmentation
        while not hasattr(model, 'backbone') and hasattr(model, 'module'):
            model = model.module
        backbone = getattr(model, 'backbone', None)
        if not isinstance(backbone, nn.Module):
            raise UserError(
                'CompileBackboneHook requires a model with a backbone, got '
                f'{type(model).__name__}; remove the hook from custom_hooks'
            )
        modules = self._find_modules(backbone)
        if modules[0]._compiled_call_impl is not None:
            return  # Validation follows training.
        options = ', '.join(f'{k}={v!r}' for k, v in self.options.items())
        try:
            for module in modules:
                module.compile(**self.options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f'CompileBackboneHook cannot call torch.compile({options}): '
                f'{error}'
            ) from error
        if self.block_type is None:
            what = f'{type(backbone).__name__} is compiled'
            when = 'it is first called'
        else:
            what = f'{len(modules)} {self.block_type} are compiled'
            when = 'they are first called'
        runner.logger.info(f'{what} by torch.compile({options}) when {when}')

    def before_train(self, runner) -> None:
        """Compile the backbone before training."""
        self._compile(runner)

    def before_val(self, runner) -> None:
        """Compile the backbone before validation without training."""
        self._compile(runner)

    def before_test(self, runner) -> None:
        """Compile the backbone before testing."""
        self._compile(runner)
