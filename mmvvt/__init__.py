"""Vicinity Vision Transformer for OpenMMLab.

Importing it registers the backbone, data sets, hooks and optimizer wrapper
with mmengine, and lets ``torch.load`` read the runner's checkpoints with its
safe default.
"""

from . import datasets, engine, models
from .checkpoint import register_safe_globals
from .version import __version__

register_safe_globals()

__all__ = ['__version__', 'datasets', 'engine', 'models']
