"""Benchmark backbones in one process, with interleaved runs."""

import csv
import multiprocessing
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.registry import MODELS
from torch import Tensor

from ..arch import ARCH_SETTINGS
from ..errors import UserError
from ..fileio import atomic_write
from ..ops.processor import processor_field
from .memory import peak_memory_gib

# Other backbones with 23 to 29 M parameters and four stages of strides 4 to
# 32, as implemented in the installed packages.
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
# '-plain' is the reference implementation, as in the official code; '-triton'
# uses the Triton kernels, which require a GPU.
BACKENDS = {'': 'auto', '-plain': 'reference', '-triton': 'triton'}
VVTS = tuple(f'vvt-{arch}{end}' for arch in ARCH_SETTINGS for end in BACKENDS)
NAMES = (*VVTS, *PEERS)
MODES = ('forward', 'train_step')
DTYPES = dict(
    float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16
)


def build(name: str) -> nn.Module:
    """Build a backbone with random weights from a fixed seed.

    Args:
        name (str): One of :data:`NAMES`.

    Returns:
        nn.Module: Backbone that returns a tuple of four feature maps. It is
        moved to the GPU if there is one.

    Raises:
        UserError: If the name is unknown.
        UserError: If the package that provides the model is not installed.
    """
    if name not in NAMES:
        raise UserError(
            f'name must be one of {", ".join(NAMES)}, got {name!r}'
        )
    if name in VVTS:
        import mmvvt.models  # noqa: F401, registers

        _, arch, *end = name.split('-')
        backend = BACKENDS[f'-{end[0]}' if end else '']
        config: Dict[str, Any] = dict(
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
    """Timing of one function, in seconds per run.

    Attributes:
        median (float): Median of the runs.
        low (float): 20th percentile.
        high (float): 80th percentile.
    """

    median: float
    low: float
    high: float


def machine_line(threads: Optional[int] = None) -> str:
    """Describe the device, the number of threads and the versions.

    Args:
        threads (int, optional): Number of threads. Defaults to None, that of
            this process.

    Returns:
        str: One line.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = (
            processor_field('model name')
            or platform.processor()
            or platform.machine()
        )
        # Virtual machines shorten the name: processors of very different
        # speed are called 'AMD EPYC'.
        details = [torch.backends.cpu.get_cpu_capability()]
        family, model = processor_field('cpu family'), processor_field('model')
        if family and model:  # of x86 processors
            details.append(f'family {family}, model {model}')
        device = f'{device} ({", ".join(details)})'
    return (
        f'{device}, {threads or torch.get_num_threads()} threads, Python '
        f'{platform.python_version()}, torch {torch.__version__}'
    )


def autocast(dtype: str):
    """Return the autocast context for a dtype of :data:`DTYPES`."""
    if dtype == 'float32':
        return nullcontext()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return torch.autocast(device, DTYPES[dtype])


def check_same(
    first: nn.Module, second: nn.Module, image: Tensor, tolerance: float
) -> float:
    """Compare the outputs of two models.

    Args:
        first (nn.Module): Backbone that returns a tuple of feature maps.
        second (nn.Module): Another backbone with the same weights.
        image (Tensor): Input of shape ``(B, C, H, W)``.
        tolerance (float): Maximum relative error.

    Returns:
        float: Maximum relative error ``|a - b| / |b|`` over the outputs.

    Raises:
        AssertionError: If the error exceeds the tolerance or is NaN.
    """
    with torch.no_grad():
        error = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(first(image), second(image))
        )
    if not error <= tolerance:
        raise AssertionError(
            f'the outputs of the two models differ by {error:.1e}, allowed is '
            f'a relative error of {tolerance:.0e}'
        )
    return error


def check_finite(model: nn.Module, image: Tensor) -> None:
    """Check that a model returns finite feature maps at strides 4 to 32.

    Args:
        model (nn.Module): Backbone that returns a tuple of feature maps.
        image (Tensor): Input of shape ``(B, C, H, W)``.

    Raises:
        AssertionError: If the feature maps do not have strides 4, 8, 16 and
            32, or contain infinite values or NaN.
    """
    with torch.no_grad():
        outs = model(image)
    sides = [out.shape[-1] for out in outs]
    if sides != [-(-image.shape[-1] // stride) for stride in (4, 8, 16, 32)]:
        raise AssertionError(
            f'the feature maps have widths of {sides} pixels for an image '
            f'with a width of {image.shape[-1]} pixels'
        )
    if not all(out.isfinite().all() for out in outs):
        raise AssertionError('a feature map is not finite')


def forward(model: nn.Module, image: Tensor, dtype: str = 'float32') -> None:
    """Run a forward pass in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad(), autocast(dtype):
        model(image)


def train_step(
    model: nn.Module, image: Tensor, dtype: str = 'float32'
) -> None:
    """Run a forward and a backward pass in training mode."""
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
    """Measure the peak memory of one step in a separate process.

    With a GPU, this is the peak memory of the tensors on it. Without a GPU,
    it is the peak memory of the process, including the libraries (about 0.5
    GiB) and the weights.

    Args:
        name (str): One of :data:`NAMES`.
        batch (int): Batch size.
        side (int): Height and width of the images, in pixels.
        mode (str): One of :data:`MODES`.
        dtype (str): One of :data:`DTYPES`.

    Returns:
        float: Peak memory in GiB.

    Raises:
        UserError: If there is no GPU and the system is not Linux.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_peak, (name, batch, side, mode, dtype))


def alternate(
    sides: Sequence[Callable[[], Any]],
    runs: int,
    warmup: int = 1,
    pause: float = 0.0,
) -> List[Timing]:
    """Time functions with interleaved runs.

    The functions are called in turn, so that changes in the speed of the
    machine affect all of them equally.

    Args:
        sides (list[Callable]): Functions to time.
        runs (int): Number of timed runs of each function.
        warmup (int): Number of warm-up runs of each function. Defaults to 1.
        pause (float): Seconds to sleep before each run. The idle threads of
            some libraries keep a processor busy for a while after a run.
            Defaults to 0.

    Returns:
        list[Timing]: Timing of each function, in the same order.
    """
    seconds: List[List[float]] = [[] for _ in sides]
    for run in range(warmup + runs):
        for side, times in zip(sides, seconds):
            _wait()
            if pause:
                time.sleep(pause)
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
    """Parse a size such as ``4x224`` or ``4 x 224``.

    Args:
        text (str): Batch size and side of a square image.

    Returns:
        tuple[int, int]: Batch size, and side in pixels.

    Raises:
        UserError: If the text has another format.
    """
    parts = text.lower().split('x')
    if len(parts) != 2 or not all(p.strip().isdigit() for p in parts):
        raise UserError(
            'a size must have the form BATCHxSIDE, such as 4x224, '
            f'got {text!r}'
        )
    return int(parts[0]), int(parts[1])


# Kinds of operations, by the prefix of their name in PyTorch's profiler.
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
    # Compiled kernels, see mmvvt.ops.native
    'attention kernels': ('sum_products', 'attend'),
    'convolution and GELU': ('depthwise',),
}
KERNEL = 'mmvvt_'
OTHER = 'other'


def kind_of(operation: str) -> str:
    """Return the kind of an operation: of :data:`KINDS` or :data:`OTHER`."""
    name = operation.split('::')[-1]
    if name.startswith(KERNEL):
        name = name[len(KERNEL) :]
    for kind, starts in KINDS.items():
        # Short names must match exactly: 'le' is not 'leaky_relu'.
        if any(
            name.startswith(start) if len(start) > 3 else name == start
            for start in starts
        ):
            return kind
    return OTHER


def profile(step: Callable[[], None]) -> Dict[str, float]:
    """Profile the CPU time of one call by kind of operation.

    A convolution with a kernel size of 1 is counted as a matrix product.

    Args:
        step (Callable): Function to profile. It is called twice; the first
            call is a warm-up.

    Returns:
        dict[str, float]: Seconds by kind, in descending order. Their sum is
        larger than the time of the step because of the profiler's overhead.
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
    """One row of a benchmark's CSV file.

    Attributes:
        model (str): One of :data:`NAMES`.
        mode (str): 'forward' or 'train_step'.
        engine (str): One of :data:`mmvvt.analysis.engines.ENGINES`.
        dtype (str): 'float32', or the dtype of autocast. For OpenVINO, the
            precision of its inference.
        batch (int): Batch size.
        side (int): Height and width of the images, in pixels.
        runs (int): Number of timed runs.
        seconds (float): Median time of a run.
        seconds_p20 (float): 20th percentile.
        seconds_p80 (float): 80th percentile.
        peak_gib (float, optional): Peak memory in GiB, see
            :func:`peak_memory` and
            :func:`mmvvt.analysis.engines.peak_memory_of_file`. None if it was
            not measured.
        machine (str): Description returned by :func:`machine_line`.
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

    @property
    def label(self) -> str:
        """The model, and the engine unless it is PyTorch."""
        if self.engine == 'pytorch':
            return self.model
        return f'{self.model} {self.engine}'


# Earlier names of engines in CSV files.
OLD_ENGINES = dict(eager='pytorch')


def write_csv(path: str, rows: Sequence[Any]) -> None:
    """Write rows to a CSV file with a header.

    Args:
        path (str): Path of the file. An existing file is replaced once the
            new one is complete.
        rows (Sequence): Instances of one dataclass, such as :class:`Row`, at
            least one.

    Raises:
        WriteError: If the file cannot be written.
    """
    names = [field.name for field in fields(rows[0])]
    with atomic_write(path) as temporary:
        with open(temporary, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {
                        key: f'{value:.4g}'
                        if isinstance(value, float)
                        else value
                        for key, value in asdict(row).items()
                    }
                )


def read_csv(path: str) -> List[Row]:
    """Read a CSV file written by :func:`write_csv`.

    Earlier versions wrote 'eager' for the engine 'pytorch'.

    Args:
        path (str): Path of the CSV file.

    Returns:
        list[Row]: Rows of the file.

    Raises:
        UserError: If the file cannot be read, has other columns or has no
            rows.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    names = [field.name for field in fields(Row)]
    if not lines or list(lines[0]) != names:
        raise UserError(
            f'{path} was not written by benchmark.py: its columns '
            f'must be {", ".join(names)}'
        )
    return [
        Row(
            model=line['model'],
            mode=line['mode'],
            engine=OLD_ENGINES.get(line['engine'], line['engine']),
            dtype=line['dtype'],
            batch=int(line['batch']),
            side=int(line['side']),
            runs=int(line['runs']),
            seconds=float(line['seconds']),
            seconds_p20=float(line['seconds_p20']),
            seconds_p80=float(line['seconds_p80']),
            peak_gib=float(line['peak_gib']) if line['peak_gib'] else None,
            machine=line['machine'],
        )
        for line in lines
    ]
