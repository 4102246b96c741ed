"""What several tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import mmvvt  # noqa: F401, registers

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / 'tests' / 'data'

# Of the network in tests/data/backbone.npz.
GOLDEN_ARCH = dict(
    embed_dims=[16, 24, 40, 48],
    num_heads=[1, 2, 5, 4],
    mlp_ratios=[8, 8, 4, 4],
    depths=[1, 1, 2, 1])


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def build_model(model, scope='mmpretrain'):
    """Build a model's config as a code base's runner would."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(model)


def run_tool(*arguments, env=None, timeout=300, cwd=ROOT):
    """Run a Python tool of the project; stdout and stderr come together."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            **(env or {})
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout)


@pytest.fixture(scope='session')
def golden():
    """The two golden files."""
    return {
        name: np.load(DATA / f'{name}.npz')
        for name in ('attention', 'backbone')
    }


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """The whole digits data set, written once."""
    from mmvvt.datasets import write_digits
    root = tmp_path_factory.mktemp('data') / 'digits'
    write_digits(str(root))
    return root


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers, and no scope left over from another test."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield
