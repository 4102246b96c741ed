"""Check that layer-wise learning rates have the effect that is wanted."""

from typing import Iterator

from mmengine.config import Config
from torch import nn

from ..engine.optim_constructor import layer_scales
from ..errors import UserError
from .config import type_name

CONSTRUCTORS = (
    'MergedOptimWrapperConstructor',
    'LearningRateDecayOptimWrapperConstructor',  # of mmpretrain
)


def find_layer_decay_problems(
    cfg: Config, model: nn.Module
) -> Iterator[UserError]:
    """Check ``paramwise_cfg.layer_decay_rate`` and the schedulers.

    Args:
        cfg (Config): The complete config.
        model (nn.Module): Model built from the config.

    Yields:
        UserError: If the constructor of the optimizer wrapper ignores the
            option, the backbone does not support it, or a scheduler does not
            keep the learning rates of the layers apart.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    rate = (wrapper.get('paramwise_cfg') or {}).get('layer_decay_rate')
    if rate is None:
        return
    constructor = wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    name = type_name(dict(type=constructor))
    if name == 'DefaultOptimWrapperConstructor':
        yield UserError(
            'optim_wrapper.paramwise_cfg.layer_decay_rate has no effect with '
            f"mmengine's {name}: set optim_wrapper.constructor="
            f'{CONSTRUCTORS[0]!r}'
        )
    if name not in CONSTRUCTORS:
        return
    try:
        scale = min(layer_scales(model, rate).values())
    except UserError as error:
        yield error
        return
    lr = (wrapper.get('optimizer') or {}).get('lr')
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    for index, scheduler in enumerate(schedulers):
        where = f'param_scheduler[{index}] ({type_name(scheduler)})'
        eta_min = scheduler.get('eta_min') or 0.0
        if type_name(scheduler) == 'OneCycleLR':
            yield UserError(
                f'{where} gives all layers the same learning rate, whatever '
                'layer_decay_rate is: use another scheduler'
            )
        elif isinstance(lr, (int, float)) and eta_min > lr * scale:
            yield UserError(
                f'{where} has eta_min={eta_min:g}, but the first layers start '
                f'at a learning rate of {lr * scale:.3g} with '
                f'layer_decay_rate={rate}, which would rise: set '
                'eta_min_ratio instead, or eta_min=0'
            )
