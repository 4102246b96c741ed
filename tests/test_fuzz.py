"""Damaged and hostile files end in one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def test_damaged_and_hostile_files(tmp_path):
    """``make fuzz`` tries 10 000 cases, the suite 200."""
    count = int(os.environ.get('MMVVT_FUZZ', '200'))
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name('fuzz.py')),
            '0',
            str(count),
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    last = (tmp_path / 'case.txt').read_text()
    assert done.returncode == 0, f'case {last}: {done.stderr[-2000:]}'
    result = json.loads(done.stdout.splitlines()[-1])
    for outcome, number in sorted(result['outcomes'].items()):
        print(f'{number:6} {outcome}')
    assert result['failures'] == []
    assert sum(result['outcomes'].values()) == count
    # All readers have read some of the files, and refused others.
    for kind in ('checkpoint', 'annotations', 'images', 'predictions'):
        assert result['outcomes'].get(f'{kind} refused', 0) > 0
    assert result['outcomes'].get('checkpoint read', 0) > 0
    assert result['outcomes'].get('images read', 0) > 0
