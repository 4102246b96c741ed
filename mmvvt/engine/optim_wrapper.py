"""Mixed precision optimizer wrapper that also works without a GPU."""

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module(name='AutoAmpOptimWrapper')
def auto_amp_optim_wrapper(
    loss_scale='dynamic', dtype=None, **kwargs
) -> OptimWrapper:
    """Build a mixed precision wrapper on a GPU, a float32 one on a CPU.

    mmengine's ``AmpOptimWrapper`` cannot be built without a GPU, so configs
    that use it cannot be trained on a CPU. This function returns an
    ``AmpOptimWrapper`` if CUDA is available. Otherwise, it logs a message and
    returns an ``OptimWrapper``, which trains in float32. Autocast to bfloat16
    is not used on CPUs, because it is slower than float32 on processors
    without bfloat16 instructions.

    Args:
        loss_scale (str | float | dict): Loss scale of mmengine's
            ``AmpOptimWrapper``; not used on a CPU. Defaults to 'dynamic'.
        dtype (str | torch.dtype, optional): Autocast dtype of mmengine's
            ``AmpOptimWrapper``; not used on a CPU. Defaults to None, which is
            float16 on CUDA.
        **kwargs: Arguments of mmengine's ``OptimWrapper``.

    Returns:
        OptimWrapper: The optimizer wrapper.
    """
    if torch.cuda.is_available():
        return AmpOptimWrapper(loss_scale=loss_scale, dtype=dtype, **kwargs)
    print_log(
        'No GPU is available: mixed precision is disabled, training runs in '
        'float32.',
        logger='current',
    )
    return OptimWrapper(**kwargs)
