"""Conditions for using a custom autograd function."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Check whether operations are traced or transformed.

    Compilers, tracers, the transforms of ``torch.func`` and forward-mode
    automatic differentiation require standard operations, because they apply
    their own differentiation and batching rules to each operation.

    Returns:
        bool: True while compiling or tracing, and inside a ``torch.func``
        transform or a forward-mode differentiation level.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # PyTorch has no public API for the following two checks.
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def needs_custom_backward(*tensors: Tensor) -> bool:
    """Check whether to use a custom autograd function for these tensors.

    Args:
        *tensors (Tensor): Inputs that may require a gradient.

    Returns:
        bool: True if eager autograd is enabled and at least one of the
        tensors requires a gradient.
    """
    return (
        not is_transformed()
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    )
