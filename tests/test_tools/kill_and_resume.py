"""Kill training at random moments and resume it, again and again.

Usage: kill_and_resume.py epoch|iter KILLS WORK_DIR DATA_ROOT

The training runs in a forked process, so that packages are imported once.
Flushing a file to the disk is slowed down, so that many kills hit a run while
it saves. Prints the number of kills, and how many of them left a temporary
file, as JSON.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import mmpretrain  # noqa: F401, imported once
import torch

import mmvvt  # noqa: F401, registers
from mmvvt.checkpoint import find_resumable, load_checkpoint_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
_base_ = '{ROOT}/configs/demo/vvt-nano_digits.py'
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
param_scheduler = [dict(type='ConstantLR', factor=1.0)]
"""
ITERATIONS = """
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=100000,
    val_interval=100000)
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=1, by_epoch=False, interval=2))
param_scheduler = [dict(type='ConstantLR', factor=1.0, by_epoch=False)]
log_processor = dict(by_epoch=False)
"""


def start(arguments, log):
    """Run tools/train.py in a forked process; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        flush = os.fsync

        def slow(handle):
            time.sleep(0.1)
            flush(handle)

        os.fsync = slow
        sys.argv = ['train.py', *arguments]
        runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def progress(work_dir):
    """Iteration of the checkpoint that would be resumed, 0 without one."""
    path, _ = find_resumable([work_dir])
    return 0 if path is None else load_checkpoint_file(path)['meta']['iter']


def newest(folder):
    """Time of the newest checkpoint in a folder."""
    return max(
        (path.stat().st_mtime_ns for path in Path(folder).glob('*.pth')),
        default=None,
    )


def main():
    kind, kills, work_dir, data_root = sys.argv[1:]
    torch.set_num_threads(1)
    random.seed(kind)
    os.makedirs(work_dir)
    config, log = f'{work_dir}/config.py', f'{work_dir}/log.txt'
    Path(config).write_text(CONFIG if kind == 'epoch' else CONFIG + ITERATIONS)
    folder = f'{work_dir}/run'
    arguments = [config, '--work-dir', folder, '--resume', 'auto']
    options = [
        '--cfg-options',
        f'train_dataloader.dataset.data_root={data_root}',
        f'val_dataloader.dataset.data_root={data_root}',
        'train_dataloader.dataset.indices=32',
        'val_dataloader.dataset.indices=8',
        'train_dataloader.batch_size=16',
    ]
    limit = 'max_epochs' if kind == 'epoch' else 'max_iters'
    before, inside, seen = 0, 0, None
    for number in range(int(kills)):
        child = start([*arguments, *options, f'train_cfg.{limit}=100000'], log)
        # Most runs save before they are killed, some are killed while they
        # start.
        deadline = time.time() + 60
        saves = before == 0 or random.random() < 0.8
        while saves and newest(folder) == seen and time.time() < deadline:
            ended = os.waitpid(child, os.WNOHANG) != (0, 0)
            assert not ended, Path(log).read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 1.0 if saves else 3.0))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f'run {number} ended before the kill'
        files = os.listdir(folder)
        inside += any(name.startswith('.writing-') for name in files)
        after = progress(folder)
        assert after >= before > -1 and after > 0, (before, after, files)
        before, seen = after, newest(folder)

    per_epoch = 2
    final = before // per_epoch + 2 if kind == 'epoch' else before + 4
    child = start([*arguments, *options, f'train_cfg.{limit}={final}'], log)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0, Path(log).read_text()[-3000:]
    iterations = final * per_epoch if kind == 'epoch' else final
    assert progress(folder) == iterations
    left = [name for name in os.listdir(folder) if name.startswith('.writing')]
    assert not left, left
    print(json.dumps(dict(kills=int(kills), inside=inside, final=final)))


if __name__ == '__main__':
    main()
