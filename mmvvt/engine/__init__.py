"""Hooks, metrics and optimizer wrappers registered with mmengine."""

from .checkpoint_hook import SafeCheckpointHook
from .hooks import (
    CompileBackboneHook,
    EpochSeedHook,
    MeanLossHook,
    SkippedFilesHook,
    seed_worker,
)
from .logs import connect_logger
from .metrics import DumpPredictions
from .optim_constructor import MergedOptimWrapperConstructor
from .optim_wrapper import auto_amp_optim_wrapper

__all__ = [
    'CompileBackboneHook',
    'DumpPredictions',
    'EpochSeedHook',
    'MeanLossHook',
    'MergedOptimWrapperConstructor',
    'SafeCheckpointHook',
    'SkippedFilesHook',
    'auto_amp_optim_wrapper',
    'connect_logger',
    'seed_worker',
]
