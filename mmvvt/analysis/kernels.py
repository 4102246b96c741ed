"""What the compiler shows about the Triton kernels, without a GPU.

Each launch of a kernel is compiled for a GPU architecture instead of being
run. The resources are read from the binary, and the bytes that a launch loads
and stores follow from its arguments.
"""

import math
import os
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.dispatch import HAS_TRITON, INTERPRETED

DTYPES = dict(
    bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32
)
_TYPES = {
    torch.float32: '*fp32',
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
}


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor.

    They are published in the table *Technical Specifications per Compute
    Capability* of NVIDIA's CUDA C++ Programming Guide; the number of
    multiprocessors in the white papers of the A100 and the H100.

    Attributes:
        capability (int): Compute capability times 10.
        multiprocessors (int): Number of multiprocessors of the device (SXM).
        shared (int): Shared memory in bytes.
        registers (int): Number of 32-bit registers.
        warps (int): Maximum number of resident warps.
        blocks (int): Maximum number of resident blocks.
        reserved (int): Bytes of shared memory that the system takes of each
            block.
    """

    capability: int
    multiprocessors: int
    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    reserved: int = 1024


ARCHITECTURES = dict(
    sm_80=Architecture(80, 108, 164 * 1024),
    sm_90=Architecture(90, 132, 228 * 1024),
)


def occupancy(
    architecture: Architecture, warps: int, registers: int, shared: int
) -> float:
    """Resident warps of a multiprocessor, relative to the maximum.

    Registers are allocated to a warp in units of 256, and warps in groups of
    four, one for each partition of the multiprocessor, as in the occupancy
    calculator of NVIDIA Nsight Compute.

    Args:
        architecture (Architecture): Limits of the multiprocessor.
        warps (int): Warps of a block.
        registers (int): Registers of a thread.
        shared (int): Shared memory of a block in bytes.

    Returns:
        float: Occupancy in [0, 1]. 0 if no block fits.
    """
    unit = math.ceil(max(registers, 1) * 32 / 256) * 256
    by_registers = architecture.registers // unit // 4 * 4 // warps
    # Shared memory is allocated in units of 128 bytes.
    block = math.ceil((shared + architecture.reserved) / 128) * 128
    blocks = min(
        by_registers,
        architecture.shared // block,
        architecture.warps // warps,
        architecture.blocks,
    )
    return blocks * warps / architecture.warps


@dataclass
class Launch:
    """One compiled launch of a kernel.

    Attributes:
        kernel (str): Name of the kernel.
        grid (tuple[int, ...]): Number of programs along each axis.
        arguments (dict[str, Any]): Arguments by name.
        warps (int): Warps of a program.
        shared (int): Shared memory of a program in bytes.
        binary (bytes): Compiled code.
    """

    kernel: str
    grid: Tuple[int, ...]
    arguments: Dict[str, Any]
    warps: int
    shared: int
    binary: bytes

    @property
    def tensors(self) -> Dict[str, Tensor]:
        """Arguments that are tensors, by name."""
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor)
        }

    @property
    def least_bytes(self) -> int:
        """Bytes of all tensors of the launch, each counted once."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def requested_bytes(self) -> int:
        """Bytes of all loads and stores, including those from caches.

        Elements outside of a tensor are masked and not counted.
        """
        elements = _ELEMENTS[self.kernel](self.arguments, self.grid)
        return sum(
            elements.get(name, t.numel()) * t.element_size()
            for name, t in self.tensors.items()
        )


def _blocks(a: Dict[str, Any]) -> int:
    return math.ceil(a['d'] / a['E'])


def _sums_of_attention(a, grid) -> Dict[str, int]:
    # Each block of columns of y reads all columns of x.
    elements = dict(x_ptr=a['x_ptr'].numel() * _blocks(a))
    if a['WEIGHTED']:
        elements['weight_ptr'] = a['weight_ptr'].numel() * _blocks(a)
    return elements


def _sums_elements(a, pairs: int, loads: int, key_loads: int) -> int:
    """Elements loaded from the sums of all heads.

    Args:
        a (dict): Arguments of the launch.
        pairs (int): Number of heads of all images.
        loads (int): How often a head loads all matrices ``S_j``.
        key_loads (int): How often a head loads all vectors ``s_j``.

    Returns:
        int: Number of elements.
    """
    d, factors = a['d'], a['FACTORS']
    return pairs * factors * d * (d * loads + key_loads)


def _output(a, grid) -> Dict[str, int]:
    blocks, chunks = _blocks(a), a['chunks']
    tiles = math.ceil(a['tokens'] / a['TOKENS'])
    pairs = grid[0] // chunks
    return dict(
        q_ptr=a['q_ptr'].numel() * blocks,
        sums_ptr=_sums_elements(
            a, pairs, chunks if a['HOIST'] else tiles, tiles * blocks
        ),
    )


def _gradient(name: str) -> Callable[..., Dict[str, int]]:
    # Each tile loads the S_j twice, for the product and its transposed form.
    return lambda a, grid: {
        name: _sums_elements(
            a, grid[0] // a['tiles'], 2 * a['tiles'], a['tiles']
        )
    }


def _shifted(a, images: int) -> int:
    """Elements of x that are loaded for the rows of all strips."""
    # Rows at the border between two strips are loaded for both of them.
    rows = a['h'] + 2 * (a['down'] - 1)
    # Left, middle and right columns; those outside of the grid are masked.
    left = min(a['w'], a['across'] * a['COLUMNS'] - 1)
    return images * rows * (left + a['w'] + a['w'] - 1) * a['C']


def _convolve(a, grid) -> Dict[str, int]:
    strips = grid[0]
    images = strips // (a['across'] * a['down'])
    elements = dict(
        x_ptr=_shifted(a, images),
        weight_ptr=strips * a['weight_ptr'].numel(),
        bias_ptr=strips * a['bias_ptr'].numel() if a['GELU'] else 0,
    )
    return elements


def _sum_gradient(a, grid) -> Dict[str, int]:
    images = a['items'] // (a['across'] * a['down'])
    return dict(
        x_ptr=_shifted(a, images),
        weight_ptr=grid[0] * a['weight_ptr'].numel(),
        bias_ptr=grid[0] * a['bias_ptr'].numel(),
    )


# Functions from arguments and grid to the number of elements that a launch
# loads or stores, for tensors of which this is not all elements once.
_ELEMENTS: Dict[str, Callable[..., Dict[str, int]]] = dict(
    _partial_sums=_sums_of_attention,
    _output=_output,
    _query_gradient=_gradient('sums_ptr'),
    _key_gradient=_gradient('dsums_ptr'),
    _add_chunks=lambda a, grid: {},
    _convolve=_convolve,
    _sum_gradient=_sum_gradient,
)


class _Compiler:
    """Replacement for a kernel that compiles each launch, without running it.

    Args:
        kernel: The kernel, a function decorated with ``triton.jit``.
        architecture (Architecture): What to compile for.
        launches (list[Launch]): List to which each launch is appended.
    """

    def __init__(self, kernel, architecture, launches):
        self.kernel = kernel
        self.architecture = architecture
        self.launches = launches

    def __getitem__(self, grid):
        assert all(n >= 1 for n in grid)
        return lambda *args, **kwargs: self._compile(grid, args, kwargs)

    def _compile(self, grid, args, kwargs):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {
            name: kwargs.pop(name)
            for name in ('num_warps', 'num_stages')
            if name in kwargs
        }
        kwargs.update(zip(self.kernel.arg_names, args))
        # As in a launch: tensors are aligned to 16 bytes, and numbers that
        # are 1 or multiples of 16 are specialised.
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = kwargs[parameter.name]
            general = parameter.do_not_specialize
            if isinstance(value, Tensor):
                kind, aligned = _TYPES[value.dtype], True
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
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget('cuda', self.architecture.capability, 32),
            options=options,
        )
        self.launches.append(
            Launch(
                self.kernel.__name__,
                tuple(grid),
                kwargs,
                compiled.metadata.num_warps,
                compiled.metadata.shared,
                compiled.asm['cubin'],
            )
        )


@contextmanager
def compiled_launches(
    architecture: Architecture = ARCHITECTURES['sm_90'],
) -> Iterator[List[Launch]]:
    """Compile each launch of a kernel inside the block, without running it.

    The tensors may be on the CPU or on the meta device. The outputs have the
    right shapes and arbitrary values.

    Args:
        architecture (Architecture): What to compile for. Defaults to sm_90.

    Yields:
        list[Launch]: Launches inside the block, in order.

    Raises:
        UserError: If Triton is missing or its interpreter is on.
    """
    if not HAS_TRITON or INTERPRETED:
        raise UserError(
            'compiling the kernels requires Triton, and TRITON_INTERPRET must '
            'not be set to 1'
        )
    from ..ops.triton_kernels import attention, common, dwconv_gelu

    launches: List[Launch] = []
    changes: Dict[Tuple[Any, str], Any] = {}
    for module, names in (
        (
            attention,
            ('_partial_sums', '_output', '_query_gradient', '_key_gradient'),
        ),
        (common, ('_add_chunks',)),
        (dwconv_gelu, ('_convolve', '_sum_gradient')),
    ):
        for name in names:
            changes[module, name] = _Compiler(
                getattr(module, name), architecture, launches
            )
    for module in (attention, dwconv_gelu):
        changes[module, 'num_programs'] = lambda device: (
            architecture.multiprocessors
        )
    before = {key: getattr(*key) for key in changes}
    try:
        for (module, name), value in changes.items():
            setattr(module, name, value)
        yield launches
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def attention_launches(
    architecture: Architecture,
    dtype: torch.dtype,
    d: int,
    heads: int = 1,
    side: int = 56,
    batch: int = 64,
) -> Tuple[List[Launch], List[Launch]]:
    """Compile a forward and a backward pass of the attention.

    The locality is 'sum', with clamps, as in the published models.

    Args:
        architecture (Architecture): What to compile for.
        dtype (torch.dtype): float32, bfloat16 or float16.
        d (int): Channels per head, at most 128.
        heads (int): Number of heads. Defaults to 1.
        side (int): Height and width of the grid in tokens. Defaults to 56.
        batch (int): Batch size. Defaults to 64.

    Returns:
        tuple[list[Launch], list[Launch]]: Launches of the forward pass and of
        the backward pass.
    """
    from ..ops.triton_kernels import attention

    # (B, N, heads, d) -> (B, heads, N, d), as in a model
    q, k, v = (
        torch.empty(
            batch, side**2, heads, d, dtype=dtype, device='meta'
        ).transpose(1, 2)
        for _ in range(3)
    )
    grid = [side, side]
    settings = (grid, grid, 'sum', True, 1e-4)
    with compiled_launches(architecture) as forward:
        out, sums = attention._forward._init_fn(q, k, v, *settings)
    with compiled_launches(architecture) as backward:
        attention._backward._init_fn(out, q, k, v, sums, *settings)
    return forward, backward


def convolution_launches(
    architecture: Architecture,
    dtype: torch.dtype,
    channels: int,
    side: int = 56,
    batch: int = 64,
) -> Tuple[List[Launch], List[Launch]]:
    """Compile a forward and a backward pass of the convolution with GELU.

    The weights are float32, as under autocast.

    Args:
        architecture (Architecture): What to compile for.
        dtype (torch.dtype): float32, bfloat16 or float16.
        channels (int): Number of channels.
        side (int): Height and width of the grid in tokens. Defaults to 56.
        batch (int): Batch size. Defaults to 64.

    Returns:
        tuple[list[Launch], list[Launch]]: Launches of the forward pass and of
        the backward pass.
    """
    from ..ops.triton_kernels import dwconv_gelu

    x = torch.empty(batch, side**2, channels, dtype=dtype, device='meta')
    weight = torch.empty(channels, 1, 3, 3, device='meta')
    bias = torch.empty(channels, device='meta')
    with compiled_launches(architecture) as forward:
        y = dwconv_gelu._forward._init_fn(x, weight, bias, side, side)
    with compiled_launches(architecture) as backward:
        dwconv_gelu._backward._init_fn(y, x, weight, bias, side, side)
    return forward, backward


@dataclass
class Resources:
    """Resources of a compiled kernel.

    Attributes:
        registers (int): Registers of a thread.
        spills (int): Bytes of a thread's stack, to which registers are
            spilled. The kernels have no other local memory.
    """

    registers: int
    spills: int


def resources(binary: bytes) -> Resources:
    """Read the resources of a kernel from its binary.

    Args:
        binary (bytes): Compiled code of one kernel (cubin).

    Returns:
        Resources: Its registers and spills.

    Raises:
        UserError: If ``cuobjdump``, which Triton includes, cannot read it.
    """
    import triton

    tool = os.path.join(
        os.path.dirname(triton.__file__), 'backends/nvidia/bin/cuobjdump'
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'kernel.cubin')
        with open(path, 'wb') as file:
            file.write(binary)
        try:
            done = subprocess.run(
                [tool, '-res-usage', path], capture_output=True, text=True
            )
        except OSError as error:
            raise UserError(f'cannot start {tool}: {error}') from error
    # The last line: " REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 ..."
    lines = done.stdout.strip().splitlines()
    usage = dict(
        field.split(':') for field in (lines[-1] if lines else '').split()
    )
    if done.returncode or 'REG' not in usage:
        reason = done.stderr.strip() or 'it lists no kernel'
        raise UserError(f'cuobjdump cannot read the binary: {reason}')
    return Resources(
        int(usage['REG']), int(usage['STACK']) + int(usage['LOCAL'])
    )


@dataclass
class KernelRow:
    """One row of the table of kernels.

    Attributes:
        dtype (str): Key of :data:`DTYPES`.
        operation (str): 'attention' or 'convolution'.
        width (int): Channels per head, or channels of the convolution.
        step (str): 'forward' or 'backward'.
        kernel (str): Name of the kernel.
        warps (int): Warps of a program.
        used (dict[str, tuple[Resources, int, float]]): Resources, shared
            memory in bytes and occupancy, by architecture.
        requested (float): Bytes of loads and stores per token.
        least (float): Bytes per token of all tensors of the launch.
    """

    dtype: str
    operation: str
    width: int
    step: str
    kernel: str
    warps: int
    used: Dict[str, Tuple[Resources, int, float]]
    requested: float
    least: float


# Heads and side of the grid of the stages of a VVT-small at 224 pixels, by
# channels per head or hidden channels; one head and 28 for other widths.
STAGES = {
    48: (1, 56),
    40: (2, 28),
    32: (5, 14),
    768: (1, 56),
    1280: (1, 28),
    2048: (1, 7),
}
HEAD_DIMS = (16, 32, 40, 48, 64, 128)
CHANNELS = (768, 1280, 2048)  # hidden channels of the MLPs
BATCH = 64


def kernel_rows(
    architectures: Sequence[str],
    dtype: str,
    head_dims: Sequence[int] = HEAD_DIMS,
    channels: Sequence[int] = CHANNELS,
) -> List[KernelRow]:
    """Compile all kernels, and collect resources and bytes.

    Args:
        architectures (Sequence[str]): Keys of :data:`ARCHITECTURES`.
        dtype (str): Key of :data:`DTYPES`.
        head_dims (Sequence[int]): Channels per head of the attention.
        channels (Sequence[int]): Channels of the convolution.

    Returns:
        list[KernelRow]: One row per launch, in the order of the launches. The
        bytes are those for the last architecture.

    Raises:
        UserError: If an argument is not allowed.
    """
    for name in architectures:
        if name not in ARCHITECTURES:
            raise UserError(
                f'an architecture must be one of {", ".join(ARCHITECTURES)}, '
                f'got {name!r}'
            )
    if any(not 1 <= d <= 128 for d in head_dims):
        raise UserError(
            f'channels per head must be from 1 to 128, got {list(head_dims)}'
        )
    if any(c < 1 for c in channels):
        raise UserError(f'channels must be 1 or more, got {list(channels)}')
    rows: List[KernelRow] = []
    for operation, widths in (
        ('attention', head_dims),
        ('convolution', channels),
    ):
        for width in widths:
            rows += _rows(architectures, dtype, operation, width)
    return rows


def _rows(architectures, dtype, operation, width) -> List[KernelRow]:
    heads, side = STAGES.get(width, (1, 28))
    rows: List[KernelRow] = []
    for number, name in enumerate(architectures):
        limits = ARCHITECTURES[name]
        if operation == 'attention':
            passes = attention_launches(
                limits, DTYPES[dtype], width, heads, side, BATCH
            )
        else:
            passes = convolution_launches(
                limits, DTYPES[dtype], width, side, BATCH
            )
        launches = [
            (step, launch)
            for step, of_step in zip(('forward', 'backward'), passes)
            for launch in of_step
            # Whether the sums of the forward pass have several chunks depends
            # on the number of multiprocessors.
            if launch.kernel != '_add_chunks' or step == 'backward'
        ]
        tokens = BATCH * side**2
        if number == 0:
            rows = [
                KernelRow(
                    dtype, operation, width, step, launch.kernel, 0, {}, 0, 0
                )
                for step, launch in launches
            ]
        for row, (_, launch) in zip(rows, launches):
            found = resources(launch.binary)
            row.warps = launch.warps
            row.used[name] = (
                found,
                launch.shared,
                occupancy(
                    limits, launch.warps, found.registers, launch.shared
                ),
            )
            row.requested = launch.requested_bytes / tokens
            row.least = launch.least_bytes / tokens
    return rows


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Format rows as a table in Markdown.

    Args:
        rows (Sequence[KernelRow]): Rows of :func:`kernel_rows`.

    Returns:
        str: Table. Each architecture has the columns registers, spilled
        bytes, shared memory in KiB, and occupancy in percent.
    """
    names = list(rows[0].used)
    header = ['width', 'pass', 'kernel', 'warps']
    for name in names:
        header += [f'{name}: registers', 'spills', 'shared', 'occupancy']
    header += ['least', 'requested', 'ratio']
    lines = [header, ['---'] * len(header)]
    for row in rows:
        cells = [str(row.width), row.step, f'`{row.kernel}`', str(row.warps)]
        for name in names:
            found, shared, part = row.used[name]
            cells += [
                str(found.registers),
                str(found.spills),
                f'{shared / 1024:.1f}',
                f'{part:.1%}',
            ]
        cells += [
            f'{row.least:.0f}',
            f'{row.requested:.0f}',
            f'{row.requested / row.least:.2f}',
        ]
        lines.append(cells)
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines) + '\n'
