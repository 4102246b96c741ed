"""Errors of the Triton kernels against the reference in float64.

Run as a module, it prints the errors in Triton's interpreter as JSON.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..ops import LOCALITIES, dwconv_gelu, reference, vicinity_attention
from ..ops.dispatch import HAS_TRITON, INTERPRETED, TRITON_DTYPES

# Relative error that is always allowed: results that are as exact as the dtype
# allows may differ by more than a factor of two from each other.
FLOORS = {
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# Larger errors are never allowed: some gradients of plain PyTorch in float16
# and bfloat16 consist of rounding errors only.
CEILING = 0.1


@dataclass
class KernelError:
    """Error of one output or gradient of a kernel.

    Attributes:
        kernel (str): 'attention' or 'convolution'.
        case (str): Sizes and settings.
        dtype (str): 'float32', 'bfloat16' or 'float16'.
        tensor (str): 'output', or the input whose gradient it is. If the
            kernel raised an error, its message.
        error (float): Relative error ``|a - b| / |b|`` against float64.
        allowed (float): Twice the relative error of plain PyTorch in the same
            dtype, but not less than the entry of :data:`FLOORS` and not more
            than :data:`CEILING`. Where plain float16 overflows, plain bfloat16
            is used.
    """

    kernel: str
    case: str
    dtype: str
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed. NaN is not."""
        return self.error <= self.allowed


@dataclass
class Case:
    """Sizes and settings of a comparison.

    Attributes:
        grid (tuple[int, int]): Grid ``(h, w)`` of the queries, or of the
            tokens of the convolution.
        batch (int): Batch size.
        heads (int): Number of heads.
        width (int): Channels per head, or channels of the convolution.
        key_grid (tuple[int, int]): Grid of the keys.
        locality (str): Locality of the attention.
        clamp (bool): Whether the attention has clamps.
    """

    grid: Tuple[int, int]
    batch: int
    heads: int
    width: int
    key_grid: Tuple[int, int] = (0, 0)
    locality: str = 'sum'
    clamp: bool = True

    def __post_init__(self):
        if self.key_grid == (0, 0):
            self.key_grid = self.grid


# Small grids for the interpreter, which takes about a second for a case. No
# grid fills the tiles of the kernels.
SMALL_ATTENTION = [
    Case((5, 7), 1, 1, 24),
    Case((6, 9), 1, 1, 40, (3, 4), 'product', clamp=False),
    Case((1, 11), 1, 1, 8, locality='1d'),
    Case((3, 4), 1, 1, 16, locality='none'),
]
SMALL_CONVOLUTION = [Case((5, 9), 1, 1, 6)]
# The stages of a VVT at 224 pixels, and odd grids.
ATTENTION = [
    *(
        Case((33, 47), 2, 2, 32, locality=name, clamp=clamp)
        for name in LOCALITIES
        for clamp in (True, False)
    ),
    Case((56, 56), 4, 1, 48),
    Case((28, 28), 4, 2, 40),
    Case((14, 14), 4, 5, 32),
    Case((7, 7), 4, 8, 32),
    Case((56, 56), 2, 1, 48, (28, 28)),
    Case((1, 997), 2, 1, 64),
    Case((40, 25), 2, 1, 128),
    *SMALL_ATTENTION,
]
CONVOLUTION = [
    Case((56, 56), 4, 1, 768),
    Case((28, 28), 4, 1, 1280),
    Case((7, 7), 4, 1, 2048),
    Case((33, 47), 2, 1, 100),
    *SMALL_CONVOLUTION,
]
Function = Callable[..., Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``|actual - expected| / |expected|``, computed in float64."""
    actual, expected = (t.detach().double() for t in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


def _values(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype
) -> List[Tensor]:
    """Compute the output and the gradients of all inputs in a dtype."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out))]


def compare(
    fast: Function,
    plain: Function,
    inputs: Dict[str, Tensor],
) -> Dict[str, Tuple[float, float]]:
    """Compare a kernel with a plain function in float64.

    Args:
        fast (Callable): Kernel, a function of the inputs.
        plain (Callable): The same in plain PyTorch.
        inputs (dict[str, Tensor]): Inputs by name, of one dtype.

    Returns:
        dict[str, tuple[float, float]]: Relative error and allowed relative
        error of the output and of the gradient of each input, by name.
    """
    tensors = list(inputs.values())
    dtype = tensors[0].dtype
    wants = _values(plain, tensors, torch.float64)
    plains = _values(plain, tensors, dtype)
    if not all(t.isfinite().all() for t in plains):
        plains = _values(plain, tensors, torch.bfloat16)
    errors = {}
    for name, ours, theirs, want in zip(
        ('output', *inputs), _values(fast, tensors, dtype), plains, wants
    ):
        double = 2 * relative_error(theirs, want)
        # min(CEILING, NaN) is the ceiling.
        allowed = max(FLOORS[dtype], min(CEILING, double))
        errors[name] = (relative_error(ours, want), allowed)
    return errors


def _attention_inputs(
    case: Case, dtype: torch.dtype, device: str
) -> Dict[str, Tensor]:
    n, m = (count_tokens(grid) for grid in (case.grid, case.key_grid))
    # The sums grow with the number of tokens. Smaller queries and keys keep
    # the results between the bounds of the clamps.
    scale = min(1.0, (96 / m) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        # (B, tokens, heads, d) -> (B, heads, tokens, d), as in a model
        torch.randn(
            case.batch, tokens, case.heads, case.width, generator=generator
        ).transpose(1, 2)
        for tokens in (n, m, m)
    )
    return dict(
        q=(scale * q).to(device, dtype),
        k=(scale * k).to(device, dtype),
        v=v.to(device, dtype),
    )


def count_tokens(grid: Tuple[int, int]) -> int:
    """Number of tokens of a grid ``(h, w)``."""
    return grid[0] * grid[1]


def attention_errors(
    case: Case, dtype: torch.dtype, device: str, backend: str = 'triton'
) -> List[KernelError]:
    """Compare the attention with the reference implementation.

    Args:
        case (Case): Sizes and settings.
        dtype (torch.dtype): Data type of the inputs.
        device (str): 'cuda', or 'cpu' for the interpreter.
        backend (str): Backend to test. Defaults to 'triton'.

    Returns:
        list[KernelError]: Errors of the output and the gradients.
    """

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vicinity_attention(
            q,
            k,
            v,
            case.grid,
            key_shape=case.key_grid,
            locality=case.locality,
            clamp=case.clamp,
            backend=backend,
        )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = (
            reference.linear_attention
            if case.clamp
            else reference.quadratic_attention
        )
        return function(q, k, v, case.grid, case.key_grid, case.locality, 1e-4)

    text = (
        f'{case.batch} x {case.heads} x {case.grid} x {case.width}, keys '
        f'{case.key_grid}, {case.locality}, '
        f'{"clamps" if case.clamp else "no clamps"}'
    )
    errors = compare(fast, plain, _attention_inputs(case, dtype, device))
    return [
        KernelError('attention', text, _name(dtype), name, *pair)
        for name, pair in errors.items()
    ]


def plain_dwconv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, grid: Tuple[int, int]
) -> Tensor:
    """Depthwise 3x3 convolution and exact GELU in standard operations.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)``.
        weight (Tensor): Weights of shape ``(C, 1, 3, 3)``.
        bias (Tensor): Bias of shape ``(C,)``.
        grid (tuple[int, int]): Grid ``(h, w)``, N = h * w.

    Returns:
        Tensor: Output of shape ``(B, N, C)``.
    """
    # (B, N, C) -> (B, h, w, C) -> (B, C, h, w), a channels-last view
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)
    x = F.gelu(F.conv2d(x, weight, bias, padding=1, groups=len(weight)))
    # (B, C, h, w) -> (B, h, w, C) -> (B, N, C)
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def convolution_errors(
    case: Case,
    dtype: torch.dtype,
    device: str,
    function: Function = dwconv_gelu,
) -> List[KernelError]:
    """Compare the convolution with GELU with standard operations.

    Args:
        case (Case): Grid, batch size and channels.
        dtype (torch.dtype): Data type of the inputs.
        device (str): 'cuda', or 'cpu' for the interpreter.
        function (Callable): Function to test. Defaults to the kernel.

    Returns:
        list[KernelError]: Errors of the output and the gradients.
    """
    generator = torch.Generator().manual_seed(0)
    c = case.width
    inputs = {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for name, shape in dict(
            x=(case.batch, count_tokens(case.grid), c),
            weight=(c, 1, 3, 3),
            bias=(c,),
        ).items()
    }
    errors = compare(
        lambda x, weight, bias: function(x, weight, bias, case.grid),
        lambda x, weight, bias: plain_dwconv_gelu(x, weight, bias, case.grid),
        inputs,
    )
    text = f'{case.batch} x {case.grid} x {c}'
    return [
        KernelError('convolution', text, _name(dtype), name, *pair)
        for name, pair in errors.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def kernel_errors(device: str, small: bool = False) -> List[KernelError]:
    """Compare all kernels in all dtypes.

    Args:
        device (str): 'cuda', or 'cpu' in a process with TRITON_INTERPRET=1.
        small (bool): Whether to use small cases only. Defaults to False.

    Returns:
        list[KernelError]: Errors of the outputs and the gradients.

    Raises:
        BackendError: If the kernels cannot run here. The message gives the
            reason.
    """
    errors: List[KernelError] = []
    attention, convolution = (
        (SMALL_ATTENTION, SMALL_CONVOLUTION)
        if small
        else (ATTENTION, CONVOLUTION)
    )
    # On a GPU, float32 convolutions use TF32 by default.
    with torch.backends.cudnn.flags(allow_tf32=False):
        for dtype in TRITON_DTYPES:
            for case in attention:
                errors += _guarded(attention_errors, case, dtype, device)
            for case in convolution:
                errors += _guarded(convolution_errors, case, dtype, device)
    return errors


def _guarded(
    function: Callable[..., List[KernelError]],
    case: Case,
    dtype: torch.dtype,
    device: str,
) -> List[KernelError]:
    try:
        return function(case, dtype, device)
    except UserError:  # this machine cannot run the kernels
        raise
    except Exception as error:  # a compiler or a launch may raise anything
        reason = f'raised {type(error).__name__}: {UserError(str(error))}'
        return [
            KernelError(
                function.__name__.removesuffix('_errors'),
                str(case),
                _name(dtype),
                reason,
                float('inf'),
                FLOORS[dtype],
            )
        ]


def interpreted_errors(timeout: float = 900) -> List[KernelError]:
    """Compare all kernels in Triton's interpreter, in a separate process.

    Triton reads TRITON_INTERPRET only once, when it is imported.

    Args:
        timeout (float): Limit in seconds. Defaults to 900.

    Returns:
        list[KernelError]: Errors of the outputs and the gradients, for small
        cases.

    Raises:
        UserError: If Triton is missing, or if the process fails.
    """
    if not HAS_TRITON:
        raise UserError('the kernels need Triton: pip install triton')
    try:
        done = subprocess.run(
            [sys.executable, '-m', __name__],
            env=dict(
                os.environ, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES=''
            ),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Triton's interpreter took longer than {timeout:.0f} s"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ['no message']
        raise UserError(f"Triton's interpreter failed: {lines[-1]}")
    return [
        KernelError(**line)
        for line in json.loads(done.stdout.strip().splitlines()[-1])
    ]


def patch_interpreter_once() -> None:
    """Make Triton's interpreter faster.

    Triton 3.6 patches its language again for each call between functions of a
    kernel, which is 30 times as slow as patching it once. This changes
    Triton, so call it only in a process that is started for the interpreter.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        home = self.fn.__globals__['__name__']
        if home.startswith('triton.') and home not in patched:
            patched.add(home)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    if hasattr(interpreter.InterpretedFunction, 'rewrite'):
        function: Any = interpreter.InterpretedFunction
        function.__call__ = call


if __name__ == '__main__':
    assert INTERPRETED
    patch_interpreter_once()
    print(json.dumps([asdict(e) for e in kernel_errors('cpu', small=True)]))
