"""Conversion between official and mmpretrain checkpoints."""

import re
from typing import Dict, Optional, Tuple, Union

from torch import Tensor

from ..arch import ARCH_SETTINGS, NUM_STAGES, resolve_arch
from ..errors import CheckpointError

State = Dict[str, Tensor]


def official_shapes(
    arch: dict, num_classes: int, in_channels: int = 3, se_ratio: int = 1
) -> Dict[str, Tuple[int, ...]]:
    """Return the keys and tensor shapes of an official checkpoint.

    Args:
        arch (dict): Architecture as returned by
            :func:`mmvvt.arch.resolve_arch`. The shapes do not depend on the
            number of heads.
        num_classes (int): Number of classes of the classifier.
        in_channels (int): Number of image channels. Defaults to 3.
        se_ratio (int): Channel reduction ratio of the FPC gate. Defaults to 1.

    Returns:
        dict[str, tuple[int, ...]]: Shape of each tensor by key.
    """
    shapes: Dict[str, Tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f'{name}.weight'] = weight
        shapes[f'{name}.bias'] = weight[:1]

    previous = in_channels
    for i in range(1, NUM_STAGES + 1):
        dims, depth, fr, sr, ratio = (
            arch[key][i - 1]
            for key in (
                'embed_dims',
                'depths',
                'fr_ratios',
                'sr_ratios',
                'mlp_ratios',
            )
        )
        kernel = 7 if i == 1 else 3
        layer(f'patch_embed{i}.proj', dims, previous, kernel, kernel)
        layer(f'patch_embed{i}.norm', dims)
        for j in range(depth):
            block = f'block{i}.{j}'
            layer(f'{block}.norm1', dims)
            for name in ('q_proj', 'k_proj', 'v_proj'):
                layer(f'{block}.attn.{name}', dims // fr, dims)
            layer(f'{block}.attn.out_proj', dims, dims // fr)
            hidden = dims // se_ratio
            shapes[f'{block}.attn.se_fc.0.weight'] = (hidden, dims)
            shapes[f'{block}.attn.se_fc.2.weight'] = (dims, hidden)
            if sr > 1:
                layer(f'{block}.attn.sr', dims, dims, sr, sr)
                layer(f'{block}.attn.norm', dims)
            layer(f'{block}.norm2', dims)
            layer(f'{block}.mlp.fc1', dims * ratio, dims)
            layer(f'{block}.mlp.dwconv.dwconv', dims * ratio, 1, 3, 3)
            layer(f'{block}.mlp.fc2', dims, dims * ratio)
        layer(f'norm{i}', dims)
        previous = dims
    layer('head', num_classes, previous)
    return shapes


def _size(state: State, key: str, axis: int) -> int:
    """Return the size of a required tensor along an axis, at least 1."""
    if key not in state:
        raise CheckpointError(f'not a VVT classifier: {key} is missing')
    tensor = state[key]
    if not isinstance(tensor, Tensor) or tensor.dim() <= axis:
        raise CheckpointError(
            f'not a VVT classifier: {key} is not the weight of a layer'
        )
    return max(tensor.shape[axis], 1)


def infer_arch(state: State) -> dict:
    """Infer the architecture from the tensors of an official checkpoint.

    Args:
        state (dict[str, Tensor]): State dict with official keys, without the
            prefix ``module.``.

    Returns:
        dict: ``embed_dims``, ``mlp_ratios``, ``depths``, ``fr_ratios`` and
        ``sr_ratios``, each a list of four integers. The number of heads
        cannot be inferred from the tensors.

    Raises:
        CheckpointError: If a tensor needed for this is missing.
    """

    arch: dict = {
        key: []
        for key in (
            'embed_dims',
            'mlp_ratios',
            'depths',
            'fr_ratios',
            'sr_ratios',
        )
    }
    for i in range(1, NUM_STAGES + 1):
        dims = _size(state, f'patch_embed{i}.proj.weight', 0)
        first = f'block{i}.0'
        arch['embed_dims'].append(dims)
        arch['mlp_ratios'].append(
            _size(state, f'{first}.mlp.fc1.weight', 0) // dims
        )
        arch['fr_ratios'].append(
            dims // _size(state, f'{first}.attn.q_proj.weight', 0)
        )
        sr_key = f'{first}.attn.sr.weight'
        arch['sr_ratios'].append(
            _size(state, sr_key, 2) if sr_key in state else 1
        )
        pattern = re.compile(rf'block{i}\.(\d+)\.')
        found = [int(m.group(1)) for m in map(pattern.match, state) if m]
        arch['depths'].append(max(found) + 1)
    return arch


def _name_arch(arch: dict) -> str:
    """Return the name of a published architecture.

    Raises:
        CheckpointError: If no published architecture matches.
    """
    for name in ARCH_SETTINGS:
        published = resolve_arch(name)
        if all(published[key] == value for key, value in arch.items()):
            return name
    found = ', '.join(f'{key} {value}' for key, value in arch.items())
    depths = {name: s['depths'] for name, s in ARCH_SETTINGS.items()}
    raise CheckpointError(
        f'the tensors do not match a published architecture: {found}; the '
        f'published depths are {depths}. The file is truncated, or it has a '
        'custom architecture, which must be passed as arch'
    )


def _check_tensors(state: State, arch: Optional[Union[str, dict]]) -> str:
    """Compare all keys and tensor shapes with an architecture.

    Returns:
        str: Name of the architecture; 'custom' if it was given as a dict.

    Raises:
        CheckpointError: If a key or a shape does not match.
        UserError: If ``arch`` is invalid.
    """
    found = infer_arch(state)
    if arch is None:
        name = _name_arch(found)
        expected_arch = resolve_arch(name)
    else:
        name = arch if isinstance(arch, str) else 'custom'
        expected_arch = resolve_arch(arch)
        wrong = [
            f'{key} {found[key]} instead of {expected_arch[key]}'
            for key in found
            if found[key] != expected_arch[key]
        ]
        if wrong:
            raise CheckpointError(
                f'the tensors do not match arch {name}: {"; ".join(wrong)}'
            )
    se_ratio = 1
    if isinstance(arch, dict):  # All published models have se_ratio 1.
        gate = _size(state, 'block1.0.attn.se_fc.0.weight', 0)
        se_ratio = max(expected_arch['embed_dims'][0] // gate, 1)
    expected = official_shapes(
        expected_arch,
        num_classes=_size(state, 'head.weight', 0),
        in_channels=_size(state, 'patch_embed1.proj.weight', 1),
        se_ratio=se_ratio,
    )

    def listing(keys) -> str:
        keys = sorted(keys)
        more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
        return ', '.join(keys[:3]) + more

    missing = set(expected) - set(state)
    unknown = set(state) - set(expected)
    if missing or unknown:
        parts = [f'missing {listing(missing)}'] if missing else []
        parts += [f'unknown {listing(unknown)}'] if unknown else []
        raise CheckpointError(
            f'the keys do not match arch {name}: {"; ".join(parts)}'
        )
    for key, shape in expected.items():
        tensor = state[key]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f'{key} is not a floating-point tensor')
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f'{key} has shape {tuple(tensor.shape)}, '
                f'arch {name} needs {shape}'
            )
    return name


def _tensors_of(checkpoint: dict, entry: str) -> State:
    """Return ``checkpoint[entry]`` if it exists, otherwise ``checkpoint``.

    The prefix ``module.`` is removed if all keys have it.
    """
    state = checkpoint.get(entry, checkpoint)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f'{entry!r} contains no tensors')
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError('the keys of the tensors are not strings')
    if all(key.startswith('module.') for key in state):
        state = {key[len('module.') :]: t for key, t in state.items()}
    return state


def convert_official(
    state_or_checkpoint: dict, arch: Optional[Union[str, dict]] = None
) -> dict:
    """Convert an official checkpoint to that of an mmpretrain classifier.

    Args:
        state_or_checkpoint (dict): An official state dict, or a training
            checkpoint with a state dict under 'model'. All keys may have the
            prefix ``module.``.
        arch (str | dict, optional): Expected architecture of the checkpoint,
            see :func:`mmvvt.arch.resolve_arch`. Defaults to None: the
            architecture is inferred from the tensors and must be one of the
            published ones.

    Returns:
        dict: ``state_dict`` with the keys ``backbone.*`` and ``head.fc.*``,
        and ``meta`` with the name of the architecture. The tensors are shared
        with the input, not copied.

    Raises:
        CheckpointError: If the checkpoint is truncated, is not that of a VVT
            classifier or has a different architecture; the message names the
            difference.
        UserError: If ``arch`` is invalid.
    """
    state = _tensors_of(state_or_checkpoint, 'model')
    name = _check_tensors(state, arch)
    converted = {}
    for key, tensor in state.items():
        head = key.startswith('head.')
        converted[f'head.fc.{key[5:]}' if head else f'backbone.{key}'] = tensor
    return dict(state_dict=converted, meta=dict(arch=name))


def convert_to_official(
    checkpoint: dict, arch: Optional[Union[str, dict]] = None
) -> dict:
    """Convert the checkpoint of an mmpretrain classifier to an official one.

    Args:
        checkpoint (dict): Checkpoint from :func:`convert_official` or from
            mmengine's runner.
        arch (str | dict, optional): Expected architecture, see
            :func:`convert_official`. Defaults to None.

    Returns:
        dict: ``model`` with the official state dict.

    Raises:
        CheckpointError: If the checkpoint is not that of a VVT classifier or
            has a different architecture.
        UserError: If ``arch`` is invalid.
    """
    state = _tensors_of(checkpoint, 'state_dict')
    official = {}
    for key, tensor in state.items():
        if key.startswith('backbone.'):
            official[key[len('backbone.') :]] = tensor
        elif key.startswith('head.fc.'):
            official[f'head.{key[len("head.fc.") :]}'] = tensor
        else:
            raise CheckpointError(
                f'{key} is not a key of a VVT classifier; allowed are '
                'backbone.* and head.fc.*'
            )
    _check_tensors(official, arch)
    return dict(model=official)
