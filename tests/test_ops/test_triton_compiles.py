"""All Triton kernels can be compiled for GPUs without a GPU."""

import pytest
import torch

from mmvvt.analysis.kernels import compiled_launches, resources

from triton_testing import INTERPRETED

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(INTERPRETED, reason='the interpreter is on')

# Maximum shared memory of a program on consumer GPUs, in bytes
SHARED_MEMORY = 99 * 1024


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compiled launches of kernels."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    with compiled_launches() as launches:
        yield launches
    for launch in launches:
        # shown by pytest -rP
        print(launch.kernel, launch.shared, resources(launch.binary))
        assert launch.shared <= SHARED_MEMORY, launch.kernel
        assert resources(launch.binary).spills == 0, launch.kernel


@pytest.mark.parametrize(
    'dtype,d',
    [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 16)],
)
def test_attention(compiled, dtype, d):
    from mmvvt.ops.triton_kernels import attention

    q, k, v = (
        torch.zeros(1, 4096, 2, d, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    grid = [64, 64]
    out, sums = attention._forward._init_fn(
        q, k, v, grid, grid, 'sum', True, 1e-4
    )
    attention._backward._init_fn(
        out, q, k, v, sums, grid, grid, 'sum', True, 1e-4
    )
    assert [launch.kernel for launch in compiled] == [
        '_partial_sums',
        '_add_chunks',
        '_output',
        '_query_gradient',
        '_partial_sums',
        '_add_chunks',
        '_key_gradient',
    ]


def test_dwconv_gelu(compiled):
    from mmvvt.ops.triton_kernels import dwconv_gelu

    x = torch.zeros(2, 1024, 256, dtype=torch.bfloat16)
    weight, bias = torch.zeros(256, 1, 3, 3), torch.zeros(256)
    y = dwconv_gelu._forward._init_fn(x, weight, bias, 32, 32)
    dwconv_gelu._backward._init_fn(y, x, weight, bias, 32, 32)
    assert [launch.kernel for launch in compiled] == [
        '_convolve',
        '_sum_gradient',
        '_add_chunks',
        '_convolve',
    ]
