"""What a fast path checks before it reads weights without calling layers.

Users replace layers, change their settings, prune, quantise, re-parametrise,
wrap and hook them, one by one or globally. A fast path declares the layers
that it stands for as a table of :class:`StockLayer`. It runs only if
:func:`find_difference` finds nothing else; otherwise the layers are called.
"""

from dataclasses import dataclass, field
from typing import Callable, Dict, FrozenSet, Mapping, Optional

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

# PyTorch has no public attribute for most of what is read in this file: hooks,
# modes and the methods that someone may have replaced.
HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
_MODULE_CALL = nn.Module.__call__


@dataclass
class StockLayer:
    """A layer as a fast path assumes it.

    Attributes:
        cls (type): Its class; a subclass is another layer.
        parameters (dict[str, str | None]): Shape of each parameter, a letter
            for each axis, or a digit for a fixed length. Equal letters stand
            for equal lengths in the whole table; ``C`` is the number of
            channels of the input. None: there must be no such parameter.
        sizes (dict[str, str]): Attributes that hold lengths, in the same
            notation: one letter for an int or a tuple of one.
        settings (dict[str, object]): Other attributes and their values.
    """

    cls: type
    parameters: Mapping[str, Optional[str]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    forward: Callable = field(init=False)
    class_attributes: FrozenSet[str] = field(init=False)

    def __post_init__(self):
        self.forward = self.cls.forward
        self.class_attributes = frozenset(dir(self.cls))


def _is_observed() -> bool:
    """Whether hooks or modes of the whole process follow calls of modules."""
    return (
        bool(torch_module._has_any_global_hook())
        or nn.Module.__call__ is not _MODULE_CALL
        or torch._C._len_torch_dispatch_stack() > 0
        # torch.set_default_device is such a mode, and changes nothing here.
        or any(
            not isinstance(mode, DeviceContext)
            for mode in torch.overrides._get_current_function_mode_stack()
        )
    )


def _fits(lengths, axes: str, known: Dict[str, int]) -> bool:
    """Whether lengths fit axes; learns the letters that are not known."""
    if isinstance(lengths, int):
        lengths = (lengths,)
    if not isinstance(lengths, tuple) or len(lengths) != len(axes):
        return False
    return all(
        length
        == (int(axis) if axis.isdigit() else known.setdefault(axis, length))
        for length, axis in zip(lengths, axes)
    )


def _difference(
    layer: nn.Module, stock: StockLayer, x: Tensor, known: Dict[str, int]
) -> Optional[str]:
    """What is different about one layer; None if nothing is."""
    if type(layer) is not stock.cls:
        return f'is a {type(layer).__name__}'
    if stock.cls.forward is not stock.forward:
        return f'has another forward than {stock.cls.__name__} had'
    own = vars(layer)
    replaced = stock.class_attributes.intersection(own)
    if replaced:
        return f'has its own {sorted(replaced)[0]}'
    if any(own[name] for name in HOOKS):
        return 'has hooks'
    for name, axes in stock.parameters.items():
        parameter = getattr(layer, name)
        if (parameter is None) != (axes is None):
            return f'has {"no" if parameter is None else "a"} {name}'
        if parameter is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter):
            return f'has a {type(parameter).__name__} as {name}'
        if (parameter.dtype, parameter.device, parameter.layout) != (
            x.dtype,
            x.device,
            torch.strided,
        ):
            return (
                f'has its {name} as {parameter.dtype} '
                f'({parameter.layout}) on {parameter.device}'
            )
        if not _fits(tuple(parameter.shape), axes, known):
            return f'has a {name} of shape {tuple(parameter.shape)}'
    for name, axes in stock.sizes.items():
        if not _fits(getattr(layer, name), axes, known):
            return f'has {name} {getattr(layer, name)!r}'
    for name, value in stock.settings.items():
        if getattr(layer, name) != value:
            return f'has {name} {getattr(layer, name)!r}'
    return None


def find_difference(
    module: nn.Module, layers: Mapping[str, StockLayer], x: Tensor
) -> Optional[str]:
    """Find where a module's layers differ from what a fast path assumes.

    Args:
        module (nn.Module): Holds the layers.
        layers (dict[str, StockLayer]): All layers of some children of the
            module, by name. Other children are ignored.
        x (Tensor): ``(..., C)``, the input. Parameters must have its dtype
            and be on its device.

    Returns:
        str | None: The first difference, or that modules are observed by
        global hooks or modes. None if there is no difference.
    """
    if _is_observed():
        return 'global hooks or modes follow the calls of modules'
    children = {name.partition('.')[0] for name in layers}
    found = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if name.partition('.')[0] in children
    }
    if found.keys() != layers.keys():
        name = sorted(found.keys() ^ layers.keys())[0]
        return f'{name} was {"added" if name in found else "removed"}'
    known = dict(C=x.shape[-1])
    for name, stock in layers.items():
        difference = _difference(found[name], stock, x, known)
        if difference is not None:
            return f'{name} {difference}'
    return None
