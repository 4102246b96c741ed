"""Published weights of the classifiers, converted and stored by the user.

The authors published their weights as files in their own format. This project
does not host them: the user downloads and converts a file. Its address for
mmengine is ``mmvvt://`` and the name of the converted file, for example in
``load_from`` and in the metafiles, where mmpretrain finds it.
"""

import os
from typing import Any, Dict, List

import torch
from mmengine.runner import CheckpointLoader

from ..arch import ARCH_SETTINGS
from ..errors import CheckpointError
from .convert import convert_to_official
from .safe_load import load_checkpoint_file

SCHEME = 'mmvvt://'
OFFICIAL_REPOSITORY = (
    'https://github.com/OpenNLPLab/Vicinity-Vision-Transformer'
)
CONVERT = 'python -m mmvvt convert'
"""Command that converts official checkpoints."""
CONVERTER = 'tools/model_converters/official_to_mmvvt.py'
"""The same as a file of a clone."""
# Architecture by name of the converted file
PUBLISHED: Dict[str, str] = {
    f'vvt-{arch}_in1k{size}.pth': arch
    for arch in ARCH_SETTINGS
    for size in ('', '-384px')
}


def weight_folders() -> List[str]:
    """Return the folders that are searched for converted weights, in order.

    Returns:
        list[str]: ``pretrained`` in the current folder, where the recipes for
        segmentation and detection expect them, and the folder of
        ``torch.hub``, by default ``~/.cache/torch/hub/checkpoints``.
    """
    return ['pretrained', os.path.join(torch.hub.get_dir(), 'checkpoints')]


def find_weights(url: str) -> str:
    """Find the converted file of published weights.

    Args:
        url (str): ``mmvvt://`` and the name of the file, such as
            'mmvvt://vvt-tiny_in1k.pth' and 'mmvvt://vvt-tiny_in1k-384px.pth'.

    Returns:
        str: Path of the file.

    Raises:
        CheckpointError: If no weights with this name were published, or if
            the file is missing. The message describes how to create it.
    """
    name = url[len(SCHEME) :]
    if name not in PUBLISHED:
        raise CheckpointError(
            f'no published weights: {url}; allowed are {SCHEME} and '
            f'{", ".join(PUBLISHED)}'
        )
    folders = weight_folders()
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise CheckpointError(
        f'{name} is neither in {folders[0]}/ nor in {folders[1]}/: download '
        f'the official file, which {OFFICIAL_REPOSITORY} links to, and '
        f'convert it: {CONVERT} FILE {folders[0]}/{name}, which runs '
        f'{CONVERTER}'
    )


@CheckpointLoader.register_scheme(prefixes=SCHEME, force=True)
def load_from_mmvvt(filename: str, map_location: Any = None) -> dict:
    """Read published weights for mmengine, see :func:`find_weights`.

    Args:
        filename (str): ``mmvvt://`` and the name of the file.
        map_location (Any): Not used; the tensors are on the CPU.

    Returns:
        dict: ``state_dict`` and ``meta``.

    Raises:
        CheckpointError: If the file is missing, cannot be read, is not
            converted or has another architecture than its name.
    """
    path = find_weights(filename)
    checkpoint = load_checkpoint_file(path)
    try:
        # mmengine would load the matching tensors of any file.
        convert_to_official(checkpoint, PUBLISHED[filename[len(SCHEME) :]])
    except CheckpointError as error:
        raise CheckpointError(
            f'{path} was not converted with {CONVERT} ({CONVERTER}): {error}'
        ) from error
    return checkpoint
