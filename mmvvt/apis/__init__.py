"""Public Python API for inference."""

from .dry_run import dry_run
from .memory import keep_freed_memory
from .predictor import Predictor, choose_device, find_images

__all__ = [
    'Predictor',
    'choose_device',
    'dry_run',
    'find_images',
    'keep_freed_memory',
]
