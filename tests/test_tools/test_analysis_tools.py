"""Tests of the command lines of tools/analysis_tools."""

import re
from pathlib import Path

import cv2
import pytest

from mmvvt.analysis.benchmark import read_csv

from conftest import ROOT, run_tool


def test_stock_get_flops():
    """The tool of mmpretrain counts a classifier with VVT."""
    import mmpretrain

    folder = Path(mmpretrain.__path__[0])
    done = run_tool(
        folder / '.mim/tools/analysis_tools/get_flops.py',
        ROOT / 'configs/demo/vvt-nano_digits.py',
        '--shape',
        32,
    )
    assert done.returncode == 0, done.stdout
    assert 'Params: 0.693M' in done.stdout
    (flops,) = re.findall(r'^Flops: ([0-9.]+)M$', done.stdout, re.MULTILINE)
    assert float(flops) > 1


def test_get_flops():
    done = run_tool(
        'tools/analysis_tools/get_flops.py',
        'configs/classification/vvt-tiny_8xb128_in1k.py',
        'configs/demo/vvt-nano_digits.py',
        '--shape',
        '96',
        '64',
    )
    assert done.returncode == 0, done.stdout
    assert 'one image of 96 x 64' in done.stdout
    assert re.search(r'vvt-tiny_8xb128_in1k +12882440 +12.88', done.stdout)
    assert re.search(r'vvt-nano_digits +\d+', done.stdout)
    done = run_tool('tools/analysis_tools/get_flops.py', 'no.py')
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == 'error: no such config file: no.py'


def test_benchmark(tmp_path):
    tool = 'tools/analysis_tools/benchmark.py'
    done = run_tool(
        tool,
        '--models',
        'vvt-tiny',
        'vvt-tiny-plain',
        'resnet-50',
        '--sizes',
        '1x64',
        '2x32',
        '--runs',
        '2',
        '--csv',
        tmp_path / 'table.csv',
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert 'torch' in lines[0] and 'threads' in lines[0]
    assert 'vvt-tiny and the reference implementation differ by' in done.stdout
    rows = read_csv(tmp_path / 'table.csv')
    assert [(r.batch, r.side, r.mode, r.model) for r in rows] == [
        (b, s, mode, model)
        for b, s in ((1, 64), (2, 32))
        for mode in ('forward', 'train_step')
        for model in ('vvt-tiny', 'vvt-tiny-plain', 'resnet-50')
    ]
    for row in rows:
        assert f'{row.batch} x {row.side}, {row.mode.replace("_", " ")}' in (
            lines
        )
        assert row.runs == 2 and row.peak_gib is None
        assert 0 < row.seconds_p20 <= row.seconds <= row.seconds_p80

    tool = 'tools/analysis_tools/plot_benchmark.py'
    picture = tmp_path / 'plot.png'
    done = run_tool(tool, picture, tmp_path / 'table.csv')
    assert done.returncode == 0, done.stdout
    assert cv2.imread(str(picture)).std() > 10
    done = run_tool(tool, picture, tmp_path / 'no.csv')
    assert done.returncode == 1 and 'no.csv' in done.stdout


def test_benchmark_profile():
    done = run_tool(
        'tools/analysis_tools/benchmark.py',
        '--models',
        'vvt-tiny',
        '--sizes',
        '1x64',
        '--modes',
        'train_step',
        '--profile',
        env=dict(CUDA_VISIBLE_DEVICES=''),
    )
    assert done.returncode == 0, done.stdout
    table = done.stdout[done.stdout.index('1 x 64, train step') :]
    for kind in ('matrix products', 'convolutions', 'GELU', 'sum'):
        assert re.search(rf'^{kind} +\d+$', table, re.M), done.stdout


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['--sizes', '224'], "such as 4x224, got '224'"),
        (['--models', 'vvt-huge'], "resnet-50, got 'vvt-huge'"),
        (['--runs', '0'], '--runs must be 1 or more, got 0'),
        (
            ['--profile', '--compile'],
            '--profile allows --engines pytorch, got pytorch compiled',
        ),
        (
            ['--engines', 'pytorch', 'openvino'],
            'openvino allows --modes forward, got forward train_step',
        ),
    ],
)
def test_benchmark_refuses(arguments, message):
    done = run_tool(
        'tools/analysis_tools/benchmark.py',
        *arguments,
        env=dict(CUDA_VISIBLE_DEVICES=''),
    )
    assert done.returncode == 1
    assert message in done.stdout.splitlines()[-1]


def test_report_says_what_is_missing(tmp_path):
    done = run_tool(
        'tools/analysis_tools/report_classification.py',
        'configs/demo/vvt-nano_digits.py',
        tmp_path / 'no.pth',
        tmp_path,
        tmp_path / 'no.pkl',
    )
    assert done.returncode == 1
    assert 'no such file or folder' in done.stdout.splitlines()[-1]
