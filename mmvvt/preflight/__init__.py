"""Checks before a run; they raise :class:`mmvvt.errors.UserError`."""

from .config import (
    INSTALL_HINTS,
    build_model,
    class_names,
    dataset_class,
    guard_pipelines,
    innermost_datasets,
    read_config,
    type_name,
)
from .run import check_testing, check_training, explain_error
from .weights import check_checkpoint, check_frozen_weights

__all__ = [
    'INSTALL_HINTS',
    'build_model',
    'check_checkpoint',
    'check_frozen_weights',
    'check_testing',
    'check_training',
    'class_names',
    'dataset_class',
    'explain_error',
    'guard_pipelines',
    'innermost_datasets',
    'read_config',
    'type_name',
]
