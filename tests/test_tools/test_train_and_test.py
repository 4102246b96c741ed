"""Tests of tools/train.py and tools/test.py with classifiers."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import torch

from conftest import ROOT, run_tool

DEMO = ROOT / 'configs' / 'demo' / 'vvt-nano_digits.py'
# Run of a few seconds: two epochs with six steps each
SHORT = [
    'train_cfg.max_epochs=2',
    'train_dataloader.batch_size=32',
    'train_dataloader.dataset.indices=200',
    'default_hooks.logger.interval=1',
]


def run_in_process(monkeypatch, tool, *arguments):
    """Return the exit code and last line, without a new process."""
    monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    return caught.value.code


def losses(work_dir):
    """Return the training losses in the order of the log."""
    records = []
    for log in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        records += [json.loads(line) for line in open(log)]
    return [r['loss'] for r in records if 'loss' in r]


def weights(path):
    return torch.load(path, map_location='cpu')['state_dict']


@pytest.fixture(scope='module')
def trained(tmp_path_factory, digits_root):
    """Work directory of a short training run."""
    work_dir = tmp_path_factory.mktemp('trained')
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        work_dir,
        '--amp',
        '--cfg-options',
        *SHORT,
        f'train_dataloader.dataset.data_root={digits_root}',
        f'val_dataloader.dataset.data_root={digits_root}',
    )
    assert done.returncode == 0, done.stdout
    assert 'No GPU' in done.stdout or torch.cuda.is_available()
    return work_dir


def test_train_leaves_checkpoint_and_log(trained):
    assert (trained / 'epoch_2.pth').is_file()
    assert len(losses(trained)) == 12
    meta = torch.load(trained / 'epoch_2.pth')['meta']
    assert meta['dataset_meta']['classes'] == tuple('0123456789')


def test_test_writes_predictions_pictures_and_metrics(
    trained, digits_root, tmp_path
):
    data = [
        f'test_dataloader.dataset.data_root={digits_root}',
        'test_dataloader.dataset.indices=90',
    ]
    done = run_tool(
        'tools/test.py',
        DEMO,
        trained / 'epoch_2.pth',
        '--out',
        tmp_path / 'p.pkl',
        '--show-dir',
        tmp_path / 'show',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *data,
    )
    assert done.returncode == 0, done.stdout
    predictions = mmengine.load(tmp_path / 'p.pkl')
    right = sum(int(p['pred_label'] == p['gt_label']) for p in predictions)
    assert f'accuracy/top1: {100 * right / 90:.4f}' in done.stdout
    pictures = list((tmp_path / 'show').iterdir())
    assert len(pictures) == 90
    assert cv2.imread(str(pictures[0])).shape[0] >= 200  # readable

    done = run_tool(
        'tools/test.py',
        DEMO,
        trained / 'epoch_2.pth',
        '--out',
        tmp_path / 'm.json',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *data,
    )
    assert done.returncode == 0, done.stdout
    metrics = json.loads((tmp_path / 'm.json').read_text())
    assert metrics == {'accuracy/top1': pytest.approx(100 * right / 90)}

    done = run_tool(
        'tools/analysis_tools/report_classification.py',
        DEMO,
        trained / 'epoch_2.pth',
        trained,
        tmp_path / 'p.pkl',
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()[-4:]
    assert lines[0].startswith(f'top-1: {100 * right / 90:.2f} %')
    for line, name in (
        (lines[1], 'curves.png'),
        (lines[2], 'predictions.png'),
    ):
        path = line.split(': ')[1]
        assert path.endswith(name)
        picture = cv2.imread(path)
        assert picture.shape[1] > 800 and picture.std() > 10
    assert lines[3].startswith('to draw')


def make_imagenet(root):
    """Write a dataset like ImageNet with one image per class."""
    random = np.random.RandomState(0)
    for split in ('train', 'val'):
        for number in range(1000):
            folder = root / split / f'n{number:08d}'
            folder.mkdir(parents=True)
            image = random.randint(0, 256, (40, 48, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f'{number}.JPEG'), image)


@pytest.mark.parametrize(
    'base', ['vvt-tiny_8xb128_in1k.py', 'vvt-small_8xb128_in1k-384px.py']
)
def test_imagenet_recipe_end_to_end(base, tmp_path):
    """The ImageNet configs train and test with their full pipelines."""
    make_imagenet(tmp_path / 'imagenet')
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = '{ROOT}/configs/classification/{base}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='VVT',
        arch=dict(
            embed_dims=[8, 16, 24, 32],
            num_heads=[1, 2, 3, 4],
            mlp_ratios=[2, 2, 2, 2],
            depths=[1, 1, 1, 1])),
    head=dict(in_channels=32))
data_root = '{tmp_path}/imagenet'
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    dataset=dict(data_root=data_root, indices=12))
val_dataloader = dict(
    batch_size=2,
    num_workers=1,
    dataset=dict(data_root=data_root, indices=12))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
load_from = None
""")
    work_dir = tmp_path / 'work'
    done = run_tool(
        'tools/train.py',
        config,
        '--work-dir',
        work_dir,
        '--auto-scale-lr',
        '--cfg-options',
        'default_hooks.logger.interval=1',
    )
    assert done.returncode == 0, done.stdout
    assert 'the model starts from random weights' in done.stdout
    values = losses(work_dir)
    assert len(values) == 6 and all(np.isfinite(values))
    # 2 images per step; the learning rate of the config is for 1024
    assert 'LR is set based on batch size of 1024' in done.stdout
    done = run_tool(
        'tools/test.py',
        config,
        work_dir / 'epoch_1.pth',
        '--tta',
        '--work-dir',
        work_dir,
    )
    assert done.returncode == 0, done.stdout
    assert 'accuracy/top1' in done.stdout and 'accuracy/top5' in done.stdout


def test_two_processes_equal_one(digits_root, tmp_path):
    """Two processes with half of the batch give the same losses."""
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.dataset.indices=704',
        'val_dataloader.dataset.indices=90',
        'default_hooks.logger.interval=1',
        'model.train_cfg=None',  # without mixing
        # no random inversion, which differs between processes
        'train_dataloader.dataset.pipeline.2.prob=0.',
        f'train_dataloader.dataset.data_root={digits_root}',
        f'val_dataloader.dataset.data_root={digits_root}',
    ]
    one = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path / 'one',
        '--cfg-options',
        *options,
    )
    assert one.returncode == 0, one.stdout
    two = subprocess.run(
        [
            'bash',
            'tools/dist_train.sh',
            str(DEMO),
            '2',
            '--work-dir',
            str(tmp_path / 'two'),
            '--cfg-options',
            *options,
            'train_dataloader.batch_size=32',
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHON': sys.executable, 'PORT': '29517'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stdout
    first, second = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert len(first) == 11
    # The order of sums differs, and the steps of Adam amplify the errors.
    np.testing.assert_allclose(first[:5], second[:5], rtol=1e-5)
    np.testing.assert_allclose(first, second, rtol=2e-3)

    done = subprocess.run(
        [
            'bash',
            'tools/dist_test.sh',
            str(DEMO),
            str(tmp_path / 'two' / 'epoch_1.pth'),
            '2',
            '--out',
            str(tmp_path / 'm.json'),
            '--work-dir',
            str(tmp_path / 'two'),
            '--cfg-options',
            f'test_dataloader.dataset.data_root={digits_root}',
            'test_dataloader.dataset.indices=90',
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHON': sys.executable, 'PORT': '29518'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    top1 = json.loads((tmp_path / 'm.json').read_text())['accuracy/top1']
    assert f'accuracy/top1: {top1:.4f}' in two.stdout  # as during training


def test_killed_and_resumed_equals_unbroken(digits_root, tmp_path):
    """A killed and resumed run gives the weights of a complete run."""
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = '{DEMO}'
model = dict(backbone=dict(drop_path_rate=0.2))
train_dataloader = dict(
    num_workers=2, worker_init_fn=dict(type='seed_worker'),
    dataset=dict(data_root='{digits_root}', indices=704, pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(32, 32), interpolation='bicubic'),
        dict(type='RandomCrop', crop_size=32, padding=4),
        dict(type='PackInputs')]))
val_dataloader = dict(dataset=dict(data_root='{digits_root}', indices=90))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1))
""")
    unbroken, broken = tmp_path / 'unbroken', tmp_path / 'broken'
    done = run_tool('tools/train.py', config, '--work-dir', unbroken)
    assert done.returncode == 0, done.stdout

    process = subprocess.Popen(
        [
            sys.executable,
            'tools/train.py',
            str(config),
            '--work-dir',
            str(broken),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if 'Epoch(train)' in line and '[2][ 7/11]' in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert (broken / 'epoch_1.pth').exists()
    assert not (broken / 'epoch_2.pth').exists()

    done = run_tool('tools/train.py', config, '--work-dir', broken, '--resume')
    assert done.returncode == 0, done.stdout
    assert 'epoch_1.pth' in done.stdout and '[2][ 1/11]' in done.stdout
    assert '[1][ 1/11]' not in done.stdout
    expected = weights(unbroken / 'epoch_3.pth')
    for key, tensor in weights(broken / 'epoch_3.pth').items():
        assert torch.equal(tensor, expected[key]), key


def test_resume_with_nothing_to_resume_keeps_load_from(
    trained, digits_root, tmp_path
):
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--resume',
        '--cfg-options',
        *SHORT,
        'train_cfg.max_epochs=1',
        f'load_from={trained}/epoch_2.pth',
        f'train_dataloader.dataset.data_root={digits_root}',
        f'val_dataloader.dataset.data_root={digits_root}',
    )
    assert done.returncode == 0, done.stdout
    assert f'Load checkpoint from {trained}/epoch_2.pth' in done.stdout
    assert len(losses(tmp_path)) == 6  # starts at the first epoch


def test_resume_from_a_path(trained, digits_root, tmp_path):
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--resume',
        trained / 'epoch_2.pth',
        '--cfg-options',
        *SHORT,
        'train_cfg.max_epochs=3',
        f'train_dataloader.dataset.data_root={digits_root}',
        f'val_dataloader.dataset.data_root={digits_root}',
    )
    assert done.returncode == 0, done.stdout
    assert len(losses(tmp_path)) == 6
    assert (tmp_path / 'epoch_3.pth').is_file()


IMAGENET = ROOT / 'configs/classification/vvt-tiny_8xb128_in1k.py'


@pytest.mark.parametrize(
    'tool,arguments,message',
    [
        ('train.py', ['no.py'], 'no such config file: no.py'),
        ('test.py', ['no.py', 'no.pth'], 'no such config file: no.py'),
        ('test.py', [DEMO, 'no.pth'], 'no such checkpoint file: no.pth'),
        (
            'train.py',
            [DEMO, '--resume', 'no.pth'],
            'no such checkpoint file: no.pth',
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'load_from=no.pth'],
            'no such checkpoint file: no.pth; set --cfg-options '
            'load_from=PATH, or load_from=None to start from random weights',
        ),
        (
            'train.py',
            [IMAGENET.with_stem('vvt-tiny_8xb128_in1k-384px')],
            'no such checkpoint file: pretrained/vvt-tiny_in1k.pth; set '
            '--cfg-options load_from=PATH, or load_from=None to start from '
            'random weights',
        ),
        (
            'train.py',
            [IMAGENET],
            'train_dataloader (ImageNet): the data folder '
            'does not exist: data/imagenet',
        ),
        (
            'test.py',
            [IMAGENET, __file__],
            'test_dataloader (ImageNet): the data '
            'folder does not exist: data/imagenet\n'
            f'error: refused to load {__file__}: Unsupported operand 34',
        ),
        (
            'test.py',
            [DEMO, __file__, '--out', 'a.txt'],
            '--out must end in .pkl '
            '(predictions) or .json (metrics), got a.txt',
        ),
        (
            'test.py',
            [DEMO, __file__, '--tta'],
            '--tta needs tta_model in the config',
        ),
        (
            'test.py',
            [
                DEMO,
                __file__,
                '--show-dir',
                'a',
                '--cfg-options',
                'default_hooks.visualization=None',
            ],
            '--show-dir needs default_hooks.visualization in the config',
        ),
        (
            'train.py',
            [
                DEMO,
                '--auto-scale-lr',
                '--cfg-options',
                'auto_scale_lr.base_batch_size=0',
            ],
            f'--auto-scale-lr needs auto_scale_lr.base_batch_size in {DEMO}',
        ),
        (
            'train.py',
            [DEMO, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'],
            f'--auto-scale-lr needs auto_scale_lr.base_batch_size in {DEMO}',
        ),
        (
            'train.py',
            [
                DEMO,
                '--amp',
                '--cfg-options',
                'optim_wrapper.type=ApexOptimWrapper',
            ],
            '--amp does not support the optim_wrapper ApexOptimWrapper',
        ),
    ],
)
def test_bad_arguments(monkeypatch, tool, arguments, message):
    code = run_in_process(monkeypatch, tool, *arguments)
    assert code == f'error: {message}'


def test_exit_code_of_an_error():
    done = run_tool('tools/train.py', 'no.py')
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == 'error: no such config file: no.py'


def test_config_of_a_package_that_is_not_installed(monkeypatch, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmrazor'\n")
    code = run_in_process(monkeypatch, 'train.py', config)
    assert 'needs the package mmrazor, which is not installed' in code


@pytest.mark.parametrize(
    'script,count',
    [
        ('dist_train.sh', 1),
        ('dist_test.sh', 2),
        ('slurm_train.sh', 3),
        ('slurm_test.sh', 3),
    ],
)
def test_scripts_say_what_they_need(script, count):
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / script), *['x'] * count],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ') and 'CONFIG' in done.stderr


@pytest.mark.parametrize(
    'script,arguments,expected',
    [
        (
            'slurm_train.sh',
            ['part', 'job', 'c.py', 'wd', '--amp'],
            'tools/train.py c.py --work-dir wd --launcher slurm --amp',
        ),
        (
            'slurm_test.sh',
            ['part', 'job', 'c.py', 'x.pth', '--tta'],
            'tools/test.py c.py x.pth --launcher slurm --tta',
        ),
    ],
)
def test_slurm_scripts(script, arguments, expected, tmp_path):
    """The scripts pass the expected arguments to srun."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ['bash', f'tools/{script}', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            'PATH': f'{tmp_path}:{os.environ["PATH"]}',
            'GPUS': '16',
            'PYTHON': 'python',
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f'python -u {expected}')
    assert '-p part --job-name=job --gres=gpu:8 --ntasks=16' in done.stdout
