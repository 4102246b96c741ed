"""tools/analysis_tools as a user runs them."""

import re

from conftest import run_tool


def test_get_flops():
    done = run_tool('tools/analysis_tools/get_flops.py',
                    'configs/classification/vvt-tiny_8xb128_in1k.py',
                    'configs/demo/vvt-nano_digits.py', '--shape', '96', '64')
    assert done.returncode == 0, done.stdout
    assert 'one image of 96 x 64' in done.stdout
    assert re.search(r'vvt-tiny_8xb128_in1k +12882440 +12.88', done.stdout)
    assert re.search(r'vvt-nano_digits +\d+', done.stdout)
    done = run_tool('tools/analysis_tools/get_flops.py', 'no.py')
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == 'error: no such config file: no.py'


def test_benchmark():
    done = run_tool('tools/analysis_tools/benchmark.py', '--arch', 'tiny',
                    '--sizes', '1x64', '2x32', '--runs', '2')
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert 'torch' in lines[0] and 'threads' in lines[0]
    rows = [line for line in lines if re.match(r' +\d+ x \d+', line)]
    assert len(rows) == 4
    done = run_tool('tools/analysis_tools/benchmark.py', '--sizes', '224')
    assert done.returncode == 1
    assert "such as 4x224, got '224'" in done.stdout


def test_report_says_what_is_missing(tmp_path):
    done = run_tool('tools/analysis_tools/report_classification.py',
                    'configs/demo/vvt-nano_digits.py', tmp_path / 'no.pth',
                    tmp_path, tmp_path / 'no.pkl')
    assert done.returncode == 1
    assert 'no such file or folder' in done.stdout.splitlines()[-1]
