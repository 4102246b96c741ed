"""Optimizer wrapper constructor with layer-wise learning rates."""

from typing import Dict, List

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmvvt.errors import UserError


def layer_scales(model: nn.Module, decay_rate: float) -> Dict[str, float]:
    """Return the factor of the learning rate of each parameter.

    A backbone has the method ``get_layer_depth(param_name, prefix='')``, as in
    mmpretrain, which returns the depth of a parameter and the number of
    depths. The factor is ``decay_rate`` to the power of the number of depths
    that follow. It is 1 for parameters outside of backbones, such as those of
    necks and heads.

    Args:
        model (nn.Module): Backbone, or a model that contains one, for example
            a classifier, a segmentor or a detector. The backbone may be in a
            wrapper, such as mmpretrain's ``LoRAModel``.
        decay_rate (float): Ratio of the learning rates of a layer and of the
            next one.

    Returns:
        dict[str, float]: Factor for each name of a parameter.

    Raises:
        UserError: If ``decay_rate`` is not in (0, 1], or if no module of the
            model has depths.
    """
    if not isinstance(decay_rate, (int, float)) or not 0 < decay_rate <= 1:
        raise UserError(
            'paramwise_cfg.layer_decay_rate must be greater than 0 and at '
            f'most 1, got {decay_rate!r}'
        )
    backbones = {
        f'{name}.': module
        for name, module in model.named_modules()
        if name and hasattr(module, 'get_layer_depth')
    }
    # The model itself, if nothing in it has depths.
    if not backbones and hasattr(model, 'get_layer_depth'):
        backbones[''] = model
    # Wrappers pass on the attributes of the module inside. The innermost
    # module, with the longest prefix, knows the names of its parameters.
    prefixes = sorted(backbones, key=len, reverse=True)
    kind = type(getattr(model, 'backbone', model)).__name__
    unsupported = UserError(
        'layer_decay_rate needs a backbone with the method get_layer_depth, '
        f'which {kind} does not support'
    )
    if not backbones:
        raise unsupported
    scales = {}
    for name, _ in model.named_parameters():
        scales[name] = 1.0
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            continue
        # Models of mmpretrain take no prefix.
        arguments = (name, prefix) if prefix else (name,)
        try:
            depth, number = backbones[prefix].get_layer_depth(*arguments)
        except RuntimeError as error:  # ResNets of mmpretrain, by their depth
            raise unsupported from error
        scales[name] = decay_rate ** (number - depth - 1)
    return scales


def _options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != 'params'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Default constructor of mmengine with layer-wise learning rates.

    The arguments are those of mmengine's ``DefaultOptimWrapperConstructor``,
    from which it differs in two respects:

    - ``paramwise_cfg`` may contain ``layer_decay_rate`` (float), the ratio of
      the learning rates of a layer and of the next one, see
      :func:`layer_scales`. The learning rate that follows from the other
      options, such as ``lr_mult`` in ``custom_keys``, is multiplied by the
      factor of the layer. This works for the models of mmpretrain, mmseg and
      mmdet. Without ``lr_mult``, the learning rates and weight decays are
      those of mmpretrain's ``LearningRateDecayOptimWrapperConstructor``,
      which ignores ``lr_mult``. Defaults to 1.
    - Groups with equal options are merged. With ``paramwise_cfg``, mmengine
      creates one group per parameter. Optimizers and schedulers process
      groups one after the other, so that the multi-tensor (foreach)
      implementations of an optimizer receive only one tensor at a time.
      Merging is faster and does not change the update.

    Schedulers multiply the learning rates of all groups by the same factor,
    except those with ``eta_min``, which is the same for all groups. Use
    ``eta_min_ratio`` together with ``layer_decay_rate``.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
        ...     constructor='MergedOptimWrapperConstructor',
        ...     paramwise_cfg=dict(
        ...         layer_decay_rate=0.75,
        ...         norm_decay_mult=0.0,
        ...         bias_decay_mult=0.0))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if 'decay_rate' in self.paramwise_cfg:  # its name in mmseg and mmdet
            raise UserError(
                'paramwise_cfg.decay_rate is unknown to '
                'MergedOptimWrapperConstructor; its name is layer_decay_rate, '
                'and num_layers is not needed'
            )
        if 'layer_decay_rate' in self.paramwise_cfg and self.base_lr is None:
            raise UserError('layer_decay_rate needs optimizer.lr')

    def add_params(
        self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs
    ) -> None:
        """Add the parameter groups of a module to ``params`` in place.

        See the parent class for the arguments.

        Raises:
            UserError: If ``layer_decay_rate`` is not valid, or if the backbone
                does not support it.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # Recursive call for a submodule: continue at the end.
        if 'layer_decay_rate' in self.paramwise_cfg:
            self._scale_learning_rates(params, module)
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

    def _scale_learning_rates(
        self, params: List[dict], model: nn.Module
    ) -> None:
        """Multiply the learning rate of each group; one parameter each."""
        decay_rate = self.paramwise_cfg['layer_decay_rate']
        scales = layer_scales(model, decay_rate)
        names = {p: name for name, p in model.named_parameters()}
        for group in params:
            scale = scales[names[group['params'][0]]]
            group['lr'] = group.get('lr', self.optimizer_cfg['lr']) * scale
        if params:
            rates = [group['lr'] for group in params]
            print_log(
                f'layer_decay_rate={decay_rate}: learning rates of '
                f'{min(rates):.3g} to {max(rates):.3g}',
                logger='current',
            )
