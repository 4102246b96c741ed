"""Utilities of both branches: strips, linear layers and row windows."""

import functools
import math
import platform
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import has_modes, is_transformed
from ..native import load
from ..processor import processor_field

# Maximum number of elements of the widest activation of a strip, 12 MiB in
# float32. With smaller strips, the overhead of launching each operation
# exceeds the gain from better cache use.
STRIP_ELEMENTS = 4096 * 768
# Batches whose widest activation has no more elements than this, 4 MiB in
# float32, are faster layer by layer; with the kernels, a sixteenth of this.
MIN_ELEMENTS = 1 << 20
# Number of tokens up to which a product is not computed as a convolution, in
# 16-bit dtypes and in float32 with MKL on an Intel processor. With 196 tokens
# and 512 x 2048 weights, the convolution takes 1.2 to 1.6 times as long in
# bfloat16 and 1.2 to 1.4 times in float32; with 784 tokens 1.0 and 1.1 times.
FEW_TOKENS_HALF = 256
FEW_TOKENS_MKL = 1024
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Dtypes of tensors that the kernels read and write.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a dtype.

    Processors without such instructions convert each number to float32 and
    back, which takes longer than the product.

    Args:
        dtype (torch.dtype): Floating-point dtype.

    Returns:
        bool: True for float32 and float64, for bfloat16 with AVX512-BF16 or
        AMX, and for float16 with AMX-FP16.
    """
    names: Tuple[str, ...]
    if dtype is torch.bfloat16:
        names = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    elif dtype is torch.float16:
        names = ('_is_amx_fp16_supported',)
    else:
        return True
    # PyTorch 2.4 and 2.5 have some of these functions only.
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _dtype_of_layers(x: Tensor) -> torch.dtype:
    """Dtype in which the layers compute: that of autocast or of the tokens."""
    if torch.is_autocast_enabled('cpu'):
        return torch.get_autocast_dtype('cpu')
    return x.dtype


def dtype_of_strips(x: Tensor) -> torch.dtype:
    """Return the dtype in which strips of these tokens are computed.

    It is the dtype in which the layers would compute: that of autocast, or
    that of the tokens. On processors without products of this dtype, it is
    float32, and the results of a branch are rounded to the dtype of ``x``.
    Sums over tokens are at least float32 in all cases.

    Args:
        x (Tensor): Tokens on a CPU, for which :func:`runs_in_strips` is True.

    Returns:
        torch.dtype: The dtype.
    """
    dtype = _dtype_of_layers(x)
    return dtype if has_products(dtype) else torch.float32


def _token_dtypes() -> Tuple[torch.dtype, ...]:
    """Dtypes of tokens that can be computed in strips."""
    if torch.is_autocast_enabled('cpu'):
        return torch.float32, torch.get_autocast_dtype('cpu')
    return torch.float32, torch.float64, torch.bfloat16, torch.float16


def has_kernels(x: Tensor, dtype: torch.dtype, channels: int) -> bool:
    """Check whether the compiled kernels can be used, see mmvvt.ops.native.

    Args:
        x (Tensor): Tokens ``(..., C)`` on a CPU.
        dtype (torch.dtype): Dtype in which the strips are computed.
        channels (int): Number of channels of the widest activation.

    Returns:
        bool: True for float32 and bfloat16, if the numbers of channels are
        multiples of a vector of the processor, no mode observes the
        operations, and the kernels could be compiled.
    """
    if (
        dtype not in KERNEL_DTYPES
        or x.dtype not in KERNEL_DTYPES
        or has_modes()
    ):
        return False
    library, _ = load()
    if library is None:
        return False
    width = library.mmvvt_vector_width()
    return x.shape[-1] % width == channels % width == 0


def _min_elements(x: Tensor, channels: int) -> int:
    """Number of elements above which strips are faster than the layers."""
    if has_kernels(x, dtype_of_strips(x), channels):
        return MIN_ELEMENTS // 16
    return MIN_ELEMENTS


def runs_in_strips(x: Tensor, channels: int) -> bool:
    """Check whether a branch should be computed in strips.

    Strips are used for large batches of tokens on a CPU, and for all batches
    in a dtype that the processor does not multiply in, see
    :func:`has_products`. They are not used while compiling or tracing,
    because compilers optimise the individual layers better.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)``.
        channels (int): Number of channels of the widest activation.

    Returns:
        bool: True if the branch should be computed in strips.
    """
    # is_transformed() is checked first, because a compiler would specialise
    # its graph to the properties that the other conditions read.
    return (
        not is_transformed()
        and x.device.type == 'cpu'
        and x.dtype in _token_dtypes()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and has_values_in_memory(x)
        and (
            not has_products(_dtype_of_layers(x))
            or len(x) * x.shape[1] * channels > _min_elements(x, channels)
        )
    )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: float32 or higher precision."""
    return torch.promote_types(dtype, torch.float32)


def has_values_in_memory(t: Tensor) -> bool:
    """Whether the memory of a tensor contains its values.

    PyTorch negates some tensors lazily, and some zeros have no memory.
    """
    return not t.is_neg() and not t._is_zerotensor()


def incoming_grad(grad: Tensor) -> Tensor:
    """Check and prepare the gradient of the output of a branch.

    Args:
        grad (Tensor): Gradient of the output.

    Returns:
        Tensor: The same values, contiguous and in memory.

    Raises:
        RuntimeError: If the backward pass is itself differentiated, by
            ``create_graph=True`` or by forward-mode differentiation.
    """
    is_dual = (
        forward_ad._current_level >= 0
        and forward_ad.unpack_dual(grad).tangent is not None
    )
    if torch.is_grad_enabled() or is_dual:
        raise RuntimeError(
            'double backward (create_graph=True) is not supported for blocks '
            "that run in strips; set attn_cfg=dict(backend='reference'), "
            'which supports it'
        )
    if not has_values_in_memory(grad):
        grad = torch.zeros(
            grad.shape, dtype=grad.dtype, device=grad.device
        ).add_(grad)
    return grad.contiguous()


def to_images(
    x: Tensor, spatial_shape: Tuple[int, int], scale: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor]]:
    """Reshape tokens to images.

    Args:
        x (Tensor): Tokens of shape ``(B, N, C)``.
        spatial_shape (tuple[int, int]): Grid ``(h, w)`` with h * w = N.
        scale (Tensor, optional): Per-sample drop-path scale of shape
            ``(B, 1, 1)``.

    Returns:
        tuple[Tensor, Tensor or None]: Contiguous images of shape
        ``(B, h, w, C)`` and the scale of shape ``(B, 1, 1, 1)``.
    """
    # (B, N, C) -> (B, h, w, C)
    x = x.contiguous().unflatten(1, spatial_shape)
    # (B, 1, 1) -> (B, 1, 1, 1)
    return x, None if scale is None else scale[..., None]


def cut(
    batch: int, height: int, width: int, channels: int
) -> Iterator[Tuple[slice, List[slice]]]:
    """Split a batch into groups of whole images or into strips of rows.

    Args:
        batch (int): Number of images.
        height (int): Number of rows of the grid.
        width (int): Number of columns of the grid.
        channels (int): Number of channels of the widest activation.

    Yields:
        tuple[slice, list[slice]]: Slice of images, and the slices of rows to
        process in order. If the widest activation of an image has at most
        :data:`STRIP_ELEMENTS` elements, there is one slice with all rows.
        Otherwise a single image is split into strips of at least three rows;
        its last strip may have fewer.
    """
    images = STRIP_ELEMENTS // (height * width * channels)
    if images >= 1:
        for first in range(0, batch, images):
            yield slice(first, min(first + images, batch)), [slice(0, height)]
        return
    # The minimum is three rows: after the row window of the activations, two
    # rows of the first strip remain for the row window of the gradients.
    rows = max(3, STRIP_ELEMENTS // (width * channels))
    strips = [
        slice(top, min(top + rows, height)) for top in range(0, height, rows)
    ]
    for image in range(batch):
        yield slice(image, image + 1), strips


def all_strips(
    batch: int, height: int, width: int, channels: int
) -> List[Tuple[slice, slice]]:
    """Return the images and the rows of each strip, see :func:`cut`."""
    return [
        (images, rows)
        for images, strips in cut(batch, height, width, channels)
        for rows in strips
    ]


@functools.lru_cache(maxsize=None)
def is_intel() -> bool:
    """Whether the manufacturer of the processor is Intel.

    PyTorch computes matrix products in float32 with MKL, which uses the widest
    vector instructions on these processors only, and convolutions with oneDNN,
    which uses them on all.
    """
    vendor = processor_field('vendor_id') or platform.processor()
    return 'GenuineIntel' in vendor


def few_tokens(dtype: torch.dtype) -> int:
    """Number of tokens up to which a product is not faster as a convolution.

    Convolutions copy the weight into another layout at each call. Products in
    16-bit dtypes are computed with oneDNN, too.

    Args:
        dtype (torch.dtype): Dtype of the product.

    Returns:
        int: The number; 0 if convolutions are always faster.
    """
    if dtype in HALF_DTYPES:
        return FEW_TOKENS_HALF
    return FEW_TOKENS_MKL if is_intel() else 0


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Compute ``x @ weight.T + bias``, mostly as a 1x1 convolution.

    See :func:`is_intel` for the reason, and :func:`few_tokens` for the
    exception.

    Args:
        x (Tensor): Contiguous input of shape ``(b, rows, w, C_in)``.
        weight (Tensor): Weight of shape ``(C_out, C_in)``, of the same dtype.
        bias (Tensor, optional): Bias of shape ``(C_out, )``. Defaults to
            None.

    Returns:
        Tensor: Output of shape ``(b, rows, w, C_out)``.
    """
    if x.shape[:3].numel() <= few_tokens(x.dtype):
        return F.linear(x, weight, bias)
    # The weight is viewed as (C_out, C_in, 1, 1).
    return to_pixels(F.conv2d(to_channels(x), weight[:, :, None, None], bias))


def convolves_weight_grads(dtype: torch.dtype) -> bool:
    """Whether weight gradients are computed as those of 1x1 convolutions.

    See :func:`is_intel` for the reason. The speed of both operations is in
    docs/speed.md: the convolution is slower with AVX2, too.

    Args:
        dtype (torch.dtype): Dtype of the product.

    Returns:
        bool: True for float32 with AVX-512 on processors that are not made by
        Intel.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype is torch.float32 and capability == 'AVX512' and not is_intel()


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient ``grad.T @ x`` of the weight of a linear layer.

    Args:
        grad (Tensor): Gradient of the output, ``(b, rows, w, C_out)``.
        x (Tensor): Input of the layer, ``(b, rows, w, C_in)``.

    Returns:
        Tensor: Gradient of the weight, ``(C_out, C_in)``.
    """
    if not convolves_weight_grads(x.dtype):
        # (b, rows, w, channels) -> (b * rows * w, channels)
        return grad.flatten(0, 2).t() @ x.flatten(0, 2)
    _, weight, _ = torch.ops.aten.convolution_backward(
        to_channels(grad),
        to_channels(x),
        x.new_empty(grad.shape[-1], x.shape[-1], 1, 1),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )
    # (C_out, C_in, 1, 1) -> (C_out, C_in), not as a view: a gradient that is
    # a view cannot be modified in place with autograd.
    return weight.squeeze_(3).squeeze_(2)


def to_channels(x: Tensor) -> Tensor:
    """Permute to NCHW in channels-last memory format, without a copy."""
    # (b, rows, w, C) -> (b, C, rows, w)
    return x.permute(0, 3, 1, 2)


def to_pixels(x: Tensor) -> Tensor:
    """Permute from NCHW to a contiguous NHWC tensor."""
    # (b, C, rows, w) -> (b, rows, w, C)
    return x.permute(0, 2, 3, 1).contiguous()


class Workspace:
    """Memory that the strips of one call share.

    An operating system provides new memory page by page at the first access,
    which can take longer than computing the values.
    """

    def __init__(self):
        self._buffers: Dict[str, Tensor] = {}

    def take(
        self,
        name: str,
        like: Tensor,
        *shape: int,
        dtype: Optional[torch.dtype] = None,
    ) -> Tensor:
        """Return uninitialised memory; it invalidates the previous result.

        Args:
            name (str): Name of the buffer.
            like (Tensor): Provides the dtype and the device.
            *shape (int): Shape of the result.
            dtype (torch.dtype, optional): Dtype. Defaults to that of ``like``.

        Returns:
            Tensor: Contiguous tensor of this shape.
        """
        numel = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = like.new_empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)


class GradSums:
    """Accumulates the gradients of weights over strips, at least in float32.

    The gradients of the first strip are stored without a copy, so no zero
    initialisation and no addition are needed if there is only one strip.
    """

    def __init__(self):
        self._sums: Dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        """Add a gradient.

        Args:
            name (str): Name of the weight.
            grad (Tensor): Gradient of the weight. Takes ownership of the
                tensor, which may be modified in place by later calls.
        """
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            self._sums[name] = grad.to(sum_dtype(grad.dtype))

    def add_product(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add the weight gradient ``grad.T @ x`` of a linear layer.

        Args:
            name (str): Name of the weight.
            grad (Tensor): Gradient of the output, ``(b, rows, w, C_out)``.
            x (Tensor): Input of the layer, ``(b, rows, w, C_in)``.
        """
        total = self._sums.get(name)
        if (
            total is None
            or total.dtype != x.dtype
            or convolves_weight_grads(x.dtype)
        ):
            self.add(name, weight_grad(grad, x))
        else:
            # (b, rows, w, channels) -> (b * rows * w, channels)
            total.addmm_(grad.flatten(0, 2).t(), x.flatten(0, 2))

    def of(self, names: Tuple[str, ...]) -> List[Tensor]:
        """Return the accumulated gradients in the order of ``names``."""
        return [self._sums[name] for name in names]


class Window(NamedTuple):
    """Rows of an image that a 3x3 convolution reads to compute m rows.

    From top to bottom, they are a row of zeros if ``top`` is True, the rows
    of ``above``, those of ``strip``, and a row of zeros if ``bottom`` is True:
    m + 2 rows.

    Attributes:
        above (Tensor, optional): The two rows above the strip, of shape
            ``(b, 2, w, C)``. None at the top of the image.
        strip (Tensor): Contiguous strip of shape ``(b, n, w, C)``.
        top (bool): Whether the strip starts at the top of the image.
        bottom (bool): Whether the strip ends at the bottom of the image.
    """

    above: Optional[Tensor]
    strip: Tensor
    top: bool
    bottom: bool

    @property
    def shape(self) -> Tuple[int, int, int, int]:
        """Shape ``(b, m, w, C)`` of the output of the convolution."""
        images, rows, width, channels = self.strip.shape
        above = 0 if self.above is None else self.above.shape[1]
        rows += above + self.top + self.bottom - 2
        return images, rows, width, channels


class RowWindow:
    """Extends each strip by one row above and one row below.

    The row below a strip is part of the next strip, so the output lags one
    row behind the input: after the strip with rows 0 to 7, the window covers
    rows 0 to 6, and row 7 is the row below them.

    Args:
        height (int): Number of rows of the image.
    """

    def __init__(self, height: int):
        self.height = height
        # The last two rows of the previous strip, and memory for those of
        # this strip.
        self.above: Optional[Tensor] = None
        self.unused: Optional[Tensor] = None

    def push(self, x: Tensor, rows: slice) -> Tuple[Window, slice]:
        """Add the next strip and return the window that it completes.

        Args:
            x (Tensor): Contiguous strip of shape ``(b, n, w, C)``. All but
                the last must have at least two rows.
            rows (slice): The n rows of the image that the strip contains.

        Returns:
            tuple[Window, slice]: Window, and the m rows that it covers. The
            second call after this one overwrites the rows above the strip.
        """
        top, bottom = rows.start == 0, rows.stop == self.height
        window = Window(None if top else self.above, x, top, bottom)
        if not bottom:
            # Another strip may overwrite the memory of this one.
            last = self.unused
            if last is None or last.shape[0] != len(x):
                last = x.new_empty(len(x), 2, *x.shape[2:])
            self.above, self.unused = last.copy_(x[:, -2:]), self.above
        return window, slice(rows.start - (not top), rows.stop - (not bottom))
