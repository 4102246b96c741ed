"""Tests of what the compiler shows about the kernels."""

import sys

import pytest
import torch

from mmvvt.analysis.kernels import (
    ARCHITECTURES,
    KernelRow,
    Resources,
    compiled_launches,
    convolution_launches,
    kernel_rows,
    kernel_table,
    occupancy,
    resources,
)

from conftest import ROOT, load_tool, run_tool

pytest.importorskip('triton')
SM_80, SM_90 = ARCHITECTURES['sm_80'], ARCHITECTURES['sm_90']


@pytest.mark.parametrize(
    'warps,registers,shared,blocks',
    [
        # 65536 registers / (255 rounded up to 256 x 256 threads)
        (8, 255, 0, 1),
        (8, 128, 0, 2),
        # 65536 / (136 x 32) = 15 warps, 12 in groups of four
        (4, 129, 0, 3),
        # 64 warps
        (8, 32, 0, 8),
        # 32 blocks
        (1, 16, 0, 32),
        # 164 KiB / (40 KiB + 1 KiB of the system)
        (8, 32, 40 * 1024, 4),
        (4, 32, 163 * 1024, 1),
        (4, 32, 164 * 1024, 0),
    ],
)
def test_occupancy(warps, registers, shared, blocks):
    assert occupancy(SM_80, warps, registers, shared) == warps * blocks / 64


def test_more_shared_memory_on_sm_90():
    assert occupancy(SM_90, 8, 32, 40 * 1024) == 5 * 8 / 64


def test_spills_are_seen(monkeypatch, tmp_path):
    """A limit of 64 registers per thread makes a kernel spill."""
    import triton

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    compile_kernel = triton.compile
    found = []
    for limit in (None, 64):
        monkeypatch.setattr(
            triton,
            'compile',
            lambda *args, options, limit=limit, **kwargs: compile_kernel(
                *args, options=dict(options, maxnreg=limit), **kwargs
            ),
        )
        (launch,), _ = convolution_launches(SM_80, torch.bfloat16, 128, 8, 1)
        found.append(resources(launch.binary))
        monkeypatch.undo()
        monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    free, limited = found
    assert free.spills == 0 and free.registers > 64
    assert limited.spills > 0 and limited.registers <= 64


def test_kernels_run_again_after_compiling():
    """The kernels are put back, also after an error."""
    from mmvvt.ops.triton_kernels import attention, common, dwconv_gelu

    before = (attention._output, common._add_chunks, dwconv_gelu._convolve)
    with pytest.raises(ZeroDivisionError):
        with compiled_launches():
            assert attention._output is not before[0]
            raise ZeroDivisionError
    after = (attention._output, common._add_chunks, dwconv_gelu._convolve)
    assert after == before


def test_bad_binary():
    with pytest.raises(ValueError, match='^cuobjdump cannot read the binary'):
        resources(b'no binary')


def test_table():
    used = {'sm_80': (Resources(255, 16), 2048, 0.125)}
    row = KernelRow(
        'bfloat16', 'attention', 48, 'forward', '_output', 8, used, 300.0, 200
    )
    lines = kernel_table([row]).splitlines()
    assert len(lines) == 3 and len({line.count('|') for line in lines}) == 1
    assert lines[2] == (
        '| 48 | forward | `_output` | 8 | 255 | 16 | 2.0 | 12.5% | 200 | 300 '
        '| 1.50 |'
    )


# Runs the kernels in Triton's interpreter, counts the bytes of all loads and
# stores, and compares the counts with those computed from the arguments.
COUNT = """
import torch
from triton.runtime import interpreter
from mmvvt.analysis.kernel_errors import patch_interpreter_once
from mmvvt.analysis.kernels import Launch
from mmvvt.ops.triton_kernels import attention, common, dwconv_gelu

patch_interpreter_once()
counted = [0]
builder = type(interpreter.interpreter_builder)
load, store = builder.create_masked_load, builder.create_masked_store


def count(ptrs, mask):
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    counted[0] += int(mask.data.sum()) * size


def counting_load(self, ptrs, mask, *args):
    count(ptrs, mask)
    return load(self, ptrs, mask, *args)


def counting_store(self, ptrs, value, mask, *args):
    count(ptrs, mask)
    return store(self, ptrs, value, mask, *args)


builder.create_masked_load = counting_load
builder.create_masked_store = counting_store


class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = self.kernel.arg_names
            arguments = {**kwargs, **dict(zip(names, args))}
            name = self.kernel.__name__
            done = Launch(name, grid, arguments, 0, 0, b'')
            counted[0] = 0
            self.kernel[grid](*args, **kwargs)
            assert counted[0] == done.requested_bytes, (
                name, arguments, counted[0], done.requested_bytes)
            print(name, done.requested_bytes)

        return launch


for module in (attention, common, dwconv_gelu):
    for name in ('_partial_sums', '_output', '_query_gradient',
                 '_key_gradient', '_add_chunks', '_convolve',
                 '_sum_gradient'):
        if hasattr(module, name):
            setattr(module, name, Recorder(getattr(module, name)))
for dtype, d, grid in (('bfloat16', 24, [5, 9]), ('float16', 65, [3, 7])):
    q, k, v = (
        torch.randn(1, grid[0] * grid[1], 1, d).transpose(1, 2)
        .to(getattr(torch, dtype)).requires_grad_()
        for _ in range(3))
    out = attention.linear_attention(q, k, v, grid, grid, 'sum', True, 1e-4)
    out.sum().backward()
for h, w, c in ((18, 7, 6), (3, 8, 5)):
    x, weight, bias = (
        torch.randn(shape, requires_grad=True)
        for shape in ((2, h * w, c), (c, 1, 3, 3), (c,)))
    dwconv_gelu.dwconv_gelu(x, weight, bias, (h, w)).sum().backward()
"""


def test_bytes_are_those_of_all_loads_and_stores():
    done = run_tool(
        '-c', COUNT, env=dict(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {
        '_partial_sums',
        '_output',
        '_query_gradient',
        '_key_gradient',
        '_add_chunks',
        '_convolve',
        '_sum_gradient',
    }


def test_tool(monkeypatch, tmp_path, capsys):
    tool = load_tool('tools/analysis_tools/kernel_table.py')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    arguments = '--archs sm_80 --dtypes float32 --head-dims --channels 16'
    out = tmp_path / 'table.md'
    monkeypatch.setattr(
        sys, 'argv', ['tool', *arguments.split(), '--out', str(out)]
    )
    tool.main()
    text = out.read_text()
    assert '### convolution, float32' in text and 'attention' not in text
    assert '| 16 | backward | `_sum_gradient` | 4 |' in text
    assert '0 compiled kernels spill' in capsys.readouterr().out


def test_bad_arguments():
    with pytest.raises(ValueError, match="of sm_80, sm_90, got 'sm_10'$"):
        kernel_rows(['sm_10'], 'float32', [], [16])
    with pytest.raises(ValueError, match=r'from 1 to 128, got \[129\]'):
        kernel_rows(['sm_80'], 'float32', [129], [])
    with pytest.raises(ValueError, match=r'must be 1 or more, got \[0\]'):
        kernel_rows(['sm_80'], 'float32', [], [0])


def test_no_kernel_in_the_documentation_spills():
    """docs/kernels.md has a row for each kernel, and no spills."""
    text = (ROOT / 'docs/kernels.md').read_text()
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in text.splitlines()
        if line.startswith('|') and '`_' in line and line.count('|') == 16
    ]
    assert len(rows) == 3 * (6 * 6 + 3 * 4)
    assert {row[5] for row in rows} == {row[9] for row in rows} == {'0'}
