"""The branches of a block on a CPU, a strip of the image at a time."""

from .attention import AttentionSettings, AttentionWeights, attention_branch
from .common import keep_freed_memory, runs_in_strips
from .mlp import MLPWeights, mlp_branch

__all__ = [
    'AttentionSettings', 'AttentionWeights', 'MLPWeights', 'attention_branch',
    'keep_freed_memory', 'mlp_branch', 'runs_in_strips'
]
