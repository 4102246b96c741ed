"""Checks of pretrained weights and checkpoints against a model."""

import copy
import os
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..checkpoint import (
    CONVERTER,
    READS_RUNNER_CHECKPOINTS,
    load_checkpoint_file,
)
from ..errors import CheckpointError, UserError
from ..models import VVT
from .config import build_model, type_name

INFLATER = 'tools/model_converters/inflate_input.py'
FIRST_CONV = 'patch_embed1.proj.weight'
# Names of the parameters of VVT
STAGE = re.compile(r'(patch_embed|block|norm)\d+\.')


def _pretrained(node, where: str = 'model') -> Iterator[Tuple[str, dict]]:
    """Find each ``init_cfg`` of type 'Pretrained', and its path."""
    if isinstance(node, dict):
        names = ('Pretrained', 'PretrainedInit')
        if type_name(node) in names and 'checkpoint' in node:
            yield where, node
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}[{index}]')


def _adapters(node, where: str = 'model') -> Iterator[Tuple[str, dict]]:
    """Find each ``LoRAModel``, which keeps the weights of a module frozen."""
    if isinstance(node, dict):
        if type_name(node) == 'LoRAModel' and isinstance(
            node.get('module'), dict
        ):
            yield where, node
        for key, child in node.items():
            yield from _adapters(child, f'{where}.{key}')


def without_pretrained(cfg: Config) -> Config:
    """Return a copy of a config whose model loads no weights when built.

    mmpretrain's ``LoRAModel`` loads the weights of its module as soon as it is
    built.

    Args:
        cfg (Config): The complete config.

    Returns:
        Config: The copy.
    """
    cfg = copy.deepcopy(cfg)
    for _, adapter in _adapters(cfg.get('model')):
        adapter['module'].pop('init_cfg', None)
    return cfg


def find_pretrained_problems(cfg: Config) -> Iterator[CheckpointError]:
    """Check that the pretrained checkpoints of all ``init_cfg`` exist.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.

    Yields:
        CheckpointError: If a file is missing.
    """
    for where, init_cfg in _pretrained(cfg.get('model')):
        path = init_cfg['checkpoint']
        if not is_url(path) and not os.path.isfile(os.path.expanduser(path)):
            yield CheckpointError(
                f'no such pretrained checkpoint: {path}; download it, or '
                f'start from random weights with --cfg-options '
                f'{where}=None'
            )


def find_adapter_problems(cfg: Config) -> Iterator[UserError]:
    """Check that the frozen weights of each ``LoRAModel`` are available.

    They are not in the checkpoints of a run, so that training, testing and
    inference all read them from the file of the ``init_cfg``. Without this
    check, a file that does not fit leaves the frozen weights random.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.

    Yields:
        UserError: If a module has no ``init_cfg`` with a checkpoint.
        CheckpointError: If the file is missing.
    """
    for where, adapter in _adapters(cfg.get('model')):
        found = list(_pretrained(adapter['module'].get('init_cfg')))
        if not found:
            yield UserError(
                f'{where} (LoRAModel) keeps the weights of {where}.module '
                'frozen, but they would be random: set '
                f"{where}.module.init_cfg=dict(type='Pretrained', "
                "checkpoint='FILE', prefix='backbone.')"
            )
        for _, init_cfg in found:
            path = os.path.expanduser(init_cfg['checkpoint'])
            if not is_url(path) and not os.path.isfile(path):
                yield CheckpointError(
                    f'no such pretrained checkpoint: {path}, which has the '
                    f'frozen weights of {where}.module'
                )


def is_url(path: str) -> bool:
    """Whether a checkpoint is not a local file for mmengine."""
    return '://' in path


def _read_state(path: str) -> Optional[Dict[str, Any]]:
    """Read what mmengine takes for the tensors of a checkpoint.

    Returns:
        dict | None: None if only the runner can read the checkpoint: a URL,
        or before PyTorch 2.6 a file with more than tensors.
    """
    if is_url(path):
        return None
    try:
        checkpoint = load_checkpoint_file(os.path.expanduser(path))
    except CheckpointError:
        if READS_RUNNER_CHECKPOINTS:
            raise
        return None
    return checkpoint.get('state_dict', checkpoint)


def _select(state: Dict[str, Any], prefix: Optional[str]) -> Dict[str, Any]:
    """Return the tensors that mmengine would load, with a module's names.

    With a prefix, these are the tensors below this prefix; mmengine accepts
    it with and without the final dot. Without a prefix, mmengine removes
    ``module.`` from the names, which a distributed model writes.
    """
    if prefix is None:
        return {re.sub(r'^module\.', '', k): v for k, v in state.items()}
    prefix = prefix if prefix.endswith('.') else f'{prefix}.'
    return {
        key[len(prefix) :]: tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def _wanted(
    module: nn.Module, frozen: bool = False
) -> Dict[str, Tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint of a module must have.

    Args:
        module (nn.Module): The module.
        frozen (bool): Whether the module is inside of a ``LoRAModel``, whose
            layers are added after the weights have been loaded. Defaults to
            False.
    """
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in module.state_dict().items()
        if not key.endswith('num_batches_tracked')
    }
    if not frozen:
        return shapes
    return {
        key.replace('.original_layer.', '.'): shape
        for key, shape in shapes.items()
        if '.lora_' not in key
    }


def _sort(
    wanted: Dict[str, Tuple[int, ...]], state: Dict[str, Any]
) -> Tuple[List[str], List[str], List[str]]:
    """Names that fit, that are missing, and that have a different shape."""
    missing = [key for key in wanted if key not in state]
    other = [
        key
        for key, shape in wanted.items()
        if key in state and tuple(getattr(state[key], 'shape', ())) != shape
    ]
    excluded = {*missing, *other}
    return [key for key in wanted if key not in excluded], missing, other


def _surplus(
    module: nn.Module,
    wanted: Dict[str, Tuple[int, ...]],
    state: Dict[str, Any],
) -> List[str]:
    """Names of a VVT backbone that the file has and the model does not.

    All tensors of a shallow VVT may have the shapes of those of a deep one,
    whose other blocks would be left out without a word.
    """
    prefixes = [
        f'{name}.' if name else ''
        for name, part in module.named_modules()
        if isinstance(part, VVT)
    ]
    return [
        key
        for key in state
        for prefix in prefixes
        if key.startswith(prefix)
        and STAGE.match(key, len(prefix))
        and key not in wanted
    ]


def _some(keys: List[str]) -> str:
    shown = ', '.join(keys[:3])
    return shown + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')


def _explain_names(
    state: Dict[str, Any], prefix: Optional[str], whole: bool
) -> str:
    """Say why no name in a checkpoint fits, and what to do.

    Args:
        state (dict): The tensors of the file, with the names in the file.
        prefix (str, optional): Prefix of an ``init_cfg``.
        whole (bool): Whether the weights are for a complete model, and not
            for its backbone.
    """
    names = _select(state, None)
    official = names.get('model', names)
    if not isinstance(official, dict):
        official = names
    official = _select(official, None)
    if FIRST_CONV in official and 'head.weight' in official:
        return (
            'it is an official checkpoint that has not been converted; '
            f'convert it with {CONVERTER}'
        )
    if f'backbone.{FIRST_CONV}' in names and prefix is None and not whole:
        return "its names start with 'backbone.'; set prefix='backbone.'"
    if FIRST_CONV in names:
        if whole:
            return (
                "its names lack 'backbone.'; load it with model.backbone."
                "init_cfg=dict(type='Pretrained', checkpoint='FILE')"
            )
        return f"its names lack {prefix!r}; leave out 'prefix'"
    tensors = [key for key, t in names.items() if isinstance(t, Tensor)]
    if not tensors:
        return f'it has no tensors, but the entries {_some(list(names))}'
    return f'its names are {_some(tensors)}'


def _channel_hint(
    key: str, found: Tuple[int, ...], wanted: Tuple[int, ...]
) -> str:
    """How to change the input channels of a checkpoint, '' if they agree."""
    if not key.endswith(FIRST_CONV) or len(found) != 4 or len(wanted) != 4:
        return ''
    if found[0] != wanted[0] or found[1] == wanted[1]:
        return ''
    return (
        f'; to convert a checkpoint of {found[1]} input channels to '
        f'{wanted[1]}, use {INFLATER}'
    )


def _check_fit(
    module: nn.Module,
    path: str,
    prefix: Optional[str],
    what: str,
    frozen: bool = False,
) -> None:
    """Raise CheckpointError if a file does not have a module's weights."""
    everything = _read_state(path)
    if everything is None:
        return
    state, wanted = _select(everything, prefix), _wanted(module, frozen)
    fitting, missing, other = _sort(wanted, state)
    hint = ''
    if not fitting and not other:
        whole = any(key.startswith('backbone.') for key in wanted)
        example = f'{missing[0]} is missing' if missing else 'it is empty'
        hint = f'; {_explain_names(everything, prefix, whole)}'
    elif missing:
        example = f'{missing[0]} is missing'
    elif other:
        key = other[0]
        found = tuple(getattr(state[key], 'shape', ()))
        example = (
            f'{key} has shape {found}, the model requires {tuple(wanted[key])}'
        )
        hint = _channel_hint(key, found, wanted[key])
    else:
        _check_surplus(what, module, wanted, state)
        return
    raise CheckpointError(
        f'{what} does not match the architecture of the model: '
        f'{len(missing)} of {len(wanted)} tensors are missing and '
        f'{len(other)} have a different shape; for example, {example}{hint}'
    )


def _check_surplus(
    what: str,
    module: nn.Module,
    wanted: Dict[str, Tuple[int, ...]],
    state: Dict[str, Any],
) -> None:
    """Raise CheckpointError if a file is that of a larger VVT."""
    surplus = _surplus(module, wanted, state)
    if surplus:
        raise CheckpointError(
            f'{what} does not match the architecture of the model: '
            f'{len(surplus)} tensors of the backbone are not in the model; '
            f'for example, {surplus[0]}'
        )


def _unwrap(model: Any) -> Any:
    """Return the model inside distributed and test-time wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _submodule(model: nn.Module, where: str) -> Optional[nn.Module]:
    """Return the module whose config has the path ``where``."""
    names = re.sub(r'\[(\d+)\]', r'.\1', where).split('.')
    try:
        names = names[1 : names.index('init_cfg')]  # without 'model'
        return model.get_submodule('.'.join(names))
    except (AttributeError, ValueError):
        return None  # The model has other names than its config.


def check_pretrained(cfg: Config, model: nn.Module) -> List[str]:
    """Check that the checkpoints of all ``init_cfg`` fit their modules.

    Without this check, mmengine loads the matching tensors, prints a warning
    for the others and continues training.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.
        model (nn.Module): Model built from the config.

    Returns:
        list[str]: Which weights of a complete model stay random, one line for
        each checkpoint of which only a part fits.

    Raises:
        CheckpointError: If tensors of a part of the model, such as the
            backbone, are missing or have a different shape, or if no tensor
            fits a complete model. The message is one line.
    """
    notes = []
    frozen = [f'{where}.module' for where, _ in _adapters(cfg.get('model'))]
    for where, init_cfg in _pretrained(cfg.get('model')):
        path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix')
        module = _submodule(_unwrap(model), where)
        if module is None:
            continue
        if module is _unwrap(model) and prefix is None:
            notes += describe_weights(path, module, 'model.init_cfg')
            continue
        owner = where.split('.init_cfg')[0]
        what = f'the pretrained {owner.removeprefix("model.")} in {path}'
        _check_fit(module, path, prefix, what, frozen=owner in frozen)
    return notes


def check_frozen_weights(cfg: Config) -> None:
    """Check the frozen weights of each ``LoRAModel``, before testing.

    Args:
        cfg (Config): The complete config. Checkpoints with a URL are skipped.

    Raises:
        UserError: If a module has no ``init_cfg`` with a checkpoint.
        CheckpointError: If a checkpoint is missing or does not fit.
    """
    adapters = list(_adapters(cfg.get('model')))
    for error in find_adapter_problems(cfg):
        raise error
    model = build_model(without_pretrained(cfg)) if adapters else None
    for where, adapter in adapters:
        module = _submodule(_unwrap(model), f'{where}.module.init_cfg')
        for _, init_cfg in _pretrained(adapter['module'].get('init_cfg')):
            if module is not None:
                path = init_cfg['checkpoint']
                _check_fit(
                    module,
                    path,
                    init_cfg.get('prefix'),
                    f'the pretrained {where[6:]}.module in {path}',
                    frozen=True,
                )


def describe_weights(path: str, model: nn.Module, setting: str) -> List[str]:
    """Check a checkpoint from which a complete model is initialized.

    Tensors that are missing or have a different shape keep their random
    values, as those of a head with another number of classes should.

    Args:
        path (str): Checkpoint file; URLs are skipped.
        model (nn.Module): Model to be initialized.
        setting (str): Name of the setting with the path, for messages.

    Returns:
        list[str]: A line that names the tensors that are left out; empty if
        all fit.

    Raises:
        CheckpointError: If no tensor of the model, or none of its backbone,
            is in the file, or if the file is that of a larger backbone. The
            message is one line.
    """
    state = _read_state(path)
    if state is None:
        return []
    names, wanted = _select(state, None), _wanted(_unwrap(model))
    fitting, missing, other = _sort(wanted, names)
    parts = ('backbone.', '')
    for prefix in parts:
        part = [key for key in wanted if key.startswith(prefix)]
        if part and not set(part) & set(fitting):
            what = 'backbone' if prefix else 'model'
            lora = any('.lora_' in key for key in part)
            why = (
                'the frozen weights of LoRAModel are loaded with '
                'model.backbone.module.init_cfg'
                if lora and f'backbone.{FIRST_CONV}' in names
                else _explain_shapes(wanted, names, part)
                or _explain_names(state, None, whole=True)
            )
            raise CheckpointError(
                f'{setting}={path} has no weights for the {what}, which '
                f'would start from random weights: {why}'
            )
    _check_surplus(f'{setting}={path}', _unwrap(model), wanted, names)
    reasons = []
    if missing:
        reasons.append(f'{_some(missing)} (not in the file)')
    if other:
        key = other[0]
        found = tuple(getattr(names[key], 'shape', ()))
        reasons.append(
            f'{_some(other)} (different shape, such as {found} instead of '
            f'{wanted[key]})' + _channel_hint(key, found, wanted[key])
        )
    if not reasons:
        return []
    return [
        f'{setting}={path} has {len(fitting)} of {len(wanted)} tensors of the '
        f'model; these start from random weights: {"; ".join(reasons)}'
    ]


def _explain_shapes(
    wanted: Dict[str, Tuple[int, ...]],
    names: Dict[str, Any],
    part: List[str],
) -> Optional[str]:
    """Name a tensor whose shape differs, None if all names differ."""
    for key in part:
        if key in names:
            found = tuple(getattr(names[key], 'shape', ()))
            return (
                f'the architecture differs, {key} has shape {found} instead '
                f'of {wanted[key]}'
            )
    return None


def describe_initial_weights(cfg: Config, model: nn.Module) -> List[str]:
    """Check the weights from which training starts, and say what is random.

    Args:
        cfg (Config): The complete config of a training run.
        model (nn.Module): Model built from the config.

    Returns:
        list[str]: Lines for the log, see :func:`describe_weights`, or one
        that says that the complete model is random.

    Raises:
        CheckpointError: If a checkpoint does not fit.
    """
    if cfg.get('resume'):
        return []  # check_resumable has read the checkpoint.
    notes = check_pretrained(cfg, model)
    path = cfg.get('load_from')
    if path:
        notes += describe_weights(path, model, 'load_from')
    elif next(_pretrained(cfg.get('model')), None) is None:
        notes.append(
            'the model starts from random weights: neither load_from nor an '
            'init_cfg names a checkpoint'
        )
    return notes


def check_checkpoint(path: str, model: nn.Module) -> None:
    """Check that a checkpoint fits a model before testing.

    Without this check, mmengine loads the matching tensors, prints a warning
    for the others and tests a partly random model.

    Args:
        path (str): Checkpoint file; URLs are skipped.
        model (nn.Module): Model to be tested.

    Raises:
        CheckpointError: If tensors are missing in the checkpoint, have a
            different shape, or if the file is that of a larger backbone. The
            message is one line.
    """
    _check_fit(_unwrap(model), path, None, f'the checkpoint {path}')
