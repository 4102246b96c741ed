"""Checks of a machine with a GPU: environment, bandwidth, operation times."""

import platform
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from ..arch import resolve_arch
from ..errors import UserError
from ..ops import dwconv_gelu, vicinity_attention
from ..ops.dispatch import HAS_TRITON
from .benchmark import DTYPES, alternate, machine_line
from .kernel_errors import plain_dwconv_gelu

PACKAGES = ('torch', 'triton', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet')
MIN_CAPABILITY = (8, 0)  # of the Triton kernels


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'missing'


def environment() -> Dict[str, str]:
    """Describe the machine, the GPU and the versions.

    Returns:
        dict[str, str]: Values by name. 'N/A' without a GPU.
    """
    found = {
        'system': platform.platform(),
        'machine': machine_line(),
        'CUDA of PyTorch': torch.version.cuda or 'N/A',
    }
    gpu = dict.fromkeys(
        ('GPU', 'compute capability', 'multiprocessors', 'GPU memory'), 'N/A'
    )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            'GPU': properties.name,
            'compute capability': f'{properties.major}.{properties.minor}',
            'multiprocessors': str(properties.multi_processor_count),
            'GPU memory': f'{properties.total_memory / 2**30:.1f} GiB',
        }
    return {**found, **gpu, **{name: _version(name) for name in PACKAGES}}


def missing() -> List[str]:
    """List what is missing on this machine for a complete check.

    Returns:
        list[str]: One sentence for each thing that is missing. Empty if the
        check can be complete.
    """
    reasons = []
    if not HAS_TRITON:
        reasons.append('Triton is not installed: no kernel is checked')
    for name in ('mmpretrain', 'mmdet'):
        if _version(name) == 'missing':
            reasons.append(f'{name} is not installed: its models are left out')
    if not torch.cuda.is_available():
        reasons.append(
            'PyTorch finds no GPU: the kernels are checked on small grids in '
            "Triton's interpreter, and nothing is measured on a GPU"
        )
    elif torch.version.hip:
        reasons.append('the Triton kernels require an NVIDIA GPU')
    elif torch.cuda.get_device_capability(0) < MIN_CAPABILITY:
        reasons.append(
            'the Triton kernels require compute capability 8.0 or higher'
        )
    return reasons


def can_run_kernels() -> bool:
    """Whether the Triton kernels can run on the GPU of this machine."""
    return (
        HAS_TRITON
        and torch.cuda.is_available()
        and not torch.version.hip
        and torch.cuda.get_device_capability(0) >= MIN_CAPABILITY
    )


def copy_bandwidth(device: str, size: int = 1 << 30, runs: int = 20) -> float:
    """Measure the bandwidth of the memory with a copy.

    Args:
        device (str): Device, such as 'cuda'.
        size (int): Bytes to copy, many times the size of the caches. Defaults
            to 1 GiB.
        runs (int): Number of timed runs. Defaults to 20.

    Returns:
        float: Bytes read and written per second, from the median time.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (timing,) = alternate([lambda: target.copy_(source)], runs, warmup=3)
    return 2 * size / timing.median


@dataclass
class OpTime:
    """Time of one operation, beside the time of its memory traffic.

    Attributes:
        operation (str): 'attention' or 'convolution'.
        stage (int): Stage of the model, 1 to 4.
        mode (str): 'forward', or 'train_step' for forward and backward.
        backend (str): 'triton', 'torch', or 'reference'.
        dtype (str): Data type of the tensors.
        shape (str): Shape of the input.
        runs (int): Number of timed runs, of ten calls each.
        seconds (float): Median time of a call.
        seconds_p20 (float): 20th percentile.
        seconds_p80 (float): 80th percentile.
        least_bytes (int): Bytes of the inputs and outputs, each read or
            written once.
        least_seconds (float): Time of these bytes at the bandwidth of a copy.
        machine (str): Description of the machine.
    """

    operation: str
    stage: int
    mode: str
    backend: str
    dtype: str
    shape: str
    runs: int
    seconds: float
    seconds_p20: float
    seconds_p80: float
    least_bytes: int
    least_seconds: float
    machine: str


CALLS = 10  # per timed run, so that the wait for the GPU has little weight
Step = Callable[[], object]


def _repeat(function: Callable[..., Tensor], inputs, grad) -> None:
    for _ in range(CALLS):
        if grad is None:
            with torch.no_grad():
                function(*inputs)
        else:
            torch.autograd.grad(function(*inputs), inputs, grad)


@dataclass
class _Operation:
    """Functions of tokens and weights, by backend.

    Attributes:
        tokens (list[tuple[int, ...]]): Shapes of the tokens, without the
            batch axis.
        weights (list[tuple[int, ...]]): Shapes of the weights.
        functions (dict[str, Callable]): Functions by backend.
    """

    tokens: List[Tuple[int, ...]]
    weights: List[Tuple[int, ...]]
    functions: Dict[str, Callable[..., Tensor]]


def _operations(
    arch: dict, stage: int, grid: Tuple[int, int]
) -> Dict[str, _Operation]:
    dims, heads = arch['embed_dims'][stage], arch['num_heads'][stage]
    n, d = grid[0] * grid[1], dims // arch['fr_ratios'][stage] // heads
    hidden = dims * arch['mlp_ratios'][stage]

    def attention(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # (B, N, heads, d) -> (B, heads, N, d)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return vicinity_attention(q, k, v, grid, backend=backend)

    return dict(
        attention=_Operation(
            [(n, heads, d)] * 3,
            [],
            {
                backend: partial(attention, backend)
                for backend in ('triton', 'torch', 'reference')
            },
        ),
        convolution=_Operation(
            [(n, hidden)],
            [(hidden, 1, 3, 3), (hidden,)],
            dict(
                triton=lambda x, w, b: dwconv_gelu(x, w, b, grid),
                torch=lambda x, w, b: plain_dwconv_gelu(x, w, b, grid),
            ),
        ),
    )


def op_times(
    device: str,
    bandwidth: float,
    arch: str = 'small',
    batch: int = 128,
    side: int = 224,
    dtype: str = 'bfloat16',
    backends: Sequence[str] = ('triton', 'torch', 'reference'),
    runs: int = 10,
) -> List[OpTime]:
    """Time the attention and the convolution with GELU of each stage.

    The backends are timed with interleaved runs.

    Args:
        device (str): Device, such as 'cuda'.
        bandwidth (float): Bytes per second, from :func:`copy_bandwidth`.
        arch (str): Architecture of the VVT. Defaults to 'small'.
        batch (int): Batch size. Defaults to 128.
        side (int): Height and width of the image, in pixels. Defaults to 224.
        dtype (str): Key of :data:`mmvvt.analysis.benchmark.DTYPES`. Defaults
            to 'bfloat16'.
        backends (Sequence[str]): Backends to time. Defaults to all.
        runs (int): Number of timed runs. Defaults to 10.

    Returns:
        list[OpTime]: Times, by stage, operation, mode and backend.

    Raises:
        UserError: If an argument is not allowed.
    """
    if batch < 1 or runs < 1:
        raise UserError(
            f'batch and runs must be 1 or more, got {batch} and {runs}'
        )
    settings = resolve_arch(arch)
    rows: List[OpTime] = []
    for stage in range(4):
        length = -(-side // 2 ** (stage + 2))  # strides 4 to 32, rounded up
        grid = (length, length)
        for name, operation in _operations(settings, stage, grid).items():
            shapes = [(batch, *shape) for shape in operation.tokens]
            inputs = [
                torch.randn(
                    shape, device=device, dtype=DTYPES[dtype]
                ).requires_grad_()
                for shape in (*shapes, *operation.weights)
            ]
            functions = operation.functions
            used = [backend for backend in backends if backend in functions]
            with torch.no_grad():
                grad = torch.randn_like(functions[used[-1]](*inputs))
            read = sum(t.numel() * t.element_size() for t in inputs)
            out = grad.numel() * grad.element_size()
            for mode, least in (
                ('forward', read + out),
                # The backward pass reads inputs and gradient again, and
                # writes one gradient per input.
                ('train_step', 3 * read + 2 * out),
            ):
                steps: List[Step] = [
                    partial(
                        _repeat,
                        functions[backend],
                        inputs,
                        grad if mode == 'train_step' else None,
                    )
                    for backend in used
                ]
                for backend, t in zip(used, alternate(steps, runs)):
                    rows.append(
                        OpTime(
                            name,
                            stage + 1,
                            mode,
                            backend,
                            dtype,
                            ' x '.join(map(str, inputs[0].shape)),
                            runs,
                            t.median / CALLS,
                            t.low / CALLS,
                            t.high / CALLS,
                            least,
                            least / bandwidth,
                            machine_line(),
                        )
                    )
    return rows
