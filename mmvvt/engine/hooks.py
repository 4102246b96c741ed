"""Hooks that make a run the same whether it is broken off and resumed, or
spread over several processes."""

import random

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import EpochBasedTrainLoop

MAX_SEED = 2**32  # NumPy takes no larger one


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % MAX_SEED)
    torch.manual_seed(seed)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seeds the random generators anew before each training epoch.

    A run that is killed and resumed then draws what an unbroken one would
    have drawn, and ends with the same weights: drop path, dropout and mixing
    depend on the run's seed, the epoch and the rank, not on how many numbers
    were drawn before. For augmentation in worker processes, use
    ``worker_init_fn=dict(type='seed_worker')`` and no persistent workers,
    which live longer than an epoch.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        """Give the sampler the seed of a resumed run.

        It was built before the checkpoint was read, with a seed of its own
        if the config has none. Data loaders without a sampler, as some tools
        put in place, are left as they are.
        """
        sampler = getattr(runner.train_dataloader, 'sampler', None)
        # The runner has no public attribute for the settings of its seed:
        # runner.cfg lacks them where it was built without a config.
        different_seeds = runner._randomness_cfg.get('diff_rank_seed', False)
        if hasattr(sampler, 'seed') and not different_seeds:
            sampler.seed = runner.seed

    def before_train_epoch(self, runner) -> None:
        """Seed Python, NumPy and PyTorch."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        sequence = np.random.SeedSequence(
            [runner.seed, runner.epoch, get_rank()]
        )
        _seed_everything(int(sequence.generate_state(1)[0]))


@FUNCTIONS.register_module()
def seed_worker(worker_id: int) -> None:
    """Seed a data loader's worker from PyTorch's base seed.

    mmengine's own function gives a worker the same seed each time it starts,
    and so the same augmentations in each epoch unless workers persist.

    Args:
        worker_id (int): Number of the worker; PyTorch has already added it
            to its seed.
    """
    _seed_everything(torch.initial_seed())


@HOOKS.register_module()
class MeanLossHook(Hook):
    """Logs the mean of the losses over all processes.

    mmengine logs those of the first process, which has seen a part of the
    batch. With this, the log of several processes is that of one with the
    joint batch.
    """

    priority = 'HIGHEST'  # before RuntimeInfoHook takes them for the log

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Replace each loss by its mean."""
        if get_world_size() == 1:
            return
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.detach().clone()
                all_reduce(value, op='mean')
                outputs[name] = value
