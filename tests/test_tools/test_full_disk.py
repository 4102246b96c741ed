"""A full disk ends training with one line and keeps earlier checkpoints."""

import logging
import os
import re
import subprocess

import pytest

from mmvvt.checkpoint import READS_RUNNER_CHECKPOINTS, load_checkpoint_file
from mmvvt.cli import run

from conftest import ROOT, run_tool

CONFIG = f"""
_base_ = '{ROOT}/configs/demo/vvt-nano_digits.py'
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, interval=1))
train_dataloader = dict(dataset=dict(indices=16), batch_size=16)
val_dataloader = dict(dataset=dict(indices=8))
"""


@pytest.fixture
def disk(tmp_path):
    """Folder on a file system that has space for one checkpoint."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('cannot mount a file system')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.skipif(not READS_RUNNER_CHECKPOINTS, reason='needs PyTorch 2.6')
def test_training_on_a_full_disk(disk, digits_root, tmp_path):
    pytest.importorskip('mmpretrain')
    (tmp_path / 'config.py').write_text(CONFIG)
    done = run_tool(
        'tools/train.py',
        tmp_path / 'config.py',
        '--work-dir',
        disk,
        '--cfg-options',
        f'train_dataloader.dataset.data_root={digits_root}',
        f'val_dataloader.dataset.data_root={digits_root}',
    )
    assert done.returncode == 1, done.stdout
    assert 'Traceback' not in done.stdout
    assert re.fullmatch(
        rf'error: cannot write {disk}/epoch_2.pth: No space left on device; '
        r'[\d,]+ bytes are needed and [\d,]+ are free',
        done.stdout.splitlines()[-1],
    )
    files = [name for name in os.listdir(disk) if '.' in name]
    assert set(files) == {'config.py', 'epoch_1.pth'}
    assert load_checkpoint_file(str(disk / 'epoch_1.pth'))['optimizer']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs Linux')
def test_log_file_on_a_full_disk(capfd):
    def main():
        logger = logging.getLogger('test_full_disk')
        logger.addHandler(logging.FileHandler('/dev/full'))
        logger.error('a line')

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == (
        'error: cannot write /dev/full: No space left on device'
    )
    assert 'Traceback' not in capfd.readouterr().err
