"""Public Python API for inference and export."""

from .attention import AttentionMaps, attention_maps
from .dry_run import dry_run
from .export import ExportResult, export_model
from .memory import keep_freed_memory
from .predictor import Predictor, choose_device, find_images

__all__ = [
    'AttentionMaps',
    'ExportResult',
    'Predictor',
    'attention_maps',
    'choose_device',
    'dry_run',
    'export_model',
    'find_images',
    'keep_freed_memory',
]
