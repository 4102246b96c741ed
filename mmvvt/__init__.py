"""Vicinity Vision Transformer for OpenMMLab.

Importing this package registers its modules (backbone, datasets, transforms,
hooks, metrics, optimizer wrapper and its constructor, worker init function)
with mmengine, lets it find the configs of the package as ``mmvvt::PATH``, and
adds entries to the allow-list of ``torch.load``, so that it
reads checkpoints of mmengine's runner with ``weights_only=True``. Messages of
its own logger, ``mmvvt``, go to mmengine's log. It changes nothing else in the
process.
"""

from . import datasets, engine, models
from .checkpoint import register_safe_globals
from .shipped import register_config_prefix
from .version import __version__

register_config_prefix()
register_safe_globals()
engine.connect_logger()

__all__ = ['__version__', 'datasets', 'engine', 'models']
