"""Tests of the benchmark in ONNX Runtime and OpenVINO."""

import importlib.util
import sys

import pytest
import torch

import mmvvt.analysis.benchmark as benchmark
import mmvvt.analysis.engines as engines
from mmvvt.analysis.benchmark import read_csv
from mmvvt.analysis.engines import check_engine, check_engines
from mmvvt.deploy.formats import openvino_core
from mmvvt.errors import UserError
from mmvvt.models import VVT
from mmvvt.visualization.benchmark import plot_benchmark

from conftest import ROOT

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)


class Pyramid(torch.nn.Module):
    """Four maps of strides 4 to 32, in place of another backbone."""

    out_indices = (0, 1, 2, 3)

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList(
            torch.nn.Conv2d(*channels, stride, stride)
            for *channels, stride in (
                (3, 4, 4),
                (4, 6, 2),
                (6, 8, 2),
                (8, 8, 2),
            )
        )

    def forward(self, x):
        outs = []
        for stage in self.stages:
            x = stage(x).tanh()
            outs.append(x)
        return tuple(outs)


def build_tiny(name='vvt-tiny'):
    torch.manual_seed(0)
    if not name.startswith('vvt'):
        return Pyramid()
    return VVT(arch=ARCH, out_indices=(0, 1, 2, 3))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)


@pytest.fixture
def tool(monkeypatch):
    """Return a function that runs the tool in this process, with tiny VVT."""
    monkeypatch.setattr(benchmark, 'build', build_tiny)
    spec = importlib.util.spec_from_file_location(
        'benchmark_tool', ROOT / 'tools' / 'analysis_tools' / 'benchmark.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr('mmvvt.apis.keep_freed_memory', lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
        module.main()

    return run


FORWARD = ['--models', 'vvt-tiny', '--modes', 'forward', '--sizes', '1x64']


def test_rows_of_engines(tool, tmp_path, capsys):
    """Small models: the export of VVT is tested in tests/test_deploy."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('openvino')
    path = tmp_path / 'rows.csv'
    tool(
        *['--models', 'resnet-50', 'pvtv2-b2', '--modes', 'forward'],
        *['--sizes', '3x64', '1x96', '--runs', '2', '--csv', path],
        *['--engines', 'pytorch', 'onnxruntime', 'openvino'],
    )
    rows = read_csv(path)
    names = ('pytorch', 'onnxruntime', 'openvino')
    assert [(r.batch, r.side, r.engine, r.model) for r in rows] == [
        (batch, side, engine, model)
        for batch, side in ((3, 64), (1, 96))
        for engine in names
        for model in ('resnet-50', 'pvtv2-b2')
    ]
    for row in rows:
        assert row.mode == 'forward' and row.dtype == 'float32'
        assert row.runs == 2 and row.peak_gib is None
    printed = capsys.readouterr().out
    for model in ('resnet-50', 'pvtv2-b2'):
        for engine in names[1:]:
            assert printed.count(f'{model}: exported for {engine} in') == 1
            for side in (64, 96):
                assert f'at {side} pixels in float32' in printed
            assert printed.count(f'\n{model} {engine} ') == 2  # table rows
            assert printed.count(f'\n{model} in {engine} and PyTorch') == 2
    plot_benchmark(rows, tmp_path / 'plot.svg')
    assert 'pvtv2-b2 openvino' in (tmp_path / 'plot.svg').read_text()


def test_memory_of_engines(tool, tmp_path):
    """A process of its own opens the file: it does not have our tensors."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('openvino')
    ballast = torch.zeros(1 << 29)  # 2 GiB
    path = tmp_path / 'rows.csv'
    tool(
        *['--models', 'resnet-50', '--modes', 'forward', '--runs', '1'],
        *['--sizes', '1x64', '8x1024', '--memory', '--csv', path],
        *['--engines', 'onnxruntime', 'openvino'],
    )
    del ballast
    peaks = {(r.engine, r.side): r.peak_gib for r in read_csv(path)}
    for engine in ('onnxruntime', 'openvino'):
        assert 0.2 < peaks[engine, 64] < 1.5
        # The images of 0.09 GiB are copied, the first map has 0.03 GiB.
        assert peaks[engine, 1024] > peaks[engine, 64] + 0.09


def test_compiled_engine(tool, monkeypatch, tmp_path, capsys):
    """``--compile`` adds the engine, and a failing compiler is skipped."""
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    path = tmp_path / 'rows.csv'
    tool(*FORWARD, '--runs', '1', '--compile', '--csv', path)
    assert [row.engine for row in read_csv(path)] == ['pytorch', 'compiled']
    tool(*FORWARD, '--runs', '1', '--engines', 'compiled', '--csv', path)
    assert [row.engine for row in read_csv(path)] == ['compiled']

    monkeypatch.setattr(torch, 'compile', lambda model: torch.nn.Linear(1, 1))
    tool(*FORWARD, '--runs', '1', '--compile', '--csv', path)
    assert [row.engine for row in read_csv(path)] == ['pytorch']
    assert 'vvt-tiny: skipped with torch.compile' in capsys.readouterr().out


class FakeFormat:
    """An engine that returns the outputs of PyTorch, changed."""

    suffix = '.fake'
    packages = ()
    norm = 'tokens'

    def __init__(self, change=lambda outs: outs):
        self.change = change
        self.threads = []

    def write(self, network, example, path, fixed_size, metadata):
        assert not fixed_size
        self.network = network

    def open(self, path, threads=None):
        self.threads.append(threads)

        def run(images):
            with torch.no_grad():
                outs = self.network(torch.from_numpy(images))
            return self.change([out.numpy() for out in outs])

        return run


def fake(monkeypatch, **options):
    form = FakeFormat(**options)
    monkeypatch.setitem(engines.FORMATS, 'onnx', form)
    return form


def test_engines_have_the_threads_of_pytorch(tool, monkeypatch, tmp_path):
    form = fake(monkeypatch)
    path = tmp_path / 'rows.csv'
    arguments = [*FORWARD, '--runs', '1', '--csv', path]
    tool(*arguments, '--engines', 'onnxruntime', 'onnxruntime')
    assert form.threads == [torch.get_num_threads()]
    assert [row.engine for row in read_csv(path)] == ['onnxruntime']


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda outs: [1.001 * out for out in outs], 'differ by 1.0e-03'),
        (lambda outs: [*outs[:3], torch.nan * outs[3]], 'differ by nan'),
        (lambda outs: [torch.nan * outs[0], *outs[1:]], 'differ by nan'),
        (lambda outs: outs[:3], 'maps of other shapes'),
        (lambda outs: [out[..., :1] for out in outs], 'of other shapes'),
    ],
)
def test_wrong_outputs_are_not_timed(tool, monkeypatch, change, message):
    fake(monkeypatch, change=change)
    with pytest.raises(UserError, match=message):
        tool(*FORWARD, '--engines', 'onnxruntime')


def test_small_errors_are_allowed(monkeypatch):
    model, image = build_tiny(), torch.randn(1, 3, 64, 64)
    error = check_engine(
        'vvt-tiny',
        'onnxruntime',
        model,
        lambda x: tuple(1.00001 * out for out in model(x)),
        image,
    )
    assert error == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(UserError, match='error of 1e-01 in bfloat16'):
        check_engine(
            'vvt-tiny',
            'openvino',
            model,
            lambda x: tuple(1.2 * out for out in model(x)),
            image,
            'bfloat16',
        )


def test_models_that_cannot_be_exported_are_skipped(
    tool, monkeypatch, tmp_path, capsys
):
    def write(*arguments):
        raise RuntimeError('a dimension is fixed')

    form = fake(monkeypatch)
    form.write = write
    path = tmp_path / 'rows.csv'
    arguments = [*FORWARD, '--runs', '1', '--csv', path]
    tool(*arguments, '--engines', 'pytorch', 'onnxruntime')
    assert [row.engine for row in read_csv(path)] == ['pytorch']
    assert (
        'vvt-tiny: skipped with onnxruntime, the export raised RuntimeError'
        in capsys.readouterr().out
    )


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_engines_refuse(engine, monkeypatch):
    for form in ('onnx', 'openvino'):
        monkeypatch.setattr(engines.FORMATS[form], 'packages', ())
    monkeypatch.setattr(engines, 'has_bfloat16', lambda: False)
    check_engines([engine], ['vvt-tiny'], ['forward'], 'float32')
    # The engines of PyTorch allow everything.
    check_engines(
        ['pytorch', 'compiled'], ['vvt-tiny-plain'], ['train_step'], 'float16'
    )

    def refuse(message, names=('vvt-tiny',), mode='forward', dtype='float32'):
        with pytest.raises(UserError, match=f'^{engine} {message}'):
            check_engines(['pytorch', engine], names, [mode], dtype)

    refuse('allows --modes forward, got train_step', mode='train_step')
    refuse('allows --dtype float32.*, got float16$', dtype='float16')
    refuse('allows --dtype float32.*, got bfloat16$', dtype='bfloat16')
    refuse(
        'allows models without -plain and -triton, .*, got vvt-tiny-plain$',
        names=('vvt-tiny', 'vvt-tiny-plain'),
    )
    monkeypatch.setattr(
        engines.FORMATS[engines.FILES[engine]], 'packages', ('no_such',)
    )
    with pytest.raises(UserError, match='the package no_such is missing'):
        check_engines([engine], ['vvt-tiny'], ['forward'], 'float32')
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    refuse('runs on the CPU: hide the GPU')


def test_bfloat16_in_openvino(monkeypatch):
    """bfloat16 depends on the processor and is passed to the engine."""
    pytest.importorskip('openvino')
    capable = 'BF16' in openvino_core().get_property(
        'CPU', 'OPTIMIZATION_CAPABILITIES'
    )
    assert engines.has_bfloat16() is capable
    monkeypatch.setattr(engines, 'has_bfloat16', lambda: True)
    check_engines(['openvino'], ['vvt-tiny'], ['forward'], 'bfloat16')
    with pytest.raises(UserError, match='float32 or bfloat16, got float16'):
        check_engines(['openvino'], ['vvt-tiny'], ['forward'], 'float16')
    seen = []
    monkeypatch.setattr(
        engines.FORMATS['openvino'],
        'open',
        lambda path, threads, precision: seen.append(precision),
    )
    for dtype in ('float32', 'bfloat16'):
        engines.open_engine('model.xml', 'openvino', dtype)
    assert seen == ['f32', 'bf16']
