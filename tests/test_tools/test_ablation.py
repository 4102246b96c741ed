"""Tests of ablation grids: ``tools/analysis_tools/ablation.py``."""

import itertools
import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mmengine.config import Config

from mmvvt.analysis.ablation import (
    Result,
    check_variants,
    digest,
    last_value,
    read_grid,
    read_results,
    summarize,
    to_markdown,
    write_results,
)
from mmvvt.apis import ablation
from mmvvt.apis.ablation import prepare_variants, run_grid
from mmvvt.errors import UserError

from conftest import ROOT, run_tool

TOOL = 'tools/analysis_tools/ablation.py'
CONFIGS = ROOT / 'configs' / 'ablation'
RESULTS = ROOT / 'benchmarks' / 'ablation'
SMALL = {
    'model.backbone.arch': dict(
        _delete_=True,
        embed_dims=[8, 8, 8, 8],
        num_heads=[1, 1, 1, 1],
        mlp_ratios=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
    ),
    'model.head.in_channels': 8,
}


def content(root='data/digits', **options):
    common = {
        **SMALL,
        'train_dataloader.dataset.data_root': str(root),
        'val_dataloader.dataset.data_root': str(root),
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 256,
    }
    softmax = {'model.backbone.attn_cfg.attention': 'softmax'}
    return {
        'config': 'vvt-nano_digits',
        'metric': 'accuracy/top1',
        'input_shape': [3, 32, 32],
        'seeds': [3, 5],
        'variants': {'vvt': common, 'softmax': {**common, **softmax}},
        **options,
    }


def write(folder, **options):
    path = folder / 'small.yml'
    path.write_text(yaml.safe_dump(content(**options), sort_keys=False))
    return str(path)


def result(variant='vvt', seed=0, value=80.0, config='abc', **options):
    settings = dict(
        variant=variant,
        seed=seed,
        metric='accuracy/top1',
        value=value,
        seconds=12.0,
        parameters=1000000,
        multiply_adds=2500000,
        config=config,
        machine='a machine, 2 threads',
    )
    return Result(**{**settings, **options})


# -- the real runner ----------------------------------------------------------


def test_grid_is_trained_and_resumed(digits_root, tmp_path):
    """Two variants are trained; the second call has nothing to do."""
    grid = write(tmp_path, root=digits_root, seeds=[3])
    options = ['--csv', 'results/out.csv', '--jobs', '2', '--plot', 'out.png']
    done = run_tool(ROOT / TOOL, grid, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert '2 runs: 0 finished before, 2 to do' in done.stdout
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')
    results = read_results(str(tmp_path / 'results/out.csv'))
    assert {(r.variant, r.seed) for r in results} == {
        ('vvt', 3),
        ('softmax', 3),
    }
    assert all(0 <= r.value <= 100 and r.seconds > 0 for r in results)
    for r in results:
        assert f'| {r.variant} |' in done.stdout
        assert f'{r.value:.2f}' in done.stdout
    # The runs used the settings of their variants and the seed.
    folders = list((tmp_path / 'work_dirs/ablation/small').glob('*/*-seed3'))
    assert len(folders) == 2
    for folder in folders:
        cfg = Config.fromfile(folder / ablation.CONFIG_FILE)
        attention = cfg.model.backbone.get('attn_cfg', {}).get('attention')
        assert (attention == 'softmax') == (folder.parent.name == 'softmax')
        assert cfg.randomness.seed == 3
        assert (folder / 'epoch_1.pth').is_file()

    again = run_tool(ROOT / TOOL, grid, *options, cwd=tmp_path)
    assert again.returncode == 0, again.stdout
    assert '2 runs: 2 finished before, 0 to do' in again.stdout
    assert '[1/' not in again.stdout

    # One that was killed in its last validation has the metric of an earlier
    # epoch only; its last checkpoint is validated.
    write_results(str(tmp_path / 'results/out.csv'), results[:1])
    (folder,) = tmp_path.glob(
        f'work_dirs/ablation/small/{results[1].variant}/*-seed3'
    )
    (log,) = folder.glob('*/vis_data/scalars.json')
    log.write_text('{"accuracy/top1": 1.5, "step": 0}\n{"loss": 1}\n')
    again = run_tool(ROOT / TOOL, grid, *options, cwd=tmp_path)
    assert again.returncode == 0, again.stdout
    assert '2 runs: 1 finished before, 1 to do' in again.stdout
    restored = read_results(str(tmp_path / 'results/out.csv'))
    assert [r.value for r in restored] == [r.value for r in results]
    assert restored[1].seconds > results[1].seconds


def test_cost_and_report(tmp_path):
    path = write(tmp_path)
    done = run_tool(ROOT / TOOL, path, '--cost', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    lines = [x for x in done.stdout.splitlines() if 'mmengine' not in x]
    assert [x.split()[0] for x in lines] == ['variant', 'vvt', 'softmax']
    assert not (tmp_path / 'work_dirs').exists()

    def report(*options):
        done = run_tool(ROOT / TOOL, path, '--report', *options, cwd=tmp_path)
        return done.returncode, [
            line
            for line in done.stdout.splitlines()
            if 'mmengine' not in line and '---' not in line
        ]

    csv = 'work_dirs/ablation/small.csv'
    assert report() == (
        1,
        [f'error: no results of these variants, seeds and settings in {csv}'],
    )
    # In the order of the grid; not those of other variants, configs, metrics
    grid = read_grid(path)
    vvt, softmax = prepare_variants(grid)
    rows = [
        result('softmax', seed=3, value=50.0, config=softmax.digest),
        result('old', seed=3),
        result('vvt', seed=3, config=vvt.digest),
        result('vvt', seed=5, value=82.0, config=vvt.digest),
        result('softmax', seed=5, value=99.0),
        result('vvt', seed=7, config=vvt.digest),
        result('vvt', seed=3, config=vvt.digest, metric='mAP'),
    ]
    write_results(str(tmp_path / csv), rows)
    code, lines = report('--plot', 'new/a.png')
    assert code == 0
    found = [[cell.strip() for cell in line.split('|')] for line in lines[1:]]
    assert [(row[1], *row[4:7]) for row in found[:2]] == [
        ('vvt', '81.00', '1.4', '2'),
        ('softmax', '50.00', 'N/A', '1'),
    ]
    # The cost is that of the grid's input shape.
    adds = vvt.complexity.multiply_adds
    assert found[0][3] == f'{adds / 1e6:.2f}'
    assert lines[-1] == 'new/a.png: 3 runs'
    code, lines = report('--variants', 'vvt', '--seeds', '5')
    assert code == 0 and len(lines) == 2 and '| 82.00 | N/A | 1 |' in lines[1]


# -- which runs, and what becomes of them -------------------------------------


class FakeTraining:
    """Replaces the process that trains; it logs a value, or fails."""

    attempts = itertools.count()

    def __init__(self, values=None, fail=()):
        self.values, self.fail = values or {}, fail
        self.runs = []

    def __call__(self, command, stdout, env, **options):
        folder = Path(command[command.index('--work-dir') + 1])
        seed = int(folder.name.split('seed')[1])
        key = (folder.parent.name, seed)
        self.runs.append(key)
        if key in self.fail:
            stdout.write(b'first line\nerror: the disk is on fire\n')
            return subprocess.CompletedProcess(command, 1)
        attempt = f'20260101_{next(self.attempts):06d}'
        scalars = folder / attempt / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True, exist_ok=True)
        line = {'accuracy/top1': self.values.get(key, 50.0), 'step': 1}
        scalars.write_text(json.dumps(line) + '\n')
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A grid with its variants, and a function that runs it."""
    grid = read_grid(write(tmp_path))
    variants = prepare_variants(grid)
    lines = []

    def run(fake, **options):
        processes = SimpleNamespace(run=fake, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(ablation, 'subprocess', processes)
        lines.clear()
        return run_grid(
            grid,
            options.pop('variants', variants),
            str(tmp_path / 'out.csv'),
            str(tmp_path / 'runs'),
            report=lines.append,
            **options,
        )

    run.variants, run.lines, run.csv = variants, lines, tmp_path / 'out.csv'
    return run


def test_the_first_seed_of_all_variants_runs_first(study):
    fake = FakeTraining({('vvt', 5): 60.0})
    results = study(fake)
    assert fake.runs == [
        ('vvt', 3),
        ('softmax', 3),
        ('vvt', 5),
        ('softmax', 5),
    ]
    assert [(r.variant, r.seed, r.value) for r in results] == [
        ('vvt', 3, 50.0),
        ('vvt', 5, 60.0),
        ('softmax', 3, 50.0),
        ('softmax', 5, 50.0),
    ]
    assert study.lines[1].startswith('[1/4] vvt, seed 3: accuracy/top1 50.00')
    # The main variant has the cost of its own model.
    assert results[0].parameters == study.variants[0].complexity.parameters
    assert results[0].multiply_adds != results[-1].multiply_adds


def test_finished_runs_are_skipped(study):
    study(FakeTraining(), seeds=[3])
    fake = FakeTraining()
    assert len(study(fake)) == 4
    assert fake.runs == [('vvt', 5), ('softmax', 5)]
    assert len(read_results(str(study.csv))) == 4


def test_results_of_another_config_are_replaced(study):
    study(FakeTraining())
    rows = read_results(str(study.csv))
    rows[0].config = 'of another'
    write_results(str(study.csv), rows)
    fake = FakeTraining({('vvt', 3): 70.0})
    results = study(fake)
    assert fake.runs == [('vvt', 3)]
    assert [r.value for r in results] == [70.0, 50.0, 50.0, 50.0]
    assert len(read_results(str(study.csv))) == 4


def test_results_of_another_metric_are_replaced(study):
    study(FakeTraining())
    rows = read_results(str(study.csv))
    rows[0].metric = 'accuracy/top5'
    write_results(str(study.csv), rows)
    fake = FakeTraining()
    assert [r.metric for r in study(fake)] == ['accuracy/top1'] * 4
    assert fake.runs == [('vvt', 3)]


def test_two_processes_share_a_grid(study, tmp_path):
    """Results of another process are kept, and its runs not repeated."""
    other = result('other', seed=9)

    def train(command, **options):
        write_results(str(study.csv), [*read_results(str(study.csv)), other])
        return FakeTraining()(command, **options)

    study(train, seeds=[3, 3], variants=study.variants[:1])
    rows = read_results(str(study.csv))
    assert [(r.variant, r.seed) for r in rows] == [('other', 9), ('vvt', 3)]
    # A run that another process is training
    name = f'{study.variants[1].digest}-seed3'
    folder = tmp_path / 'runs' / 'softmax' / name
    with ablation._locked(folder / ablation.LOCK_FILE, wait=False):
        with pytest.raises(UserError, match='another process is training in'):
            study(FakeTraining(), seeds=[3])


def test_a_run_that_another_command_finishes(study):
    """It is not trained again, and its row in the file not replaced."""
    row = result('softmax', seed=3, config=study.variants[1].digest)
    fake = FakeTraining()

    def train(command, **options):
        write_results(str(study.csv), [row])
        return fake(command, **options)

    results = study(train, seeds=[3])
    assert fake.runs == [('vvt', 3)]
    assert study.lines[-1].startswith(
        '[2/2] softmax, seed 3: finished by another command'
    )
    assert results[1].seconds == row.seconds
    assert results[1].machine == row.machine


def test_a_child_keeps_the_lock(tmp_path):
    """A process that was started goes on if the command is killed."""
    path = tmp_path / 'lock'
    with ablation._locked(path, wait=False) as lock:
        child = subprocess.Popen(['sleep', '60'], pass_fds=lock)
    try:
        with pytest.raises(UserError, match='another process is training'):
            with ablation._locked(path, wait=False):
                pass
    finally:
        child.kill()
        child.wait()
    with ablation._locked(path, wait=False):
        pass


def test_the_folder_is_checked_before_training(study, tmp_path):
    (tmp_path / 'runs').write_text('a file')
    fake = FakeTraining()
    with pytest.raises(UserError, match='runs'):
        study(fake)
    assert not fake.runs


def test_the_file_is_checked_before_training(study):
    study.csv.mkdir()
    fake = FakeTraining()
    with pytest.raises(UserError, match='it is a folder'):
        study(fake)
    assert not fake.runs


def test_damaged_file_of_seconds(study, tmp_path):
    folder = tmp_path / 'runs' / 'vvt' / f'{study.variants[0].digest}-seed3'
    folder.mkdir(parents=True)
    (folder / ablation.SECONDS_FILE).write_text('')
    study(FakeTraining(), seeds=[3])


def test_a_failed_run_does_not_stop_the_others(study):
    fake = FakeTraining(fail={('vvt', 3)})
    with pytest.raises(UserError) as caught:
        study(fake)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        'vvt, seed 3: mmvvt train exited with code 1: error: the disk is on '
        'fire'
    )
    assert len(fake.runs) == 4
    assert len(read_results(str(study.csv))) == 3
    fake = FakeTraining()
    study(fake)
    assert fake.runs == [('vvt', 3)]


@pytest.mark.parametrize(
    'value,message',
    [
        (math.nan, 'is nan'),
        (None, 'no accuracy/top1 was logged, only accuracy/top1, step$'),
    ],
)
def test_no_number(study, value, message):
    fake = FakeTraining({('vvt', 3): value})
    with pytest.raises(UserError, match=message):
        study(fake)
    assert len(read_results(str(study.csv))) == 3


def test_time_of_interrupted_runs_is_added(study, monkeypatch):
    clock = iter(range(0, 10000, 100))  # each reading is 100 s later
    fake_time = SimpleNamespace(time=lambda: next(clock))
    monkeypatch.setattr(ablation, 'time', fake_time)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    options = dict(seeds=[3], variants=study.variants[:1])
    with pytest.raises(KeyboardInterrupt):
        study(interrupt, **options)
    assert not study.csv.exists()
    (found,) = study(FakeTraining(), **options)
    assert found.seconds == 200


def test_time_of_killed_runs_is_added(study, tmp_path):
    """It lasted from its start to its last line, also without the command."""
    folder = tmp_path / 'runs' / 'vvt' / f'{study.variants[0].digest}-seed3'
    folder.mkdir(parents=True)
    (folder / ablation.SECONDS_FILE).write_text('40.0 1000000.0\n')
    (folder / ablation.LOG_FILE).write_text('a line\n')
    os.utime(folder / ablation.LOG_FILE, (1000300.0, 1000300.0))
    options = dict(seeds=[3], variants=study.variants[:1])
    (found,) = study(FakeTraining(), **options)
    assert 340 <= found.seconds < 350
    assert len((folder / ablation.SECONDS_FILE).read_text().split()) == 1


def test_threads_are_shared(study, monkeypatch):
    monkeypatch.setattr(ablation, '_num_processors', lambda: 6)
    seen = []

    def train(command, env, **options):
        seen.append(env.get('OMP_NUM_THREADS'))
        return FakeTraining()(command, env=env, **options)

    (found, _) = study(train, seeds=[3], jobs=3)
    assert seen == ['2', '2']
    assert ', 2 threads, ' in found.machine
    with pytest.raises(UserError, match='jobs must be at least 1, got 0'):
        study(train, jobs=0)


# -- files --------------------------------------------------------------------


def test_last_value(tmp_path):
    """The newest log counts; lines that were not completed are skipped."""
    logs = [tmp_path / 'a.json', tmp_path / 'b.json']
    for log, lines in zip(
        logs,
        (
            '{"mIoU": 10.0}\n{"loss": 1}\n{"mIoU": 20.0}\n',
            '{"loss": 1}\n{"mIoU": 30.0}\n{"mIoU": 4',
        ),
    ):
        log.write_text(lines)
    assert last_value(logs, 'mIoU') == 30.0
    with pytest.raises(UserError, match='only loss, mIoU$'):
        last_value(logs, 'mAcc')
    # A run that had nothing to do
    logs[0].write_text('')
    assert last_value(logs[:1], 'mIoU') is last_value([], 'mIoU') is None


def test_digest_ignores_seed_and_folder():
    cfg = Config(dict(model=dict(depth=3), work_dir='a', randomness={}))
    same = Config(
        dict(work_dir='b', randomness=dict(seed=4), model=dict(depth=3))
    )
    other = Config(dict(model=dict(depth=4)))
    assert digest(cfg) == digest(same) != digest(other)


def test_table():
    rows = [
        result(value=80.0),
        result('softmax', value=70.0),
        result(seed=1, value=82.0),
    ]
    vvt, softmax = summarize(rows)
    assert (vvt.mean, vvt.std) == (81.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(softmax.std)
    assert to_markdown([vvt, softmax], 'top-1').splitlines() == [
        '| variant | params (M) | MMACs | top-1 | std | runs |',
        '|---|---|---|---|---|---|',
        '| vvt | 1.000 | 2.50 | 81.00 | 1.4 | 2 |',
        '| softmax | 1.000 | 2.50 | 70.00 | N/A | 1 |',
    ]


def test_results_are_read_as_written(tmp_path):
    path = str(tmp_path / 'new' / 'out.csv')
    assert read_results(path) == []
    rows = [result(), result('a, "b"', 7, 0.314493)]
    write_results(path, rows)
    assert read_results(path) == rows


@pytest.mark.parametrize(
    'text,message',
    [
        ('model,mode\na,b\n', 'its columns must be variant, seed, metric'),
        (b'\xff\xfe', 'cannot read'),
        (None, 'cannot read'),
    ],
)
def test_other_csv_files(text, message, tmp_path):
    path = tmp_path / 'out.csv'
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is None:
        write_results(str(path), [result()])
        path.write_text(path.read_text().replace(',0,', ',zero,', 1))
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(str(path))


@pytest.mark.parametrize(
    'text,message',
    [
        (None, 'no such grid file'),
        ('a: [', 'is not valid YAML'),
        ('3', 'must have the keys config, metric'),
        (dict(extra=1), 'must have the keys config, metric'),
        (dict(config=3), 'config must be a string, got 3'),
        (dict(input_shape=32), 'input_shape must be [channels, height,'),
        (dict(input_shape=[3, 0, 9]), 'input_shape must be [channels,'),
        (dict(seeds=[]), 'seeds must be a list of different integers'),
        (dict(seeds=[1, 1]), 'seeds must be a list of different integers'),
        (dict(seeds=['a']), 'seeds must be a list of different integers'),
        (dict(variants={}), 'variants must map names to settings'),
        (dict(variants=dict(a=None)), 'the settings of a must map dotted'),
        (dict(variants=dict(a={1: 2})), 'the settings of a must map dotted'),
        ('a: 1\nb: 2\na: 3\n', 'is not valid YAML: the key a is repeated'),
        ('a: {b: {c: 1, c: 1}}', 'is not valid YAML: the key c is repeated'),
        (dict(variants={1: {}}), 'the name of a variant must be text of'),
        (dict(variants={'../a': {}}), "and not begin with a dot, got '../a'"),
        (dict(variants={'..': {}}), "and not begin with a dot, got '..'"),
    ],
)
def test_bad_grid(text, message, tmp_path):
    path = tmp_path / 'small.yml'
    if isinstance(text, dict):
        write(tmp_path, **text)
    elif text is not None:
        path.write_text(text)
    done = run_tool(ROOT / TOOL, path, '--cost', cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith('error: ') and message in line


def test_values_of_a_grid(tmp_path):
    """Numbers and anchors as PyTorch's users write them."""
    path = tmp_path / 'small.yml'
    head = yaml.safe_dump(content(variants=dict(a={})), sort_keys=False)
    path.write_text(
        head.removesuffix('variants:\n  a: {}\n')
        + 'variants:\n'
        + '  a: &base {lr: 1e-3, decay: 5.E+2, wide: 1.5e3, name: e5}\n'
        + '  b+c_1.0: {<<: *base, lr: 2e-3}\n'
    )
    assert read_grid(str(path)).variants == {
        'a': dict(lr=1e-3, decay=500.0, wide=1500.0, name='e5'),
        'b+c_1.0': dict(lr=2e-3, decay=500.0, wide=1500.0, name='e5'),
    }


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(config='vvt-nano_digit'), 'similar names: vvt-nano_digits'),
        (
            dict(variants=dict(a={'model.backbone.attn_cfg.locality': 'x'})),
            'variant a: locality must be one of',
        ),
        (
            dict(variants=dict(a={'model.backbone.attn_cfg.size': 3})),
            "with attention='vicinity', attn_cfg allows the keys locality",
        ),
        (
            dict(variants=dict(a={'model.head.in_channels': 8})),
            'or not process an image of shape (3, 32, 32): mat1 and mat2',
        ),
        (
            dict(variants=dict(a={'model.backbone.type.x': 3})),
            'variant a: model.backbone.type.x cannot be set in',
        ),
        (
            dict(variants=dict(a={'param_scheduler.7.end': 3})),
            'variant a: param_scheduler.7.end cannot be set in',
        ),
        (
            dict(variants=dict(a={'optim_wraper.optimizer.lr': 3})),
            'vvt-nano_digits has no setting optim_wraper.optimizer.lr',
        ),
    ],
)
def test_bad_variant(options, message, tmp_path):
    grid = read_grid(write(tmp_path, **options))
    with pytest.raises(UserError) as caught:
        prepare_variants(grid)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    'options,message',
    [
        (['--cost', '--plot', 'a.png'], '--plot draws results, which --cost'),
        (['--plot', 'a.svg'], '--plot must end with .png, got a.svg'),
    ],
)
def test_bad_plot(options, message, tmp_path):
    done = run_tool(ROOT / TOOL, write(tmp_path), *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith(f'error: {message}')
    assert not list(tmp_path.glob('a.*'))


def test_unknown_variant(tmp_path):
    grid = read_grid(write(tmp_path))
    with pytest.raises(UserError) as caught:
        prepare_variants(grid, ['vvt', 'b'])
    assert str(caught.value) == (
        'small has no variant b; its variants are vvt, softmax'
    )
    (variant,) = prepare_variants(grid, ['softmax'])
    assert variant.name == 'softmax'


# -- the grids of the project -------------------------------------------------


@pytest.mark.parametrize(
    'path',
    sorted(CONFIGS.glob('*.yml')),
    ids=lambda path: path.stem,
)
def test_grids_of_the_project(path):
    """Every variant is built, and is a different experiment."""
    grid = read_grid(str(path))
    assert len(grid.seeds) >= 3
    variants = prepare_variants(grid)
    assert len({v.digest for v in variants}) == len(variants)
    # Peers have the multiply-adds of the main variant.
    adds = {v.name: v.complexity.multiply_adds for v in variants}
    for peer in ('pvtv2', 'swin', 'resnet', 'convnext'):
        assert adds[peer] == pytest.approx(adds['vvt'], rel=0.05), peer
    # Published results are of the present configs.
    found = {v.name: v for v in variants}
    for row in read_results(str(RESULTS / f'{path.stem}.csv')):
        variant = found[row.variant]
        assert row.config == variant.digest
        assert row.metric == grid.metric and row.seed in grid.seeds
        assert row.parameters == variant.complexity.parameters
        assert row.multiply_adds == variant.complexity.multiply_adds


@pytest.mark.parametrize(
    'page,grid,names',
    [
        ('locality', 'fashion-mnist', 'vvt 1d no-locality softmax'),
        ('feature_reduction', 'fashion-mnist', 'vvt fr1 fr4 fr8'),
        ('peers', 'fashion-mnist', 'vvt pvtv2 swin resnet convnext'),
        ('locality', 'digit-scenes', 'vvt product 1d no-locality softmax'),
        ('feature_reduction', 'digit-scenes', 'vvt fr1 fr4 fr8'),
        ('peers', 'digit-scenes', 'vvt pvtv2 swin resnet convnext'),
    ],
)
def test_tables_of_the_pages(page, grid, names):
    """The tables are those that ``--report`` prints."""
    grid = read_grid(str(CONFIGS / f'{grid}.yml'))
    rows = read_results(str(RESULTS / f'{grid.name}.csv'))
    order = check_variants(grid, names.split())
    rows = [r for r in rows if r.variant in order]
    rows.sort(key=lambda r: (order.index(r.variant), r.seed))
    table = to_markdown(summarize(rows), grid.metric)
    assert len(rows) == len(order) * len(grid.seeds)
    text = (ROOT / 'docs' / 'evidence' / f'{page}.md').read_text()
    assert table in text
