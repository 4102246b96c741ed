"""When to record a backward pass written by hand."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether something other than eager autograd follows the operations.

    Compilers, tracers, the transforms of ``torch.func`` and forward-mode
    differentiation need plain operations: they derive their own backward
    pass, or have rules for batches, for the operations that they see.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # PyTorch has no public way to ask for the next two.
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def needs_custom_backward(*tensors: Tensor) -> bool:
    """Whether to record a backward pass written by hand for these tensors.

    Args:
        *tensors (Tensor): The inputs that may need a gradient.

    Returns:
        bool: True if eager autograd records and one of them needs a gradient.
    """
    return (
        not is_transformed()
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    )
