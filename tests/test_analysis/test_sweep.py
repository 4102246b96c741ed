"""Tests of sweeps over image sizes: counts, limits, exponents and files."""

import dataclasses
import os
import re

import cv2
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmvvt.analysis import memory, sweep
from mmvvt.analysis.benchmark import PEERS, build, machine_line, write_csv
from mmvvt.analysis.complexity import count
from mmvvt.analysis.sweep import (
    MEASURED,
    NOT_MEASURED,
    OUT_OF_MEMORY,
    QUANTITIES,
    SweepRow,
    fit_exponent,
    fit_growth,
    growth_path,
    merge,
    read_known,
    read_sweep,
    sweep_sides,
)
from mmvvt.errors import UserError, WriteError
from mmvvt.fileio import check_writable
from mmvvt.visualization.sweep import plot_sweep

from conftest import ROOT, run_tool

TOOL = 'tools/analysis_tools/get_flops.py'
HIDDEN = dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
# These tests measure on the CPU.
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason='a sweep requires a machine without GPU'
)


def row(side, model='resnet-50', cost=None, **changes):
    """A row whose costs are those of a linear model, or ``cost``."""
    cost = side**2 if cost is None else cost
    values = dict(
        model=model,
        side=side,
        status=MEASURED,
        multiply_adds=int(cost),
        activations=7 * int(cost),
        peak_gib=0.5 + cost / 1e6,
        start_gib=0.5,
        runs=3,
        seconds=cost / 1e6,
        seconds_p20=cost / 2e6,
        seconds_p80=cost / 5e5,
        limit_gib=8.0,
        machine='a machine, 2 threads',
    )
    return SweepRow(**{**values, **changes})


# -- counts -------------------------------------------------------------------


class Small(nn.Module):
    """A convolution with stride 2, then a linear layer for each pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().permute(0, 2, 3, 1))


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_convolution_and_linear_layer_by_hand(device):
    found = count(Small().to(device), (2, 3, 10, 6))
    pixels = 2 * 5 * 3
    assert found.multiply_adds == pixels * (8 * 3 * 9 + 8 * 5)
    assert found.activations == pixels * (8 + 5)


class Attention(nn.Module):
    """Attention between pixels, as peers implement it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        if self.kind == 'mha':
            return self.mha(x, x, x, need_weights=False)[0]
        # (B, N, C) -> (B, heads, N, d)
        q, k = (
            f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.q, self.k)
        )
        if self.kind == 'sdpa':
            return F.scaled_dot_product_attention(q, k, k)
        if self.kind == 'einsum':
            weight = torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1)
            return torch.einsum('bhnm,bhmd->bhnd', weight, k)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ k


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('kind', ['matmul', 'einsum', 'sdpa', 'mha'])
def test_attention_is_counted(kind, device):
    """Fused kernels are counted as the products that define them."""
    n = 6 * 4
    found = count(Attention(kind).to(device), (1, 8, 6, 4))
    linears = 4 if kind == 'mha' else 2
    assert found.multiply_adds == linears * n * 8 * 8 + 2 * 2 * n * n * 4
    assert found.activations == linears * n * 8 + 2 * n * n + n * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize('name', ['vvt-tiny', *PEERS])
def test_meta_device_counts_the_same(name):
    side = 224 if name == 'swin-tiny' else 96
    model = build(name).cpu()
    expected = count(model, (1, 3, side, side))
    assert expected.multiply_adds > expected.activations > 1e5
    assert count(model.to('meta'), (1, 3, side, side)) == expected


# -- sides and exponents ------------------------------------------------------


def test_sides():
    assert sweep_sides(224, 4096) == [
        *(224, 320, 448, 640, 896, 1280, 1792, 2528, 3584, 4096)
    ]
    assert sweep_sides(32, 96) == [32, 64, 96]
    assert sweep_sides(64, 64) == [64]
    for bounds in ((32, 4064), (96, 1024), (224, 256)):
        sides = sweep_sides(*bounds)
        assert (sides[0], sides[-1]) == bounds
        assert sides == sorted(set(sides))
        assert all(side % 32 == 0 for side in sides)


@pytest.mark.parametrize(
    'bounds,message',
    [
        ((512, 224), 'must not be larger than the second, got 512 and 224'),
        ((16, 224), 'multiples of 32 from 32 on, got 16'),
        ((0, 224), 'multiples of 32 from 32 on, got 0'),
        ((-32, 224), 'multiples of 32 from 32 on, got -32'),
        ((224, 500), 'multiples of 32 from 32 on, got 500'),
    ],
)
def test_bad_bounds(bounds, message):
    with pytest.raises(UserError, match=message):
        sweep_sides(*bounds)


def test_exponent_of_a_power_law():
    pixels = [side**2 for side in (224, 320, 448, 640)]
    for power in (0.5, 1.0, 1.7, 2.0):
        costs = [3.5 * p**power for p in pixels]
        assert fit_exponent(pixels, costs) == pytest.approx(power, abs=1e-9)


def test_growth_uses_the_larger_half():
    """The smaller half is linear, and the larger half is quadratic."""
    sides = [32, 64, 128, 256, 512]
    rows = [row(side) for side in sides[:2]]
    rows += [row(side, cost=side**4 / 128**2) for side in sides[2:]]
    growth = {g.quantity: g for g in fit_growth(rows)}
    assert list(growth) == list(sweep.QUANTITIES)
    for g in growth.values():
        assert (g.sizes, g.first_side, g.last_side) == (3, 128, 512)
        assert g.exponent == pytest.approx(2, abs=1e-6)


def test_growth_of_a_model_out_of_memory():
    """Counts are fitted at all sizes, and measurements where they exist."""
    rows = [row(32), row(64), row(128), row(256, **NOT_MEASURED)]
    growth = {g.quantity: g for g in fit_growth(rows)}
    assert growth['multiply_adds'].last_side == 256
    assert growth['seconds'].first_side == 64
    assert growth['seconds'].last_side == 128
    assert growth['seconds'].exponent == pytest.approx(1)
    counted = fit_growth([row(32, **NOT_MEASURED)])
    assert [(g.quantity, g.exponent) for g in counted] == [
        ('multiply_adds', None),
        ('activations', None),
    ]


# -- files --------------------------------------------------------------------


def test_csv_round_trip(tmp_path):
    rows = [row(32), row(64, **NOT_MEASURED)]
    path = str(tmp_path / 'sweep.csv')
    write_csv(path, rows)
    assert read_sweep(path) == [
        dataclasses.replace(r, peak_gib=r.peak_gib and round(r.peak_gib, 4))
        for r in rows
    ]
    assert OUT_OF_MEMORY in (tmp_path / 'sweep.csv').read_text()
    assert growth_path(path) == str(tmp_path / 'sweep_exponents.csv')


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda text: 'a,b\n1,2\n', 'its columns must be model, side, status'),
        (lambda text: '', 'its columns must be'),
        (lambda text: text.replace(',64,', ',6x4,'), 'line 3: invalid lit'),
        (lambda text: text.replace('measured', 'fine'), "status 'fine'"),
        (lambda text: text[:-40], 'line 3'),
    ],
)
def test_damaged_csv(tmp_path, change, message):
    path = tmp_path / 'sweep.csv'
    write_csv(path, [row(32), row(64)])
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_sweep(str(path))


def test_rows_of_another_machine(tmp_path):
    path = str(tmp_path / 'sweep.csv')
    assert read_known(path) == []
    write_csv(path, [row(32, machine=machine_line())])
    assert len(read_known(path)) == 1
    write_csv(path, [row(32, machine=machine_line()), row(64)])
    with pytest.raises(UserError, match='another file'):
        read_known(path)


def test_merge():
    old = [row(64), row(32), row(32, 'swin-tiny')]
    new = [row(64, runs=9), row(32, 'vvt-small')]
    assert [(r.model, r.side, r.runs) for r in merge(old, new)] == [
        ('resnet-50', 32, 3),
        ('resnet-50', 64, 9),
        ('swin-tiny', 32, 3),
        ('vvt-small', 32, 3),
    ]


def test_writable(tmp_path):
    path = tmp_path / 'new' / 'sweep.csv'
    check_writable(str(path))
    assert list(path.parent.iterdir()) == []
    path.write_text('kept')
    check_writable(str(path))
    assert path.read_text() == 'kept'
    for bad in (tmp_path, path / 'below.csv', '/proc/sweep.csv'):
        with pytest.raises(WriteError, match=f'cannot write {bad}: '):
            check_writable(str(bad))


def test_plot(tmp_path):
    rows = [row(32), row(64), row(128, **NOT_MEASURED)]
    rows += [row(side, 'vvt-small', cost=side**3) for side in (32, 64, 128)]
    path = tmp_path / 'sweep.png'
    figure = plot_sweep(rows, fit_growth(rows), str(path))
    assert cv2.imread(str(path)).std() > 10
    legends = [
        [text.get_text() for text in axis.get_legend().get_texts()]
        for axis in figure.axes
    ]
    counted = ['resnet-50: 1.00', 'vvt-small: 1.50']
    measured = ['resnet-50: 1.00', 'resnet-50: out of memory']
    assert legends == [counted] * 2 + [[*measured, 'vvt-small: 1.50']] * 2
    (mark,) = (
        line
        for line in figure.axes[3].lines
        if line.get_label() == 'resnet-50: out of memory'
    )
    assert list(mark.get_xdata()) == [128]
    with pytest.raises(UserError, match='suffix .png or .svg, got a.txt'):
        plot_sweep(rows, [], 'a.txt')


# -- limits and processes -----------------------------------------------------


def test_memory_limit():
    """An allocation beyond the limit fails, and later ones succeed."""
    gib = memory.resident_gib()
    with pytest.raises(RuntimeError) as caught:
        with memory.memory_limit(gib + 0.25):
            torch.ones(1 << 27)  # 0.5 GiB
    assert memory.is_out_of_memory(caught.value)
    assert torch.ones(1 << 27).sum() == 1 << 27
    with memory.memory_limit(gib + 2):
        torch.ones(1 << 26)
    with pytest.raises(MemoryError, match='in use, limit 0.01 GiB'):
        with memory.memory_limit(0.01):
            raise AssertionError('the block must not run')
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError('std::bad_alloc'))
    assert not memory.is_out_of_memory(RuntimeError('shapes differ'))


def test_available_memory(tmp_path, monkeypatch):
    """The limit of a container is respected."""
    monkeypatch.setattr(memory, 'CONTROL_GROUPS', ())
    free = memory.available_gib()
    assert 0 < free < 1e5
    group = (str(tmp_path), 'max', 'current', 'inactive_file')
    monkeypatch.setattr(memory, 'CONTROL_GROUPS', [group])
    (tmp_path / 'memory.stat').write_text('anon 7\nfile 9\n')
    (tmp_path / 'current').write_text(f'{1 << 29}\n')
    (tmp_path / 'max').write_text('max\n')
    assert memory.available_gib() == pytest.approx(free, rel=0.2)
    (tmp_path / 'max').write_text(f'{(1 << 29) + (1 << 20)}\n')
    assert memory.available_gib() == pytest.approx(2**-10)
    # Cached files can be dropped.
    (tmp_path / 'memory.stat').write_text('anon 7\ninactive_file 1048576\n')
    assert memory.available_gib() == pytest.approx(2**-9)
    (tmp_path / 'memory.stat').write_text('anon 7\n')
    with pytest.raises(UserError, match='0.0 GiB of memory are available'):
        sweep.default_limit(1)
    monkeypatch.setattr(sweep, 'available_gib', lambda: 8.0)
    assert sweep.default_limit(1) == pytest.approx(0.9 * 8)
    assert sweep.default_limit(3) == pytest.approx(0.9 * (8 - 3))
    with pytest.raises(UserError, match='for a sweep of 6 models'):
        sweep.default_limit(6)


@without_gpu
def test_out_of_memory_and_resume():
    """A model above the limit has a row; the sweep measures the others."""
    limit = 0.01
    (rows,) = sweep.sweep(['vvt-tiny'], [64], runs=1, limit_gib=limit)
    (lost,) = rows
    assert lost.status == OUT_OF_MEMORY and lost.limit_gib == limit
    assert lost.multiply_adds > lost.activations > 0
    assert lost.seconds is None and lost.peak_gib is None and lost.runs == 0

    # Measured again only if the limit is higher.
    assert list(sweep.sweep(['vvt-tiny'], [64], 1, limit, rows)) == [rows]
    assert list(sweep.sweep(['vvt-tiny'], [64], 1, None, rows)) == [rows]
    (again,) = sweep.sweep(['vvt-tiny'], [64], 2, 8.0, rows)
    assert again[0].status == MEASURED and again[0].runs == 2
    assert again[0].multiply_adds == lost.multiply_adds
    assert 0.1 < again[0].start_gib and again[0].peak_gib < 2
    # The model did not run before: its pass has all of its memory.
    assert again[0].peak_gib > again[0].start_gib + 0.01
    assert 0 < again[0].seconds_p20 <= again[0].seconds
    # Rows that were measured are kept whatever the limit is.
    kept = [dataclasses.replace(again[0], seconds=123.0)]
    assert list(sweep.sweep(['vvt-tiny'], [64], 1, 9.0, kept)) == [kept]


@without_gpu
@pytest.mark.parametrize(
    'code,log,caught',
    [
        ('os.kill(os.getpid(), 9)', '', 'out of memory'),
        ("os.write(2, b'std::bad_alloc'); os.abort()", '', 'out of memory'),
        ("raise ValueError('no such thing')", 'no such thing', None),
    ],
)
def test_process_that_dies(code, log, caught, tmp_path, monkeypatch):
    """A killed process is out of memory; other faults are reported."""
    monkeypatch.setattr(sweep, '_serve', Dies(code))
    error = sweep._OutOfMemory if caught else RuntimeError
    with pytest.raises(error, match=caught or log):
        sweep._Worker('resnet-50', 32, 1.0, str(tmp_path))


class Dies:
    """Stands in for the function of a process."""

    def __init__(self, code):
        self.code = code

    def __call__(self, connection, name, side, threads, gib, log):
        with open(log, 'wb') as file:
            os.dup2(file.fileno(), 2)
        exec(self.code, dict(os=os))


def test_models_out_of_memory_while_timed():
    """The others are timed again without it."""

    class Fake:
        def __init__(self, name, passes):
            self.name, self.passes = name, passes

        def run(self):
            self.passes -= 1
            if self.passes < 0:
                raise sweep._OutOfMemory(self.name)

    workers = [Fake('a', 99), Fake('b', 1), Fake('c', 99)]
    assert list(sweep._time(workers, 3)) == ['a', 'c']
    assert sweep._time([Fake('a', 0)], 3) == {}


# -- command line -------------------------------------------------------------


def test_tool(tmp_path):
    path, picture = tmp_path / 'sweep.csv', tmp_path / 'sweep.svg'
    arguments = [TOOL, '--sweep', 64, 96, '--models', 'vvt-tiny', '--runs', 1]
    arguments += ['--out', path, '--plot', picture]
    done = run_tool(*arguments, env=HIDDEN)
    assert done.returncode == 0, done.stdout
    rows = read_sweep(str(path))
    assert [(r.model, r.side, r.status) for r in rows] == [
        ('vvt-tiny', side, MEASURED) for side in (64, 96)
    ]
    for size in ('64 x 64', '96 x 96'):
        assert size in done.stdout.splitlines()
    assert re.search(r'^vvt-tiny +1.00 \(64 to 96\)', done.stdout, re.M)
    header, *lines = (
        (tmp_path / 'sweep_exponents.csv').read_text().splitlines()
    )
    assert header.startswith('model,quantity,exponent,sizes,first_side')
    assert len(lines) == 4 and lines[0].startswith('vvt-tiny,multiply_adds,')
    assert '<svg' in picture.read_text()

    # Resume: rows in the file are kept, and others are added.
    before = path.read_text().splitlines()
    arguments[2:4] = [32, 96]
    done = run_tool(*arguments, '--memory-limit', '0.01', env=HIDDEN)
    assert done.returncode == 0, done.stdout
    after = path.read_text().splitlines()
    assert set(before) < set(after) and len(after) == len(before) + 1
    assert re.search(
        r'^vvt-tiny .* N/A out of memory \(0.01 GiB\)$', done.stdout, re.M
    )
    lost, *kept = read_sweep(str(path))
    assert (lost.side, lost.status, lost.seconds) == (32, OUT_OF_MEMORY, None)
    assert kept == rows


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['--sweep', 512, 224], 'must not be larger than the second'),
        (['--sweep', 16, 224], 'multiples of 32 from 32 on, got 16'),
        (
            ['--sweep', 64, 64, '--models', 'vvt-huge'],
            "swin-tiny, convnext-tiny, .* resnet-50, got 'vvt-huge'",
        ),
        (
            ['--sweep', 64, 64, '--models', 'swin-tiny'],
            'swin-tiny requires sides of 224 pixels or more, got 64',
        ),
        (['--sweep', 64, 64, '--runs', 0], 'must be 1 or more, got 0'),
        (['--sweep', 64, 64, '--memory-limit', 'nan'], 'GiB, got nan'),
        (['--sweep', 64, 64, '--memory-limit', '-1'], 'GiB, got -1.0'),
        (['--sweep', 64, 64, '--out', '/proc/a.csv'], 'cannot write /proc/a'),
        (['--sweep', 64, 64, '--out', 'a.txt'], 'suffix .csv, got a.txt'),
        (['--sweep', 64, 64, '--plot', 'a.txt'], 'or .svg, got a.txt'),
        (['--sweep', 64, 64, '--plot', '/proc/a.png'], 'cannot write /proc/a'),
        (['--sweep', 64, 64, '--shape', 64], 'nor --shape, got 64'),
        (['--models', 'vvt-small', '--', 'a.py'], '--models requires --sweep'),
    ],
)
def test_tool_refuses(arguments, message):
    done = run_tool(TOOL, *arguments)
    assert done.returncode == 1, done.stdout
    assert re.search(f'^error: .*{message}', done.stdout.splitlines()[-1])


@pytest.mark.parametrize('arguments', [[], ['--sweep', 64], ['--sweep', 'a']])
def test_wrong_arguments(arguments):
    assert run_tool(TOOL, *arguments).returncode == 2


def test_tool_requires_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(UserError, match='hide the GPU with CUDA_VISIBLE_DEV'):
        next(sweep.sweep(['vvt-tiny'], [64]))


def cell(row, value, digits):
    return 'out of memory' if value is None else f'{value:.{digits}}'


@pytest.mark.parametrize(
    'title,name,digits',
    [
        ('seconds', 'seconds', '3g'),
        ('peak memory (GiB)', 'peak_gib', '2f'),
        ('memory of the pass (GiB)', 'memory_gib', '3f'),
    ],
)
def test_tables_of_the_page(title, name, digits):
    """They have the values of the CSV file, for each model and size."""
    rows = sweep.read_sweep(str(ROOT / 'benchmarks' / 'sweep.csv'))
    sides = sorted({row.side for row in rows})
    lines = [
        f'| {title} | ' + ' | '.join(map(str, sides)) + ' |',
        '|' + '---|' * (len(sides) + 1),
    ]
    for model in sweep.MODELS:
        found = {row.side: row for row in rows if row.model == model}
        cells = [
            cell(found[s], getattr(found[s], name), digits) for s in sides
        ]
        lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
    text = (ROOT / 'docs' / 'evidence' / 'cost.md').read_text()
    assert '\n'.join(lines) in text


def test_exponents_of_the_page():
    """They are those of the rows, as the command fits them."""
    rows = sweep.read_sweep(str(ROOT / 'benchmarks' / 'sweep.csv'))
    growth = {(g.model, g.quantity): g for g in sweep.fit_growth(rows)}
    text = (ROOT / 'docs' / 'evidence' / 'cost.md').read_text()
    for model in sweep.MODELS:
        values = [growth[model, name].exponent for name in QUANTITIES]
        line = f'| {model} | ' + ' | '.join(f'{v:.2f}' for v in values)
        assert f'{line} |\n' in text
