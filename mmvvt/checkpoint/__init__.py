"""Conversion from and to official checkpoints, and safe loading."""

from ..errors import CheckpointError
from .convert import (
    convert_official,
    convert_to_official,
    infer_arch,
    official_shapes,
)
from .inflate import inflate_input
from .predictions import load_predictions
from .published import CONVERT, CONVERTER, find_weights, weight_folders
from .resume import check_resumable, find_resumable
from .safe_load import (
    READS_RUNNER_CHECKPOINTS,
    load_checkpoint_file,
    read_checkpoint,
    register_safe_globals,
    save_checkpoint_file,
)

__all__ = [
    'CONVERT',
    'CONVERTER',
    'READS_RUNNER_CHECKPOINTS',
    'CheckpointError',
    'check_resumable',
    'convert_official',
    'convert_to_official',
    'find_resumable',
    'find_weights',
    'infer_arch',
    'inflate_input',
    'load_checkpoint_file',
    'load_predictions',
    'official_shapes',
    'read_checkpoint',
    'register_safe_globals',
    'save_checkpoint_file',
    'weight_folders',
]
