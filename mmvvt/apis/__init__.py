"""Public Python API: models by name, inference, export and ablations.

Importing it adds the classifiers to the models of mmpretrain, so that
``mmpretrain.get_model`` and the inferencers of mmpretrain find them by name.
"""

from .ablation import (
    Variant,
    prepare_variants,
    run_grid,
    select_results,
)
from .attention import AttentionMaps, attention_maps
from .cam import ActivationMap, ActivationMaps, class_activation_maps
from .dry_run import dry_run
from .export import ExportResult, export_model
from .memory import keep_freed_memory
from .model_zoo import get_model, list_models, register_with_mmpretrain
from .predictor import Predictor, choose_device, find_images

register_with_mmpretrain()

__all__ = [
    'ActivationMap',
    'ActivationMaps',
    'AttentionMaps',
    'ExportResult',
    'Predictor',
    'Variant',
    'attention_maps',
    'choose_device',
    'class_activation_maps',
    'dry_run',
    'export_model',
    'find_images',
    'get_model',
    'keep_freed_memory',
    'list_models',
    'prepare_variants',
    'run_grid',
    'select_results',
]
