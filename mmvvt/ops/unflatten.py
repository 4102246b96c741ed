"""``Tensor.unflatten`` with sizes that may be traced."""

import math
from typing import Sequence

from torch import Tensor


def unflatten(t: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Split a dimension like :meth:`torch.Tensor.unflatten`.

    The ONNX exporter that is based on tracing writes ``unflatten`` with the
    shape of the example input, and such a file fails at any other size. It
    exports ``reshape`` with the shape of the actual input.

    Args:
        t (Tensor): Tensor of any shape.
        dim (int): Dimension to split; negative values count from the end.
        sizes (Sequence[int]): New sizes of the dimension; one of them may be
            -1.

    Returns:
        Tensor: Tensor with ``len(sizes)`` dimensions in place of one.
    """
    dim %= t.dim()
    sizes = list(sizes)
    for index, size in enumerate(sizes):
        # reshape cannot infer a size if the tensor is empty. A traced size
        # is a tensor, and comparing it would warn.
        if isinstance(size, int) and size == -1:
            others = sizes[:index] + sizes[index + 1 :]
            sizes[index] = t.shape[dim] // math.prod(others)
    return t.reshape(*t.shape[:dim], *sizes, *t.shape[dim + 1 :])
