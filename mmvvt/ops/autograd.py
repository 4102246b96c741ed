"""Autocast, and conditions for using a custom autograd function."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext


def autocast_enabled(t: Tensor) -> bool:
    """Check whether autocast is enabled for the device of a tensor.

    Args:
        t (Tensor): Tensor on any device, including 'meta', which has no
            autocast.

    Returns:
        bool: True if autocast is enabled.
    """
    device = t.device.type
    return device != 'meta' and torch.is_autocast_enabled(device)


def without_autocast(t: Tensor):
    """Return a context in which autocast is disabled for a tensor's device."""
    if not autocast_enabled(t):
        return nullcontext()
    return torch.autocast(t.device.type, enabled=False)


def in_torch_func() -> bool:
    """Check whether a transform of ``torch.func`` is active."""
    # PyTorch has no public API for this check.
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_modes() -> bool:
    """Check whether modes observe or replace the operations.

    Returns:
        bool: True inside a dispatch mode, such as a FLOPs counter or fake
        tensors, and inside a function mode, other than that of
        ``torch.set_default_device``, which has no effect on operations whose
        device is given.
    """
    # PyTorch has no public API for these checks.
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        not isinstance(mode, DeviceContext)
        for mode in torch.overrides._get_current_function_mode_stack()
    )


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
        or in_torch_func()
        # PyTorch has no public API for this check.
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
