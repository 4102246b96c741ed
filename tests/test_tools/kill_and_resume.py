"""Kill training at random moments and resume it, again and again.

Usage: kill_and_resume.py KILLS WORK_DIR DATA_ROOT

Runs with an epoch-based loop are killed first, then runs with an
iteration-based loop.

The training runs in a forked process, so that packages are imported once.
Flushing a file to the disk is slowed down, so that many kills hit a run while
it saves. Prints the number of kills, and how many of them left a temporary
file, as a line of JSON for each loop.
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
PER_EPOCH = 2  # iterations


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


def names(folder, start, end=''):
    """Names of the files in a folder with a certain start and end."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    return {n for n in found if n.startswith(start) and n.endswith(end)}


def kill_and_resume(kind, kills, work_dir, data_root):
    """Kill runs, let the last one end, and print the result."""
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
    before, inside = 0, 0
    for number in range(kills):
        seen, stale = names(folder, kind, '.pth'), names(folder, '.writing-')
        child = start([*arguments, *options, f'train_cfg.{limit}=100000'], log)
        # Most runs save before they are killed, half of them are killed while
        # they save again. Some are killed while they start.
        deadline = time.time() + 60
        saves = before == 0 or random.random() < 0.8
        while saves and names(folder, kind, '.pth') == seen:
            assert time.time() < deadline
            ended = os.waitpid(child, os.WNOHANG) != (0, 0)
            assert not ended, Path(log).read_text()[-3000:]
            time.sleep(0.02)
        if saves and random.random() < 0.5:
            while not names(folder, '.writing-'):
                assert time.time() < deadline
                time.sleep(0.002)
            time.sleep(random.uniform(0.0, 0.25))
        else:
            time.sleep(random.uniform(0.0, 1.0 if saves else 3.0))
        complete = names(folder, kind, '.pth')
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f'run {number} ended before the kill'
        inside += bool(names(folder, '.writing-') - stale)
        after = progress(folder)
        per_save = PER_EPOCH if kind == 'epoch' else 1
        saved = [int(name[len(kind) + 1 : -4]) for name in complete]
        assert after >= max([before, *(n * per_save for n in saved)]) > 0
        before = after

    final = before // PER_EPOCH + 2 if kind == 'epoch' else before + 4
    child = start([*arguments, *options, f'train_cfg.{limit}={final}'], log)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0, Path(log).read_text()[-3000:]
    iterations = final * PER_EPOCH if kind == 'epoch' else final
    assert progress(folder) == iterations
    assert not names(folder, '.writing-')
    result = dict(kind=kind, kills=kills, inside=inside, final=final)
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
    kills, work_dir, data_root = sys.argv[1:]
    torch.set_num_threads(1)
    for kind in ('epoch', 'iter'):
        kill_and_resume(kind, int(kills), f'{work_dir}/{kind}', data_root)
