"""Tests of random seeds per epoch and per worker."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.runner import EpochBasedTrainLoop

from mmvvt.engine import EpochSeedHook, seed_worker


def draw():
    return (random.random(), float(np.random.rand()), float(torch.rand(1)))


def runner(seed, epoch):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    return SimpleNamespace(seed=seed, epoch=epoch, train_loop=loop)


def after_seeding(seed, epoch):
    draw()  # previous draws have no effect
    EpochSeedHook().before_train_epoch(runner(seed, epoch))
    return draw()


def test_epochs_are_a_function_of_seed_and_number():
    assert after_seeding(1, 2) == after_seeding(1, 2)
    drawn = {after_seeding(s, e) for s in (1, 2) for e in (1, 2)}
    assert len(drawn) == 4  # (1, 2) differs from (2, 1)


def test_workers_follow_torch():
    def worker(base):
        torch.manual_seed(base)  # as PyTorch does in a worker
        seed_worker(0)
        return draw()

    assert worker(2**63 + 5) == worker(2**63 + 5)
    assert worker(3) != worker(4)


def test_resumed_runs_shuffle_with_the_seed_they_began_with():
    sampler = SimpleNamespace(seed=1)
    EpochSeedHook().before_train(
        SimpleNamespace(
            seed=7,
            _randomness_cfg=dict(seed=7),
            train_dataloader=SimpleNamespace(sampler=sampler),
        )
    )
    assert sampler.seed == 7
