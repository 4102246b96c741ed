"""Checks before a run; they raise :class:`mmvvt.errors.UserError`."""

from .config import INSTALL_HINTS, dataset_class, read_config
from .data import check_data, check_label_maps
from .weights import (
    check_checkpoint,
    check_pretrained_backbone,
    check_pretrained_files,
)

__all__ = [
    'INSTALL_HINTS',
    'check_checkpoint',
    'check_data',
    'check_label_maps',
    'check_pretrained_backbone',
    'check_pretrained_files',
    'dataset_class',
    'read_config',
]
