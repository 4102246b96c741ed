"""Conversion from and to official checkpoints, and safe loading."""

from ..errors import CheckpointError
from .convert import (
    convert_official,
    convert_to_official,
    infer_arch,
    official_shapes,
)
from .safe_load import (
    READS_RUNNER_CHECKPOINTS,
    load_checkpoint_file,
    register_safe_globals,
    save_checkpoint_file,
)

__all__ = [
    'READS_RUNNER_CHECKPOINTS',
    'CheckpointError',
    'convert_official',
    'convert_to_official',
    'infer_arch',
    'load_checkpoint_file',
    'official_shapes',
    'register_safe_globals',
    'save_checkpoint_file',
]
