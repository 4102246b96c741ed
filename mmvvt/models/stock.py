"""Check that layers are unmodified before a fast path bypasses them.

A fast path reads the weights of layers without calling the layers. This is
correct only if the layers are the ones that it was written for. Users may
replace, prune, quantise, re-parametrise or wrap layers, change their settings,
or register hooks on them, individually or globally. A fast path therefore
declares the layers that it replaces in a table of :class:`StockLayer`, and
runs only if :func:`find_difference` returns None. Otherwise, the layers are
called as usual.
"""

from dataclasses import dataclass, field
from typing import Callable, Dict, FrozenSet, Mapping, Optional, Sequence, Type

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module

from mmvvt.ops.autograd import has_modes

# PyTorch has no public interface for most of what this file reads: hooks, and
# whether a method has been replaced.
HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
# Hooks of all modules, by name in torch.nn.modules.module. The dictionaries of
# hooks that are always called, or with keyword arguments, have the same keys.
GLOBAL_HOOKS = tuple(f'_global{name}' for name in HOOKS)
_MODULE_CALL = nn.Module.__call__


@dataclass
class StockLayer:
    """Description of a layer that a fast path replaces.

    Attributes:
        cls (type): Exact class of the layer; subclasses do not match.
        parameters (dict[str, str | None]): Shape of each parameter, one
            character per axis: a digit is a fixed length, a letter is a
            variable length. A letter denotes the same length in the whole
            table; ``C`` is the number of input channels. None means that the
            parameter must be None.
        sizes (dict[str, str]): Attributes that hold lengths, in the same
            notation. A single character matches an int or a tuple of length
            one.
        settings (dict[str, object]): Other attributes and their required
            values.
        forward (Callable): ``cls.forward`` when the table was created.
        class_attributes (frozenset[str]): Names of the attributes of ``cls``
            when the table was created.
    """

    cls: Type[nn.Module]
    parameters: Mapping[str, Optional[str]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    forward: Callable = field(init=False)
    class_attributes: FrozenSet[str] = field(init=False)

    def __post_init__(self):
        self.forward = self.cls.forward
        self.class_attributes = frozenset(dir(self.cls))


def _is_observed() -> bool:
    """Whether global hooks or modes observe the calls of modules."""
    return (
        any(getattr(torch_module, name) for name in GLOBAL_HOOKS)
        or nn.Module.__call__ is not _MODULE_CALL
        or has_modes()
    )


def _fits(lengths, axes: str, known: Dict[str, int]) -> bool:
    """Whether lengths match axes; adds new letters to ``known``."""
    if isinstance(lengths, int):
        lengths = (lengths,)
    if not isinstance(lengths, tuple) or len(lengths) != len(axes):
        return False
    for length, axis in zip(lengths, axes):
        if length != (
            known.setdefault(axis, length) if axis > '9' else int(axis)
        ):
            return False
    return True


def _difference(
    layer: nn.Module,
    stock: StockLayer,
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    known: Dict[str, int],
) -> Optional[str]:
    """Return how a layer differs from its description, or None."""
    if type(layer) is not stock.cls:
        return f'is a {type(layer).__name__}'
    if stock.cls.forward is not stock.forward:
        return 'has a class whose forward method was replaced'
    own = vars(layer)
    replaced = stock.class_attributes.intersection(own)
    if replaced:
        return f'overrides {sorted(replaced)[0]}'
    for name in HOOKS:
        if own[name]:
            return 'has hooks'
    parameters = own['_parameters']
    for name, axes in stock.parameters.items():
        # Faster than getattr, which first looks for other attributes.
        is_parameter = name in parameters and name not in own
        parameter = parameters[name] if is_parameter else getattr(layer, name)
        if (parameter is None) != (axes is None):
            return f'has {"no" if parameter is None else "a"} {name}'
        if parameter is None or axes is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter):
            return f'has a {type(parameter).__name__} as {name}'
        if (
            parameter.dtype not in dtypes
            or parameter.device != x.device
            or parameter.layout != torch.strided
        ):
            return (
                f'has a {name} of dtype {parameter.dtype} '
                f'({parameter.layout}) on {parameter.device}'
            )
        if not _fits(parameter.shape, axes, known):
            return f'has a {name} of shape {tuple(parameter.shape)}'
    for name, axes in stock.sizes.items():
        if not _fits(getattr(layer, name), axes, known):
            return f'has {name} {getattr(layer, name)!r}'
    for name, value in stock.settings.items():
        if getattr(layer, name) != value:
            return f'has {name} {getattr(layer, name)!r}'
    return None


def _collect(
    name: str, module: nn.Module, found: Dict[str, nn.Module]
) -> None:
    """Add a module and its submodules to a dict, in less time than PyTorch."""
    found[name] = module
    for child_name, child in module._modules.items():
        if child is not None:
            _collect(f'{name}.{child_name}', child, found)


def is_unmodified(module: nn.Module, cls: Type[nn.Module]) -> bool:
    """Check the class of a module, and that it has no hooks of its own.

    Args:
        module (nn.Module): The module; its children are not checked.
        cls (type): Exact class; subclasses do not match.

    Returns:
        bool: True if calling the module calls ``cls.forward`` only.
    """
    own = vars(module)
    return (
        type(module) is cls
        and not frozenset(dir(cls)).intersection(own)
        and not any(own[name] for name in HOOKS)
    )


def find_difference(
    module: nn.Module,
    layers: Mapping[str, StockLayer],
    x: Tensor,
    dtypes: Optional[Sequence[torch.dtype]] = None,
) -> Optional[str]:
    """Find the first difference between a module and a table of layers.

    Args:
        module (nn.Module): Module that contains the layers.
        layers (dict[str, StockLayer]): Expected layers by name. The table
            must list all submodules of every child that it mentions; other
            children of the module are ignored.
        x (Tensor): Input ``(..., C)``. Parameters must be on its device.
        dtypes (Sequence[torch.dtype], optional): Allowed dtypes of the
            parameters. Defaults to None, the dtype of ``x`` only.

    Returns:
        str | None: Description of the first difference, or a note that global
        hooks or modes observe the calls of modules. None if there is no
        difference.
    """
    if _is_observed():
        return 'global hooks or modes observe the calls of modules'
    found: Dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if name in layers and child is not None:
            _collect(name, child, found)
    if found.keys() != layers.keys():
        name = sorted(found.keys() ^ layers.keys())[0]
        return f'{name} was {"added" if name in found else "removed"}'
    known = dict(C=x.shape[-1])
    for name, stock in layers.items():
        difference = _difference(
            found[name], stock, x, dtypes or (x.dtype,), known
        )
        if difference is not None:
            return f'{name} {difference}'
    return None
