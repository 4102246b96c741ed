"""Tokens to images, with sizes that may be traced or compiled."""

import math
from typing import Sequence, Tuple

import torch
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


def is_compiled_training() -> bool:
    """Whether the compiler traces a forward pass with gradients.

    Inductor cannot save a permuted view with symbolic strides for the backward
    pass: it has to sort the strides and cannot compare them. Convolutions save
    their input, which must then be contiguous.
    """
    return torch.compiler.is_compiling() and torch.is_grad_enabled()


def tokens_to_image(x: Tensor, spatial_shape: Tuple[int, int]) -> Tensor:
    """Reshape tokens for a convolution.

    Args:
        x (Tensor): Tokens ``(B, N, C)`` in row-major order.
        spatial_shape (tuple[int, int]): Grid ``(h, w)``, h * w = N.

    Returns:
        Tensor: Image ``(B, C, h, w)``: a channels-last view of the tokens, or
        a contiguous copy, see :func:`is_compiled_training`.
    """
    # (B, N, C) -> (B, h, w, C) -> (B, C, h, w)
    x = unflatten(x, 1, spatial_shape).permute(0, 3, 1, 2)
    return x.contiguous() if is_compiled_training() else x


def image_to_tokens(x: Tensor) -> Tensor:
    """Reshape the output of a convolution to tokens.

    Args:
        x (Tensor): Image ``(B, C, h, w)``.

    Returns:
        Tensor: Tokens ``(B, h * w, C)`` in row-major order: a view, or a
        contiguous copy, see :func:`is_compiled_training`.
    """
    # (B, C, h, w) -> (B, C, N) -> (B, N, C)
    x = x.flatten(2).transpose(1, 2)
    return x.contiguous() if is_compiled_training() else x
