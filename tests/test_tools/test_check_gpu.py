"""Tests of tools/analysis_tools/check_gpu.py, on a machine without a GPU."""

import csv
import sys

import pytest

from mmvvt.analysis.benchmark import Row, read_csv, write_csv
from mmvvt.analysis.kernel_errors import KernelError
from mmvvt.errors import UserError

from conftest import load_tool, run_tool

TOOL = 'tools/analysis_tools/check_gpu.py'
NO_GPU = dict(CUDA_VISIBLE_DEVICES='')


@pytest.fixture
def tool():
    """The tool as a module."""
    return load_tool(TOOL)


@pytest.fixture
def start(tool, monkeypatch, tmp_path):
    """Run the tool in this process."""

    def call(*arguments):
        monkeypatch.setattr(
            sys,
            'argv',
            ['check_gpu.py', '--out-dir', str(tmp_path), *arguments],
        )
        tool.main()

    return call


def test_without_a_gpu(tmp_path):
    pytest.importorskip('triton')
    done = run_tool(TOOL, '--out-dir', tmp_path, env=NO_GPU)
    assert done.returncode == 0, done.stdout
    assert 'missing: PyTorch finds no GPU' in done.stdout
    assert 'not run: ops, models' in done.stdout
    with open(tmp_path / 'errors.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {(row['kernel'], row['dtype'], row['tensor']) for row in rows} == {
        (kernel, dtype, tensor)
        for kernel, tensors in dict(
            attention=('output', 'q', 'k', 'v'),
            convolution=('output', 'x', 'weight', 'bias'),
        ).items()
        for tensor in tensors
        for dtype in ('float32', 'bfloat16', 'float16')
    }
    for row in rows:
        assert 0 < float(row['error']) <= float(row['allowed'])


def test_models(tool, start, monkeypatch, tmp_path):
    """The groups of benchmark.py are merged into a CSV file and a plot."""
    benchmark = load_tool('tools/analysis_tools/benchmark.py')

    class Done:
        returncode = 0

    def run(command):
        assert command[0] == sys.executable
        monkeypatch.setattr(sys, 'argv', command[1:])
        args = benchmark.parse_args()
        assert args.memory and args.runs == 3
        (size,), (mode,) = args.sizes, args.modes
        write_csv(
            args.csv,
            [
                Row(
                    *(name, mode, engine, args.dtype),
                    *benchmark.parse_size(size),
                    *(args.runs, 0.5, 0.25, 1.0, 2.0, 'Some GPU'),
                )
                for engine in args.engines
                for name in args.models
            ],
        )
        return Done

    monkeypatch.setattr(tool.subprocess, 'run', run)
    start('--sections', 'models', '--runs', '3')
    rows = read_csv(tmp_path / 'models.csv')
    assert {(r.mode, r.batch, r.side) for r in rows} == {
        ('forward', 128, 224),
        ('forward', 4, 1024),
        ('train_step', 64, 224),
    }
    assert {r.engine for r in rows} == {'pytorch', 'compiled'}
    assert {'vvt-small-triton', 'vvt-small', 'vvt-small-plain'} <= {
        r.model for r in rows
    }
    assert {(r.dtype, r.machine) for r in rows} == {('bfloat16', 'Some GPU')}
    assert (tmp_path / 'models.png').stat().st_size > 10000


def make_error(error, dtype='bfloat16'):
    return KernelError('attention', 'a case', dtype, 'k', error, 0.25)


@pytest.mark.parametrize('error', [0.5, float('nan'), float('inf')])
def test_kernel_that_misses_its_bound(tool, start, monkeypatch, capsys, error):
    """It is listed, whether it ran on a GPU or in the interpreter."""
    pytest.importorskip('triton')
    errors = [make_error(0.25), make_error(error), make_error(0.1, 'float16')]
    for place in (True, False):
        monkeypatch.setattr(tool, 'can_run_kernels', lambda p=place: p)
        monkeypatch.setattr(tool, 'kernel_errors', lambda device: errors)
        monkeypatch.setattr(tool, 'interpreted_errors', lambda: errors)
        with pytest.raises(UserError, match='^1 checks failed'):
            start('--sections', 'kernels')
        out = capsys.readouterr().out
        assert ('on the GPU' in out) == place
        assert (
            f'FAILED: attention in bfloat16, k: error {error:.1e}, allowed is '
            '2.5e-01 (a case)'
        ) in out
        assert out.count('FAILED') == 1
    errors[1] = make_error(0.2)
    start('--sections', 'kernels')


def test_all_sections_on_a_gpu(tool, start, monkeypatch, capsys, tmp_path):
    """All sections run, and one that fails does not stop the others."""
    pytest.importorskip('triton')
    monkeypatch.setattr(tool, 'can_run_kernels', lambda: True)
    monkeypatch.setattr(
        tool, 'kernel_errors', lambda device: [make_error(0.1)]
    )
    calls = []

    class Failed:
        returncode = 1

    def benchmark(command):
        calls.append(command)
        return Failed

    def times(device, bandwidth, **settings):
        raise RuntimeError('CUDA out of memory.\nTried to allocate')

    monkeypatch.setattr(tool.subprocess, 'run', benchmark)
    monkeypatch.setattr(tool, 'copy_bandwidth', lambda *_: 1e12)
    monkeypatch.setattr(tool, 'op_times', times)
    with pytest.raises(UserError, match='^4 checks failed'):
        start('--sections', 'environment', 'kernels', 'ops', 'models')
    out = capsys.readouterr().out
    assert 'bandwidth of a copy: 1000 GB/s' in out
    assert 'ops raised RuntimeError: CUDA out of memory. Tried to' in out
    sizes = [c[c.index('--sizes') + 1] for c in calls]
    modes = [c[c.index('--modes') + 1] for c in calls]
    assert list(zip(modes, sizes)) == [
        ('forward', '128x224'),
        ('forward', '4x1024'),
        ('train_step', '64x224'),
    ]
    for command in calls:
        assert command[command.index('--dtype') + 1] == 'bfloat16'
        assert {'--memory', 'pytorch', 'compiled', 'vvt-small-triton'} <= set(
            command
        )
    assert not (tmp_path / 'models.csv').exists()


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['--models', 'vvt-huge'], "got 'vvt-huge'"),
        (['--train-sizes', '224'], "such as 4x224, got '224'"),
        (['--runs', '0'], '--runs must be 1 or more, got 0'),
        (['--op-batch', '0'], '--op-batch must be 1 or more, got 0'),
        (['--out-dir', '/dev/null/a'], 'cannot create the folder /dev/null/a'),
    ],
)
def test_bad_arguments(start, arguments, message):
    with pytest.raises(UserError) as raised:
        start(*arguments)
    assert message in str(raised.value)
