"""Mixed precision that also runs where there is no GPU."""

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module(name='AutoAmpOptimWrapper')
def auto_amp_optim_wrapper(
    loss_scale='dynamic', dtype=None, **kwargs
) -> OptimWrapper:
    """Mixed precision on a GPU, float32 on the CPU.

    mmengine's ``AmpOptimWrapper`` refuses to be built without a GPU, so a
    recipe that names it cannot take a step on a laptop. This gives that very
    wrapper where there is a GPU, and the plain one in float32, with a line
    in the log that says so, where there is none. (Autocast to bfloat16 would
    be the other choice; on processors without instructions for it, it is
    slower than float32.)

    Args:
        loss_scale (str | float | dict): See mmengine's ``AmpOptimWrapper``.
            Defaults to 'dynamic'.
        dtype (str | torch.dtype, optional): Autocast type, see there.
            Defaults to None, float16 on CUDA.
        **kwargs: Arguments of mmengine's ``OptimWrapper``.

    Returns:
        OptimWrapper: The wrapper.
    """
    if torch.cuda.is_available():
        return AmpOptimWrapper(loss_scale=loss_scale, dtype=dtype, **kwargs)
    print_log(
        'No GPU: mixed precision is off, training runs in float32.',
        logger='current',
    )
    return OptimWrapper(**kwargs)
