"""Time backbones against each other in one process, in alternation."""

import csv
import multiprocessing
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmengine.registry import MODELS
from torch import Tensor

from ..arch import ARCH_SETTINGS
from ..errors import UserError
from .memory import peak_memory_gib

# Other backbones of 23 to 29 M parameters, four stages of strides 4 to 32,
# as the installed packages have them.
PEERS: Dict[str, dict] = {
    'swin-tiny': dict(
        type='mmpretrain.SwinTransformer',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
    ),
    'convnext-tiny': dict(
        type='mmpretrain.ConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
    ),
    'pvtv2-b2': dict(
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
    ),
    'twins-svt-small': dict(
        type='mmpretrain.SVT', arch='small', out_indices=(0, 1, 2, 3)
    ),
    'resnet-50': dict(
        type='mmpretrain.ResNet', depth=50, out_indices=(0, 1, 2, 3)
    ),
}
# '-plain' is the plain formula of the official code.
VVTS = tuple(
    f'vvt-{arch}{end}' for arch in ARCH_SETTINGS for end in ('', '-plain')
)
NAMES = (*VVTS, *PEERS)
MODES = ('forward', 'train_step')
DTYPES = dict(
    float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16
)


def build(name: str) -> nn.Module:
    """A backbone with random weights, the same at each call.

    Args:
        name (str): One of :data:`NAMES`.

    Returns:
        nn.Module: Gives a tuple of four feature maps; on the GPU where there
        is one.

    Raises:
        UserError: If there is no such name.
        UserError: If the package that has it is not installed.
    """
    if name not in NAMES:
        raise UserError(f'a model is one of {", ".join(NAMES)}, got {name!r}')
    if name in VVTS:
        import mmvvt.models  # noqa: F401, registers

        arch = name.split('-')[1]
        backend = 'reference' if name.endswith('-plain') else 'auto'
        config = dict(
            type='VVT',
            arch=arch,
            out_indices=(0, 1, 2, 3),
            attn_cfg=dict(backend=backend),
        )
    else:
        config = PEERS[name]
        package = config['type'].split('.')[0]
        try:
            import_module(f'{package}.models')
        except ImportError as error:
            raise UserError(
                f'{name} needs the package {package}: {error}'
            ) from error
    torch.manual_seed(0)
    model = MODELS.build(config)
    return model.cuda() if torch.cuda.is_available() else model


@dataclass
class Timing:
    """Seconds of one side.

    Attributes:
        median (float): Middle of the runs.
        low (float): 20th percentile.
        high (float): 80th percentile.
    """

    median: float
    low: float
    high: float


def machine_line() -> str:
    """Processor or GPU, threads, and versions, for the head of a table."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
        try:
            with open('/proc/cpuinfo', encoding='utf-8') as file:
                device = next(
                    line.split(':', 1)[1].strip()
                    for line in file
                    if line.startswith('model name')
                )
        except (OSError, StopIteration):
            pass  # not Linux
    return (
        f'{device}, {torch.get_num_threads()} threads, Python '
        f'{platform.python_version()}, torch {torch.__version__}'
    )


def autocast(dtype: str):
    """The context that a dtype of :data:`DTYPES` stands for."""
    if dtype == 'float32':
        return nullcontext()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return torch.autocast(device, DTYPES[dtype])


def check_same(
    first: nn.Module, second: nn.Module, image: Tensor, tolerance: float
) -> float:
    """Hold the outputs of two models against each other.

    Args:
        first (nn.Module): A backbone, gives a tuple of feature maps.
        second (nn.Module): Another one with the same weights.
        image (Tensor): ``(B, C, H, W)``.
        tolerance (float): Largest relative error allowed.

    Returns:
        float: Largest relative error ``|a - b| / |b|`` over the outputs.

    Raises:
        AssertionError: If the error is larger, or not a number.
    """
    with torch.no_grad():
        error = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(first(image), second(image))
        )
    if not error <= tolerance:
        raise AssertionError(
            f'the two sides differ by {error:.1e}, more than {tolerance:.0e}: '
            'not worth timing'
        )
    return error


def check_finite(model: nn.Module, image: Tensor) -> None:
    """Raise an AssertionError unless four finite maps come out, of strides
    4, 8, 16 and 32."""
    with torch.no_grad():
        outs = model(image)
    sides = [out.shape[-1] for out in outs]
    if sides != [-(-image.shape[-1] // stride) for stride in (4, 8, 16, 32)]:
        raise AssertionError(
            f'feature maps of {sides} pixels a side for an '
            f'image of {image.shape[-1]}'
        )
    if not all(out.isfinite().all() for out in outs):
        raise AssertionError('a feature map is not finite')


def forward(model: nn.Module, image: Tensor, dtype: str = 'float32') -> None:
    """One forward pass without gradients, in evaluation mode."""
    model.eval()
    with torch.no_grad(), autocast(dtype):
        model(image)


def train_step(
    model: nn.Module, image: Tensor, dtype: str = 'float32'
) -> None:
    """One forward and backward pass, in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    with autocast(dtype):
        loss = sum(out.float().mean() for out in model(image))
    loss.backward()


def _peak(name: str, batch: int, side: int, mode: str, dtype: str) -> float:
    step = dict(forward=forward, train_step=train_step)[mode]
    model = build(name)
    image = torch.randn(batch, 3, side, side)
    if torch.cuda.is_available():
        image = image.cuda()
        torch.cuda.reset_peak_memory_stats()
    step(model, image, dtype)
    return peak_memory_gib()


def peak_memory(
    name: str, batch: int, side: int, mode: str, dtype: str
) -> float:
    """Peak memory of one pass, in GiB, measured in a process of its own.

    Of the GPU's tensors; without a GPU, of the whole process, with the
    libraries (some 0.5 GiB) and the weights.

    Raises:
        UserError: Without a GPU, on a system other than Linux.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_peak, (name, batch, side, mode, dtype))


def alternate(
    sides: List[Callable[[], None]], runs: int, warmup: int = 1
) -> List[Timing]:
    """Time functions in turn, so that drift of the machine hits all alike.

    Args:
        sides (list[Callable]): What to time.
        runs (int): Counted runs of each.
        warmup (int): Runs of each before. Defaults to 1.

    Returns:
        list[Timing]: One for each side, in their order.
    """
    seconds: List[List[float]] = [[] for _ in sides]
    for run in range(warmup + runs):
        for side, times in zip(sides, seconds):
            _wait()
            start = time.perf_counter()
            side()
            _wait()
            if run >= warmup:
                times.append(time.perf_counter() - start)
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return [
        Timing(
            *torch.tensor(times, dtype=torch.float64)
            .quantile(quantiles)
            .tolist()
        )
        for times in seconds
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parse_size(text: str) -> Tuple[int, int]:
    """``BxS`` or ``B x S``: batch and side of a square image.

    Raises:
        UserError: If it is anything else.
    """
    parts = text.lower().split('x')
    if len(parts) != 2 or not all(p.strip().isdigit() for p in parts):
        raise UserError(f'a size is BATCHxSIDE, such as 4x224, got {text!r}')
    return int(parts[0]), int(parts[1])


# What an operation of PyTorch's profiler does, by the start of its name.
KINDS = {
    'matrix products': ('addmm', 'mm', 'bmm', 'baddbmm'),
    'convolutions': (
        'mkldnn_convolution',
        'convolution',
        'cudnn_conv',
        '_conv',
        'thnn_conv',
        'slow_conv',
    ),
    'GELU': ('gelu',),
    'copies': ('copy_', 'cat', 'clone', 'fill_', 'zero_', 'constant_pad'),
    'norms': ('native_layer_norm', 'native_batch_norm', 'layer_norm'),
    'clamps': ('clamp', 'sign', 'abs', 'ge', 'le', 'logical_and', 'sgn'),
}
OTHER = 'other'


def kind_of(operation: str) -> str:
    """Which of :data:`KINDS` an operation belongs to, or :data:`OTHER`."""
    name = operation.split('::')[-1]
    for kind, starts in KINDS.items():
        # 'le' is not 'leaky_relu': short names stand for themselves
        if any(
            name.startswith(start) if len(start) > 3 else name == start
            for start in starts
        ):
            return kind
    return OTHER


def profile(step: Callable[[], None]) -> Dict[str, float]:
    """Seconds that one call spends in each kind of operation, on the CPU.

    A convolution of one pixel is a matrix product, and counted as one.

    Args:
        step (Callable): What to run; it runs twice, the first uncounted.

    Returns:
        dict[str, float]: Seconds by kind, the longest first. The profiler's
        own time makes their sum more than the step takes without it.
    """
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, record_shapes=True
    ) as recorded:
        step()
    seconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for event in recorded.key_averages(group_by_input_shape=True):
        kind = kind_of(event.key)
        shapes = event.input_shapes
        if kind == 'convolutions' and any(
            len(shape) == 4 and list(shape[2:]) == [1, 1]
            for shape in shapes[1:3]
        ):
            kind = 'matrix products'
        seconds[kind] += event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@dataclass
class Row:
    """One line of a benchmark's CSV file.

    Attributes:
        model (str): One of :data:`NAMES`.
        mode (str): 'forward' or 'train_step'.
        engine (str): 'eager' or 'compiled'.
        dtype (str): 'float32', or what autocast is set to.
        batch (int): Images.
        side (int): Of an image, in pixels.
        runs (int): Counted runs.
        seconds (float): Median.
        seconds_p20 (float): 20th percentile.
        seconds_p80 (float): 80th percentile.
        peak_gib (float, optional): See :func:`peak_memory`; None where it
            was not measured.
        machine (str): From :func:`machine_line`.
    """

    model: str
    mode: str
    engine: str
    dtype: str
    batch: int
    side: int
    runs: int
    seconds: float
    seconds_p20: float
    seconds_p80: float
    peak_gib: Optional[float]
    machine: str


def write_csv(path: str, rows: List[Row]) -> None:
    """Write all rows with a head line."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: f'{value:.4g}' if isinstance(value, float) else value
                    for key, value in asdict(row).items()
                }
            )


def read_csv(path: str) -> List[Row]:
    """Rows of a file of :func:`write_csv`.

    Raises:
        UserError: If the file has other columns, or no rows.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    names = [field.name for field in fields(Row)]
    if not lines or list(lines[0]) != names:
        raise UserError(
            f'{path} is not a file of benchmark.py: its columns '
            f'must be {", ".join(names)}'
        )
    return [
        Row(
            **{
                **line,
                'batch': int(line['batch']),
                'side': int(line['side']),
                'runs': int(line['runs']),
                'seconds': float(line['seconds']),
                'seconds_p20': float(line['seconds_p20']),
                'seconds_p80': float(line['seconds_p80']),
                'peak_gib': float(line['peak_gib'])
                if line['peak_gib']
                else None,
            }
        )
        for line in lines
    ]
