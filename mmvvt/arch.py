"""Published architectures and validation of user-defined ones."""

from typing import Union

from .errors import UserError

# Architectures of the paper (arXiv 2206.10552, table 1) and official code.
ARCH_SETTINGS = {
    'tiny': dict(
        embed_dims=[96, 160, 320, 512],
        num_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
        depths=[2, 2, 2, 2],
    ),
    'small': dict(
        embed_dims=[96, 160, 320, 512],
        num_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
        depths=[3, 3, 9, 3],
    ),
    'medium': dict(
        embed_dims=[96, 160, 320, 512],
        num_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
        depths=[3, 3, 27, 3],
    ),
    'large': dict(
        embed_dims=[96, 160, 320, 512],
        num_heads=[1, 2, 5, 8],
        mlp_ratios=[4, 4, 4, 4],
        depths=[4, 4, 36, 4],
    ),
}

NUM_STAGES = 4
REQUIRED_KEYS = ('embed_dims', 'num_heads', 'mlp_ratios', 'depths')
OPTIONAL_KEYS = {'fr_ratios': 2, 'sr_ratios': 1}


def resolve_arch(arch: Union[str, dict]) -> dict:
    """Validate an architecture and fill in its default values.

    Args:
        arch (str | dict): 'tiny', 'small', 'medium' or 'large', or a dict
            with the required keys ``embed_dims``, ``num_heads``,
            ``mlp_ratios`` and ``depths`` and the optional keys ``fr_ratios``
            (feature reduction ratios, 2 in each stage by default) and
            ``sr_ratios`` (spatial reduction ratios, 1 in each stage by
            default). Each value is a list of four positive integers, one per
            stage.

    Returns:
        dict: All six keys; each value is a list of four integers.

    Raises:
        UserError: If the name is unknown, a key is missing or unknown, a
            value is not a list of four positive integers, or ``embed_dims``
            is not divisible by ``fr_ratio * num_heads`` in some stage.
    """
    if isinstance(arch, str):
        if arch not in ARCH_SETTINGS:
            raise UserError(
                f'arch must be one of {list(ARCH_SETTINGS)} or a '
                f'dict, got {arch!r}'
            )
        settings = dict(ARCH_SETTINGS[arch])
    elif isinstance(arch, dict):
        settings = dict(arch)
    else:
        raise UserError(f'arch must be a name or a dict, got {arch!r}')

    missing = [key for key in REQUIRED_KEYS if key not in settings]
    if missing:
        raise UserError(
            f'arch is missing the keys {missing}; required are '
            f'{list(REQUIRED_KEYS)}'
        )
    unknown = sorted(set(settings) - set(REQUIRED_KEYS) - set(OPTIONAL_KEYS))
    if unknown:
        raise UserError(
            f'arch has unknown keys {unknown}; allowed are '
            f'{[*REQUIRED_KEYS, *OPTIONAL_KEYS]}'
        )
    for key, default in OPTIONAL_KEYS.items():
        settings.setdefault(key, [default] * NUM_STAGES)
    for key, values in settings.items():
        if (
            not isinstance(values, (list, tuple))
            or len(values) != NUM_STAGES
            or not all(isinstance(n, int) and n > 0 for n in values)
        ):
            raise UserError(
                f'arch[{key!r}] must be {NUM_STAGES} positive '
                f'integers, one per stage, got {values!r}'
            )
        settings[key] = list(values)
    for stage, (dims, heads, fr) in enumerate(
        zip(
            settings['embed_dims'],
            settings['num_heads'],
            settings['fr_ratios'],
        )
    ):
        if dims % (fr * heads):
            raise UserError(
                f'embed_dims {dims} of stage {stage} must be divisible by '
                f'fr_ratio * num_heads = {fr} * {heads}'
            )
    return settings
