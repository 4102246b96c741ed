"""What both branches share: how images are cut, products, window of rows."""

from typing import Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import is_transformed

# Numbers of the widest intermediate of a strip, 12 MB in float32. Smaller
# strips pay more for starting each operation than they save in the caches.
STRIP_NUMBERS = 4096 * 768
# Batches with a smaller widest intermediate, 4 MB, are faster layer by layer.
LEAST_NUMBERS = 1 << 20
DTYPES = (torch.float32, torch.float64)


def runs_in_strips(x: Tensor, channels: int) -> bool:
    """Whether a branch should take these tokens.

    It should take large batches of float32 and float64 on a CPU; not under
    autocast, nor where operations are being recorded: compilers see more in
    single layers.

    Args:
        x (Tensor): ``(B, N, C)``.
        channels (int): Of the widest intermediate.
    """
    # Transforms first: a compiler would tie its graph to what is looked at.
    return (
        not is_transformed()
        and x.device.type == 'cpu'
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled('cpu')
        and type(x) in (Tensor, torch.nn.Parameter)
        and len(x) * x.shape[1] * channels > LEAST_NUMBERS
    )


def check_differentiated_once() -> None:
    """Raise in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'a block that runs in strips can be differentiated once, and the '
            'backward pass was called with create_graph=True; attn_cfg='
            "dict(backend='reference') can be differentiated again"
        )


def to_images(
    x: Tensor, spatial_shape: Tuple[int, int], scale: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor]]:
    """Tokens ``(B, N, C)`` to ``(B, h, w, C)``, their scale likewise."""
    x = x.contiguous().unflatten(1, spatial_shape)
    # (B, 1, 1) -> (B, 1, 1, 1)
    return x, None if scale is None else scale[..., None]


def cut(
    batch: int, height: int, width: int, channels: int
) -> Iterator[Tuple[slice, List[slice]]]:
    """Cut a batch into groups of whole images, or images into rows.

    Args:
        batch (int): Number of images.
        height (int): Rows of the grid.
        width (int): Columns of the grid.
        channels (int): Of the widest intermediate.

    Yields:
        tuple[slice, list[slice]]: Images, and the rows to take in turn: all
        at once where an image has no more than :data:`STRIP_NUMBERS`
        numbers; else three rows at least, of one image.
    """
    images = STRIP_NUMBERS // (height * width * channels)
    if images >= 1:
        for first in range(0, batch, images):
            yield slice(first, min(first + images, batch)), [slice(0, height)]
        return
    # Three: of the first, two remain for the window over the gradients.
    rows = max(3, STRIP_NUMBERS // (width * channels))
    strips = [
        slice(top, min(top + rows, height)) for top in range(0, height, rows)
    ]
    for image in range(batch):
        yield slice(image, image + 1), strips


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``x @ weight.T + bias`` as a convolution of one pixel.

    PyTorch takes products from MKL, which on other makers' processors leaves
    the widest vector instructions unused, and convolutions from oneDNN, which
    does not.

    Args:
        x (Tensor): ``(b, rows, w, C_in)``, contiguous.
        weight (Tensor): ``(C_out, C_in)``.
        bias (Tensor, optional): ``(C_out, )``. Defaults to None.

    Returns:
        Tensor: ``(b, rows, w, C_out)``.
    """
    return to_pixels(F.conv2d(to_channels(x), weight[:, :, None, None], bias))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """``(b, rows, w, C)`` normalised over C, means, reciprocal deviations."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_grads(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of :func:`layer_norm`."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )


def to_channels(x: Tensor) -> Tensor:
    """``(b, rows, w, C)`` to ``(b, C, rows, w)``, channels last: no copy."""
    return x.permute(0, 3, 1, 2)


def to_pixels(x: Tensor) -> Tensor:
    """``(b, C, rows, w)`` to ``(b, rows, w, C)``, contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def sum_pixels(x: Tensor) -> Tensor:
    """``(b, rows, w, C)`` to ``(C, )``."""
    return x.flatten(0, 2).sum(dim=0)


class GradSums:
    """Gradients of weights, summed over strips.

    The first strip's are taken as they are: where it is the only one, there
    is nothing to fill with zeros and to add to.
    """

    def __init__(self):
        self._sums: Dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        """Add a gradient that nothing else holds."""
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            self._sums[name] = grad

    def add_product(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add ``grad.T @ x``, both ``(b, rows, w, channels)``."""
        grad, x = grad.flatten(0, 2), x.flatten(0, 2)
        if name in self._sums:
            self._sums[name].addmm_(grad.t(), x)
        else:
            self._sums[name] = grad.t() @ x

    def of(self, names: Tuple[str, ...]) -> List[Tensor]:
        """The sums in the order of these names."""
        return [self._sums[name] for name in names]


class RowWindow:
    """Adds to each strip the row above it and the row below.

    The row below comes with the next strip, so a window runs a row behind:
    after the strip of rows 0 to 7 it covers rows 0 to 6 and has 7 below.

    Args:
        height (int): Rows of the image.
    """

    def __init__(self, height: int):
        self.height = height
        self.buffer: Optional[Tensor] = None

    def push(self, x: Tensor, rows: slice) -> Tuple[Tensor, slice, int]:
        """Take the next strip.

        Args:
            x (Tensor): ``(b, n, w, C)``; of the first strip two rows at
                least, unless it is the whole image. Others have two more at
                most.
            rows (slice): Which n rows of the image they are.

        Returns:
            tuple[Tensor, slice, int]: ``(b, m + 2, w, C)``, the m rows that
            it covers, and 0, the padding that a 3x3 convolution needs above
            and below. It is written over by the next call. Or, for a whole
            image: the image, its rows, and 1.
        """
        if rows == slice(0, self.height):
            return x, rows, 1
        strip_rows = x.shape[1]
        first, last = rows.start == 0, rows.stop == self.height
        if first:
            # The row above the image, the strip; later two rows of the strip
            # before, the strip, and at last the row below the image.
            self.buffer = x.new_empty(len(x), strip_rows + 5, *x.shape[2:])
            self.buffer[:, 1] = 0
        else:
            self.buffer[:, :2] = self.buffer[:, self.stop - 2 : self.stop]
        self.stop = strip_rows + 2
        self.buffer[:, 2 : self.stop] = x
        if last:
            self.buffer[:, self.stop] = 0
        window = self.buffer[:, first : self.stop + last]
        return window, slice(rows.start - 1 + first, rows.stop - 1 + last), 0
