"""Training that is killed while it saves can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmvvt.checkpoint import READS_RUNNER_CHECKPOINTS

pytestmark = pytest.mark.skipif(
    not READS_RUNNER_CHECKPOINTS, reason='needs PyTorch 2.6'
)


def test_killed_again_and_again(tmp_path, digits_root):
    """``make test-kill`` kills 20 runs with each loop, the suite 2."""
    pytest.importorskip('mmpretrain')
    kills = int(os.environ.get('MMVVT_KILLS', '2'))
    script = Path(__file__).with_name('kill_and_resume.py')
    done = subprocess.run(
        [sys.executable, script, str(kills), tmp_path / 'runs', digits_root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120 + 60 * kills,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result['kind'] for result in results] == ['epoch', 'iter']
    assert [result['kills'] for result in results] == [kills, kills]
