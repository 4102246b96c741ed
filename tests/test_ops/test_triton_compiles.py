"""All Triton kernels can be compiled for GPUs without a GPU."""

import pytest
import torch

from triton_testing import INTERPRETED

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(INTERPRETED, reason='the interpreter is on')

TYPES = {
    torch.float32: '*fp32',
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
}
# Maximum shared memory of a program on consumer GPUs, in bytes
SHARED_MEMORY = 99 * 1024


class Compiler:
    """Replacement for a kernel that compiles each call without running it."""

    def __init__(self, kernel, compiled):
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid):
        assert all(n >= 1 for n in grid)
        return self

    def __call__(self, *args, num_warps=4, **kwargs):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kwargs.update(zip(self.kernel.arg_names, args))
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = kwargs[parameter.name]
            general = parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                kind, aligned = TYPES[value.dtype], True
            elif (
                parameter.is_constexpr
                or value is None
                or (value == 1 and not general)
            ):
                kind, aligned = 'constexpr', False
                constants[(i,)] = value
            elif isinstance(value, float):
                kind, aligned = 'fp32', False
            else:
                kind, aligned = 'i32', value % 16 == 0 and not general
            if aligned:
                attributes[(i,)] = [['tt.divisibility', 16]]
            signature[parameter.name] = kind
        self.compiled[self.kernel.__name__] = triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget('cuda', 90, 32),
            options=dict(num_warps=num_warps),
        )


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compiled kernels by name."""
    from mmvvt.ops.triton_kernels import attention, common, dwconv_gelu

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    done = {}
    for module, names in (
        (
            attention,
            ('_partial_sums', '_output', '_query_gradient', '_key_gradient'),
        ),
        (common, ('_add_chunks',)),
        (dwconv_gelu, ('_convolve', '_sum_gradient')),
    ):
        monkeypatch.setattr(module, 'num_programs', lambda device: 132)
        for name in names:
            monkeypatch.setattr(
                module, name, Compiler(getattr(module, name), done)
            )
    yield done
    for name, kernel in done.items():
        print(name, kernel.metadata.shared)  # shown by pytest -rP
        assert kernel.metadata.shared <= SHARED_MEMORY, name


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
    assert len(compiled) == 5


def test_dwconv_gelu(compiled):
    from mmvvt.ops.triton_kernels import dwconv_gelu

    x = torch.zeros(2, 1024, 256, dtype=torch.bfloat16)
    weight, bias = torch.zeros(256, 1, 3, 3), torch.zeros(256)
    y = dwconv_gelu._forward._init_fn(x, weight, bias, 32, 32)
    dwconv_gelu._backward._init_fn(y, x, weight, bias, 32, 32)
    assert len(compiled) == 3
