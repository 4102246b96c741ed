"""Checkpoints of every stock setting can be read, and none is ever lost."""

import errno
import inspect
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvvt import fileio
from mmvvt.checkpoint import (
    READS_RUNNER_CHECKPOINTS,
    find_resumable,
    load_checkpoint_file,
)
from mmvvt.engine import SafeCheckpointHook
from mmvvt.errors import CheckpointError, WriteError

needs_reader = pytest.mark.skipif(
    not READS_RUNNER_CHECKPOINTS, reason='needs PyTorch 2.6'
)
pytestmark = needs_reader


class Numbers(Dataset):
    def __init__(self, **metainfo):
        self.metainfo = metainfo

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3,), float(index)))


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 2)

    def forward(self, inputs, mode='tensor'):
        loss = self.line(inputs).square().mean()
        return [loss] if mode == 'predict' else dict(loss=loss)


def train(
    work_dir,
    epochs=1,
    metainfo=None,
    hooks=(),
    checkpoint=None,
    train_cfg=None,
    **more,
):
    """Train a line; returns the runner."""
    loop = train_cfg or dict(by_epoch=True, max_epochs=epochs)
    sampler = 'DefaultSampler' if loop['by_epoch'] else 'InfiniteSampler'
    optimizer = more.pop('optimizer', dict(type='SGD', lr=0.1, momentum=0.9))
    runner = Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=Numbers(**(metainfo or {})),
            sampler=dict(type=sampler, shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=optimizer),
        default_hooks=dict(
            checkpoint={
                'type': 'SafeCheckpointHook',
                'interval': 1,
                **(checkpoint or {}),
            },
        ),
        custom_hooks=list(hooks),
        log_level='ERROR',
        experiment_name=f'{os.path.basename(work_dir)}{np.random.rand()}',
        **more,
    )
    runner.train()
    return runner


# -- what a run saves can be read ---------------------------------------------

SCHEDULERS = sorted(PARAM_SCHEDULERS.module_dict)
ARGUMENTS = dict(
    eta_max=0.2,
    gamma=0.5,
    milestones=[1, 2],
    param_name='lr',
    periods=[2],
    step_size=1,
    total_steps=40,
)


def arguments_of(cls):
    """Values for all arguments that a scheduler requires."""
    parameters = {}
    for base in cls.__mro__[:-1]:
        parameters.update(inspect.signature(base.__init__).parameters)
    wanted = {
        name: value
        for name, value in ARGUMENTS.items()
        if name in parameters
        and parameters[name].default is inspect.Parameter.empty
    }
    if not cls.__name__.endswith('ParamScheduler'):
        wanted.pop('param_name', None)  # given by the class
    return wanted


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler(name, tmp_path):
    """A run with it is saved, read and resumed; the schedule goes on."""
    cls = PARAM_SCHEDULERS.get(name)
    scheduler = dict(type=name, **arguments_of(cls))
    if name.startswith('CosineAnnealing'):
        scheduler['eta_min'] = 0.0
    if name.startswith('CosineRestart'):
        scheduler['eta_min'] = 0.0
    more = dict(param_scheduler=[scheduler])
    if 'Plateau' in name:
        scheduler['monitor'] = 'loss'
    whole = train(tmp_path / 'whole', epochs=2, **more)
    path = tmp_path / 'whole' / 'epoch_1.pth'
    (state,) = load_checkpoint_file(str(path))['param_schedulers']
    assert 'last_step' in state
    resumed = train(
        tmp_path / 'part', epochs=2, resume=True, load_from=str(path), **more
    )
    assert [s.state_dict() for s in whole.param_schedulers] == [
        s.state_dict() for s in resumed.param_schedulers
    ]


def steps(cls):
    """Whether an optimizer can take a step on a dense matrix."""
    model = Line()
    try:
        wrapper = build_optim_wrapper(
            model, dict(optimizer=dict(type=cls.__name__, lr=0.1))
        )
        wrapper.update_params(model(torch.ones(2, 3))['loss'])
    except Exception:
        return False
    return True


OPTIMIZERS_THAT_STEP = [
    name
    for name, cls in sorted(OPTIMIZERS.module_dict.items())
    if isinstance(cls, type) and steps(cls)
]


@pytest.mark.parametrize('name', OPTIMIZERS_THAT_STEP)
def test_every_optimizer(name, tmp_path):
    optimizer = dict(type=name, lr=0.1)
    train(tmp_path, optimizer=optimizer)
    path = str(tmp_path / 'epoch_1.pth')
    assert load_checkpoint_file(path)['optimizer']['param_groups']
    train(tmp_path, 2, optimizer=optimizer, resume=True, load_from=path)


def test_there_are_optimizers():
    assert {'SGD', 'AdamW', 'RMSprop'} <= set(OPTIMIZERS_THAT_STEP)


def test_hooks_with_a_state(tmp_path):
    hooks = [
        dict(type='EMAHook'),
        dict(type='EpochSeedHook'),
        dict(type='MeanLossHook'),
    ]
    train(tmp_path, hooks=hooks)
    path = str(tmp_path / 'epoch_1.pth')
    assert 'ema_state_dict' in load_checkpoint_file(path)
    train(tmp_path, 2, hooks=hooks, resume=True, load_from=path)


class Score(BaseMetric):
    """A metric that improves after each evaluation."""

    values, default_prefix = 0, None

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Score.values += 1
        return dict(score=Score.values)


def evaluation():
    """Settings of a runner that evaluates after each epoch or interval."""
    loader = dict(
        batch_size=2,
        dataset=Numbers(),
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    return dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=[Score()])


def test_hooks_that_use_metrics(tmp_path):
    hooks = [dict(type='EarlyStoppingHook', monitor='score', rule='greater')]
    more = dict(
        hooks=hooks,
        checkpoint=dict(save_best='score', rule='greater'),
        param_scheduler=dict(
            type='ReduceOnPlateauLR', monitor='score', rule='greater'
        ),
    )
    train(tmp_path, 2, **more, **evaluation())
    path = str(tmp_path / 'epoch_2.pth')
    info = load_checkpoint_file(path)['message_hub']['runtime_info']
    assert info['best_ckpt'].endswith('best_score_epoch_2.pth')
    train(tmp_path, 3, resume=True, load_from=path, **more, **evaluation())
    assert (tmp_path / 'epoch_3.pth').exists()


def test_state_of_a_loss_scaler(tmp_path):
    state = torch.amp.GradScaler('cpu').state_dict()
    assert state['scale'] > 1
    torch.save(dict(loss_scaler=state), tmp_path / 'scaler.pth')
    loaded = load_checkpoint_file(str(tmp_path / 'scaler.pth'))
    assert loaded == dict(loss_scaler=state)


METADATA = dict(
    numpy_strings=[np.str_('cat'), np.str_('dög')],
    array_of_strings=np.array(['cat', 'mouse']),
    config=ConfigDict(a=ConfigDict(b=[1, ConfigDict(c=2)])),
    path=pathlib.Path('/data/cats'),
    numbers=np.arange(3.0),
    number=np.float32(0.5),
    tuple=(1, 'a', None),
    set={1, 2},
    range=range(3),
)


def test_metadata(tmp_path):
    train(tmp_path, metainfo=METADATA)
    path = str(tmp_path / 'epoch_1.pth')
    meta = load_checkpoint_file(path)['meta']['dataset_meta']
    assert meta['numpy_strings'] == ['cat', 'dög']
    assert meta['array_of_strings'] == ['cat', 'mouse']
    assert meta['config'] == dict(a=dict(b=[1, dict(c=2)]))
    assert type(meta['config']['a']) is dict
    assert meta['path'] == '/data/cats'
    assert meta['numbers'].tolist() == [0, 1, 2] and meta['number'] == 0.5
    assert meta['tuple'] == (1, 'a', None) and meta['set'] == {1, 2}
    train(tmp_path, 2, metainfo=METADATA, resume=True, load_from=path)


@pytest.mark.parametrize(
    'value,expected',
    [
        (np.str_('cat'), 'cat'),
        (np.bytes_(b'cat'), b'cat'),
        (ConfigDict(a=dict(b=1)), dict(a=dict(b=1))),
        (pathlib.PurePosixPath('/a/b'), '/a/b'),
        (frozenset([1]), frozenset([1])),
        (np.array('x').astype('>U1')[()], 'x'),
    ],
)
def test_files_of_stock_hooks_can_be_read(value, expected, tmp_path):
    """mmengine's own CheckpointHook stores metadata as it is."""
    path = str(tmp_path / 'stock.pth')
    torch.save(dict(state_dict={}, meta=dict(value=value)), path)
    found = load_checkpoint_file(path)['meta']['value']
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize('name', ['PosixPath', 'PurePosixPath'])
@pytest.mark.parametrize('module', ['pathlib', 'pathlib._local'])
def test_paths_of_every_python(module, name, tmp_path, monkeypatch):
    """Python 3.13 stores the names of another module than the others."""

    class Path:
        def __reduce__(self):
            return make, ('/', 'a', 'b')

    def make(*parts):
        raise AssertionError

    make.__module__, make.__qualname__ = module, name
    fake = types.ModuleType(module)
    setattr(fake, name, make)
    path = str(tmp_path / 'stock.pth')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, fake)
        torch.save(dict(state_dict={}, meta=dict(value=Path())), path)
    stored = pathlib.Path(path).read_bytes()
    assert f'c{module}\n{name}\n'.encode() in stored
    assert load_checkpoint_file(path)['meta']['value'] == '/a/b'


class Exotic:
    """An object that no reader of checkpoints knows."""


@pytest.mark.parametrize(
    'metainfo,where',
    [
        (dict(colours=[1, Exotic()]), 'meta.dataset_meta.colours[1]'),
        (dict(a=dict(b=slice(3))), 'meta.dataset_meta.a.b'),
    ],
)
def test_what_could_not_be_read_is_said_first(metainfo, where, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, metainfo=metainfo)
    message = str(caught.value)
    assert message.startswith(f'{where} is a ') and '\n' not in message
    assert 'numbers, strings, tensors, lists and dicts' in message
    assert not list(tmp_path.glob('*.pth'))


# -- nothing is lost ----------------------------------------------------------


def names(folder):
    return sorted(p.name for p in folder.glob('*.pth'))


def test_keeps_as_many_as_mmengine(tmp_path):
    train(tmp_path, 4, checkpoint=dict(max_keep_ckpts=2))
    assert names(tmp_path) == ['epoch_3.pth', 'epoch_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_4.pth')
    assert not list(tmp_path.glob('.writing-*'))


def test_old_one_is_removed_after_the_new_one_is_written(
    tmp_path, monkeypatch
):
    seen = []
    rename = os.replace

    def replace(source, target):
        seen.append(names(tmp_path))
        rename(source, target)

    monkeypatch.setattr(fileio.os, 'replace', replace)
    train(tmp_path, 3, checkpoint=dict(max_keep_ckpts=1))
    assert seen == [[], ['epoch_1.pth'], ['epoch_2.pth']]
    assert names(tmp_path) == ['epoch_3.pth']


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('interval', [1, 2])
def test_there_is_always_a_checkpoint(
    by_epoch, interval, tmp_path, monkeypatch
):
    """Also while the best checkpoint is replaced, and saved a second time."""
    rename, found = os.replace, []

    def replace(source, target):
        found.append(find_resumable([str(tmp_path)])[0])
        rename(source, target)
        found.append(find_resumable([str(tmp_path)])[0])

    monkeypatch.setattr(fileio.os, 'replace', replace)
    loop = dict(by_epoch=True, max_epochs=4)
    if not by_epoch:
        loop = dict(by_epoch=False, max_iters=8, val_interval=2)
    train(
        tmp_path,
        train_cfg=loop,
        checkpoint=dict(
            max_keep_ckpts=1,
            save_best='score',
            rule='greater',
            by_epoch=by_epoch,
            interval=interval,
        ),
        **evaluation(),
    )
    first = next(i for i, path in enumerate(found) if path)
    assert first <= 4 and all(found[first:])
    last = ('epoch_4.pth', 'iter_8.pth')[not by_epoch]
    assert names(tmp_path) == sorted([last, f'best_score_{last}'])


def full_disk(monkeypatch, after):
    """Let the disk be full after some writes."""
    flush = os.fsync
    count = []

    def fsync(handle):
        count.append(handle)
        if len(count) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(fileio.os, 'fsync', fsync)


def test_full_disk(tmp_path, monkeypatch):
    full_disk(monkeypatch, after=2)  # a file and its folder
    with pytest.raises(WriteError) as caught:
        train(tmp_path, 3, checkpoint=dict(max_keep_ckpts=1))
    path = tmp_path / 'epoch_2.pth'
    assert re.fullmatch(
        rf'cannot write {path}: No space left on device; [\d,]+ bytes are '
        r'needed and [\d,]+ are free',
        str(caught.value),
    )
    assert names(tmp_path) == ['epoch_1.pth']
    assert not list(tmp_path.glob('.writing-*'))
    monkeypatch.undo()
    found, passed = find_resumable([str(tmp_path)])
    assert found == str(tmp_path / 'epoch_1.pth') and passed == []


def test_full_file_system(tmp_path):
    """The same on a real file system of 200 KB, where one can be mounted."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('cannot mount a file system')
    try:
        (disk / 'ballast').write_bytes(bytes(150_000))
        backend = get_file_backend(backend_args=dict(backend='mmvvt.atomic'))
        backend.put(bytes(20_000), disk / 'epoch_1.pth')
        with pytest.raises(WriteError, match='No space left'):
            backend.put(bytes(60_000), disk / 'epoch_2.pth')
        assert sorted(os.listdir(disk)) == ['ballast', 'epoch_1.pth']
        assert (disk / 'epoch_1.pth').stat().st_size == 20_000
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / '.writing-abc').write_bytes(b'half a file')
    train(tmp_path)
    assert not list(tmp_path.glob('.writing-*'))


def test_other_file_backends_are_left_alone(tmp_path):
    class Stored(LocalBackend):
        pass

    register_backend('mmvvt_test_stored', Stored, force=True)
    runner = train(
        tmp_path,
        checkpoint=dict(backend_args=dict(backend='mmvvt_test_stored')),
    )
    (hook,) = [h for h in runner.hooks if isinstance(h, SafeCheckpointHook)]
    assert type(hook.file_backend) is Stored
    assert names(tmp_path) == ['epoch_1.pth']


# -- resuming -----------------------------------------------------------------


def test_newest_that_loads(tmp_path):
    train(tmp_path, 3)
    whole = (tmp_path / 'epoch_3.pth').read_bytes()
    (tmp_path / 'epoch_3.pth').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'epoch_10.pth').write_bytes(b'')
    best = load_checkpoint_file(str(tmp_path / 'epoch_1.pth'))
    del best['optimizer']
    torch.save(best, tmp_path / 'best_accuracy_epoch_99.pth')
    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_3.pth')
    path, passed = find_resumable([str(tmp_path)])
    assert path == str(tmp_path / 'epoch_2.pth')
    assert len(passed) == 2
    for error, name in zip(passed, ('epoch_3.pth', 'epoch_10.pth')):
        assert str(tmp_path / name) in str(error) and '\n' not in str(error)


def test_longer_run_before_in_the_same_folder(tmp_path):
    train(tmp_path, 3)
    for path in tmp_path.glob('*.pth'):
        os.utime(path, (1, 1))
    train(tmp_path, 1)
    path, passed = find_resumable([str(tmp_path)])
    assert path == str(tmp_path / 'epoch_1.pth')
    assert [str(error).split(' is older')[0] for error in passed] == [
        str(tmp_path / 'epoch_3.pth'),
        str(tmp_path / 'epoch_2.pth'),
    ]


def test_killed_before_last_checkpoint_was_written(tmp_path):
    train(tmp_path, 2)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    path, passed = find_resumable([str(tmp_path)])
    assert path == str(tmp_path / 'epoch_2.pth') and passed == []


@pytest.mark.parametrize('content', [b'', b'\xff\x00', None, b'/gone/x.pth'])
def test_unusable_last_checkpoint(content, tmp_path):
    train(tmp_path, 2)
    if content is None:
        (tmp_path / 'last_checkpoint').unlink()
    else:
        (tmp_path / 'last_checkpoint').write_bytes(content)
    path, passed = find_resumable([str(tmp_path)])
    assert path == str(tmp_path / 'epoch_2.pth')
    assert all('no such checkpoint file' in str(error) for error in passed)


def test_moved_folder_and_other_names(tmp_path):
    """A file with any suffix is found if last_checkpoint names it."""
    train(
        tmp_path / 'before', 2, checkpoint=dict(filename_tmpl='state_{}.ckpt')
    )
    (tmp_path / 'before').rename(tmp_path / 'after')
    path, passed = find_resumable([str(tmp_path / 'after')])
    assert path == str(tmp_path / 'after' / 'state_2.ckpt') and passed == []


def test_newest_of_two_kinds_of_names(tmp_path):
    train(tmp_path, 2)
    state = load_checkpoint_file(str(tmp_path / 'epoch_2.pth'))
    state['meta']['iter'] = 1
    torch.save(state, tmp_path / 'iter_900.pth')
    path, passed = find_resumable([str(tmp_path)])
    assert path == str(tmp_path / 'epoch_2.pth') and passed == []


def test_nothing_to_resume(tmp_path):
    assert find_resumable([str(tmp_path), '/none']) == (None, [])
