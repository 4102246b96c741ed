"""Freed memory is kept only if this is requested."""

import platform

import pytest

from mmvvt.apis.memory import MALLOC_SETTINGS

from conftest import run_tool

ONLY_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='of the GNU C library only'
)
RESIDENT = """
import torch
from mmvvt.models import VVT

def resident():
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) >> 10 for line in file
                    if line.startswith('VmRSS'))

{statement}
before = resident()
tensors = [torch.ones(5 << 20) for _ in range(10)]
del tensors
print(resident() - before)
"""


def kept_mib(statement, env):
    """Return how many of 200 MiB stay resident after they were freed."""
    done = run_tool('-c', RESIDENT.format(statement=statement), env=env)
    assert done.returncode == 0, done.stdout
    return int(done.stdout.split()[-1])


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)


KEEP = 'from mmvvt.apis import keep_freed_memory; assert {}keep_freed_memory()'


@ONLY_GLIBC
@pytest.mark.parametrize(
    'statement,env,expected',
    [
        (KEEP.format(''), {}, True),
        # The setting of the user has priority.
        (KEEP.format('not '), {'MALLOC_TRIM_THRESHOLD_': '131072'}, False),
        # Building and calling a backbone does not change the setting.
        (
            'VVT("tiny")(torch.randn(1, 3, 256, 256))[0].sum().backward()',
            {},
            False,
        ),
    ],
)
def test_freed_memory(statement, env, expected):
    kept = kept_mib(statement, env)
    assert kept > 150 if expected else kept < 50
