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


@pytest.mark.parametrize('kind', ['epoch', 'iter'])
def test_killed_again_and_again(kind, tmp_path, digits_root):
    """``make test-kill`` kills 20 runs of each kind, the suite 2."""
    pytest.importorskip('mmpretrain')
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name('kill_and_resume.py')),
            kind,
            os.environ.get('MMVVT_KILLS', '2'),
            str(tmp_path / 'runs'),
            str(digits_root),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(kind, result)
    assert result['kills'] == int(os.environ.get('MMVVT_KILLS', '2'))
