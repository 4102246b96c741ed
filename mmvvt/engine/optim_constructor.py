"""Optimizer wrapper constructor that merges parameter groups."""

from typing import List

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


def _options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != 'params'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Default constructor of mmengine with merged parameter groups.

    With ``paramwise_cfg``, mmengine creates one group per parameter.
    Optimizers and schedulers process groups one after the other, so that the
    multi-tensor (foreach) implementations of an optimizer receive only one
    tensor at a time. This constructor merges groups with equal options, which
    is faster and does not change the update.

    The arguments are those of mmengine's ``DefaultOptimWrapperConstructor``.
    """

    def add_params(
        self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs
    ) -> None:
        """Add the parameter groups of a module to ``params`` in place.

        See the parent class for the arguments.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # Recursive call for a submodule: merge once at the end.
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
