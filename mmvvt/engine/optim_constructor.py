"""Few parameter groups in place of one for each parameter."""

from typing import List

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


def _options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != 'params'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, but one group for all parameters alike.

    With ``paramwise_cfg`` mmengine makes a group of each parameter. An
    optimizer goes through its groups one by one, so that the operations it
    has for many tensors at once get one each, and so do the schedulers. Here
    parameters of the same options share a group; the update is the same.

    Arguments are those of mmengine's ``DefaultOptimWrapperConstructor``.
    """

    def add_params(
        self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs
    ) -> None:
        """Add the groups of a module to ``params``; see the parent class."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # a submodule: what calls this has more to add
        merged: List[dict] = []
        for group in params:
            options = _options(group)
            for other in merged:
                if options == _options(other):
                    other['params'] += group['params']
                    break
            else:
                merged.append(group)
        params[:] = merged
