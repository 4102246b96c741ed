"""Device of the Triton tests, and the start of Triton's interpreter."""

import os

import pytest
import torch

from mmvvt.analysis.kernel_errors import patch_interpreter_once

from conftest import ROOT, run_tool

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'

# Triton reads TRITON_INTERPRET only once, when it is imported. Without a GPU,
# these tests therefore run in a separate process.
needs_kernels = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETED,
    reason='runs in a process with TRITON_INTERPRET=1, see test_interpreted',
)


if INTERPRETED:
    patch_interpreter_once()


def run_interpreted(name, *options):
    """Run a test file in Triton's interpreter on the CPU."""
    pytest.importorskip('triton')
    done = run_tool(
        '-m',
        'pytest',
        '-q',
        '-x',
        '-p',
        'no:cacheprovider',
        ROOT / 'tests' / 'test_ops' / name,
        *options,
        env={'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    assert ' passed' in done.stdout, done.stdout


def poison(monkeypatch):
    """Fill uninitialised tensors with NaN."""
    for owner, name in (
        (torch, 'empty'),
        (torch, 'empty_like'),
        (torch.Tensor, 'new_empty'),
    ):
        make = getattr(owner, name)

        def poisoned(*args, make=make, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float('nan')) if t.is_floating_point() else t

        monkeypatch.setattr(owner, name, poisoned)
