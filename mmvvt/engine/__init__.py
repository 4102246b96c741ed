"""What training needs beside the model."""

from .optim_constructor import MergedOptimWrapperConstructor
from .optim_wrapper import auto_amp_optim_wrapper
from .reproducible import EpochSeedHook, MeanLossHook, seed_worker

__all__ = [
    'EpochSeedHook', 'MeanLossHook', 'MergedOptimWrapperConstructor',
    'auto_amp_optim_wrapper', 'seed_worker'
]
