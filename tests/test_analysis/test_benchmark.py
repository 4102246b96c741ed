"""Tests of the benchmark: checks before timing, and its files."""

import re

import pytest
import torch

from mmvvt.analysis.benchmark import (
    KINDS,
    OTHER,
    Row,
    alternate,
    build,
    check_finite,
    check_same,
    kind_of,
    machine_line,
    parse_size,
    peak_memory,
    profile,
    read_csv,
    write_csv,
)
from mmvvt.models.vvt import VVTBlock
from mmvvt.ops.native import load
from mmvvt.ops.strips import common, native_ops

from conftest import ROOT, run_tool

PAGE = ROOT / 'benchmarks' / 'README.md'
FILES = sorted(
    path
    for pattern in ('avx512_*.csv', 'intel_*.csv')
    for path in PAGE.parent.glob(pattern)
)


def test_memory_is_that_of_the_model():
    """Processes that measure memory import the tool, but not its needs."""
    tool = ROOT / 'tools' / 'analysis_tools' / 'benchmark.py'
    done = run_tool(
        '-c',
        f'import runpy, sys; runpy.run_path({str(tool)!r}); '
        "print(sorted({'mmvvt.apis', 'matplotlib'} & set(sys.modules)))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '[]'


@pytest.mark.parametrize('family,shown', [('25', True), ('', False)])
def test_machine_line_names_the_generation(monkeypatch, family, shown):
    fields = {'model name': 'AMD EPYC', 'cpu family': family, 'model': '17'}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(
        'mmvvt.analysis.benchmark.processor_field', fields.__getitem__
    )
    line = machine_line()
    assert line.startswith('AMD EPYC (')
    assert ('family 25, model 17)' in line) is shown


def test_differing_sides_are_not_timed():
    image = torch.randn(1, 3, 4, 4)
    same = check_same(lambda x: (x, 2 * x), lambda x: (x, 2 * x), image, 1e-6)
    assert same == 0.0
    with pytest.raises(AssertionError, match='the two models differ by'):
        check_same(lambda x: (x, x), lambda x: (x, 1.1 * x), image, 1e-3)
    with pytest.raises(AssertionError, match='differ by nan'):
        check_same(lambda x: (x * torch.nan,), lambda x: (x,), image, 1e-3)


def test_pause_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: clock[0])

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr('time.sleep', sleep)
    (timing,) = alternate([lambda: sleep(2.0)], runs=3, pause=5.0)
    assert timing.low == timing.median == timing.high == 2.0


def test_sides_take_turns():
    order = []
    timings = alternate(
        [lambda: order.append('a'), lambda: order.append('b')],
        runs=3,
        warmup=1,
    )
    assert order == ['a', 'b'] * 4
    assert all(0 <= t.low <= t.median <= t.high for t in timings)


@pytest.mark.parametrize('text', ['224', '4x', 'x224', '4x224x3', 'axb'])
def test_bad_sizes(text):
    with pytest.raises(
        ValueError, match='a size must have the form BATCHxSIDE'
    ):
        parse_size(text)
    assert parse_size('4x224') == (4, 224)


def test_maps_are_looked_at():
    image = torch.randn(1, 3, 64, 64)
    maps = [torch.zeros(1, 1, side, side) for side in (16, 8, 4, 2)]
    check_finite(lambda x: maps, image)
    with pytest.raises(AssertionError, match=r'\[16, 8, 4\] pixels for'):
        check_finite(lambda x: maps[:3], image)
    maps[2][0, 0, 0, 0] = torch.inf
    with pytest.raises(AssertionError, match='not finite'):
        check_finite(lambda x: maps, image)


def test_names():
    model, again = build('vvt-tiny'), build('vvt-tiny-plain')
    assert model.block1[0].attn.backend == 'auto'
    assert again.block1[0].attn.backend == 'reference'
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="name must be one of .*, got 'vvt'"):
        build('vvt')


def test_csv_round_trip(tmp_path):
    rows = [
        Row(
            'vvt-small',
            'forward',
            'pytorch',
            'float32',
            1,
            224,
            5,
            0.25,
            0.125,
            0.5,
            None,
            'a machine, 2 threads',
        ),
        Row(
            'resnet-50',
            'train_step',
            'compiled',
            'bfloat16',
            4,
            512,
            3,
            2.0,
            1.5,
            2.5,
            1.25,
            'a machine, 2 threads',
        ),
    ]
    write_csv(tmp_path / 'rows.csv', rows)
    assert read_csv(tmp_path / 'rows.csv') == rows
    assert [row.label for row in rows] == ['vvt-small', 'resnet-50 compiled']
    # files of earlier versions
    text = (tmp_path / 'rows.csv').read_text()
    (tmp_path / 'old.csv').write_text(text.replace('pytorch', 'eager'))
    assert read_csv(tmp_path / 'old.csv') == rows
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='its columns must be model, mode'):
        read_csv(tmp_path / 'other.csv')


def test_kinds_of_operations():
    assert kind_of('aten::addmm') == 'matrix products'
    assert kind_of('aten::mkldnn_convolution') == 'convolutions'
    assert kind_of('aten::convolution_backward') == 'convolutions'
    assert kind_of('aten::gelu_backward') == 'GELU'
    assert kind_of('aten::le') == 'clamps'
    assert kind_of('aten::leaky_relu') == OTHER
    assert kind_of('mmvvt_layer_norm_backward') == 'norms'
    assert kind_of('mmvvt_depthwise_gelu_backward') == 'convolution and GELU'
    for name in ('sum_products', 'attend', 'attend_backward'):
        assert kind_of(f'mmvvt_{name}') == 'attention kernels'
    assert kind_of('mmvvt_gate') == OTHER


@pytest.mark.skipif(load()[0] is None, reason=load()[1])
def test_profile_contains_the_kernels(monkeypatch):
    """Each kernel of a training step is counted."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    called = set()
    call = native_ops._call

    def record(name, *arguments):
        called.add(name)
        call(name, *arguments)

    monkeypatch.setattr(native_ops, '_call', record)
    block, x = VVTBlock(48, 2, 2, 1, 1), torch.randn(1, 400, 48)
    x.requires_grad_()

    def step():
        block(x, (20, 20)).sum().backward()

    with torch.profiler.profile() as recorded:
        step()
    counted = {e.key for e in recorded.key_averages()}
    assert set(native_ops._SIGNATURES) == called <= counted
    seconds = profile(step)
    for kind in ('attention kernels', 'convolution and GELU', 'norms'):
        assert seconds[kind] > 0


def test_profile_tells_products_from_convolutions():
    x = torch.randn(2, 64, 32, 32)
    pixel, depth = torch.randn(256, 64, 1, 1), torch.randn(64, 1, 3, 3)
    product = profile(lambda: torch.conv2d(x, pixel))
    assert set(product) == {*KINDS, OTHER}
    assert list(product.values()) == sorted(product.values(), reverse=True)
    assert product['matrix products'] > 0 == product['convolutions']
    convolution = profile(lambda: torch.conv2d(x, depth, groups=64))
    assert convolution['matrix products'] == 0 < convolution['convolutions']


def test_peak_memory_is_that_of_the_pass():
    """The peak memory does not include the 2 GiB used by this process."""
    torch.zeros(1 << 29)
    small = peak_memory('vvt-tiny', 1, 64, 'forward', 'float32')
    large = peak_memory('vvt-tiny', 1, 1024, 'train_step', 'float32')
    if not torch.cuda.is_available():
        assert 0.2 < small < 1.5
    assert large > small + 0.3


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_tables_of_the_page(file):
    """They contain the speed and memory of each row of the CSV files."""
    section = PAGE.read_text().split('## On a processor with AVX-512')[1]
    for row in read_csv(str(file)):
        speeds = [
            f'{row.batch / seconds:.3g}'
            for seconds in (row.seconds, row.seconds_p80, row.seconds_p20)
        ]
        cell = f'{speeds[0]} ({speeds[1]} to {speeds[2]})'
        if row.peak_gib is not None:
            cell += f', {row.peak_gib:.2f}'
        line = rf'^\| {row.model}[ ,].*\| {re.escape(cell)} \|'
        assert re.search(line, section, re.M), (row.model, cell)
