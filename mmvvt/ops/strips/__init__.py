"""Residual branches of a block on CPUs, computed in strips of rows."""

from .attention import AttentionSettings, AttentionWeights, attention_branch
from .common import runs_in_strips, sum_dtype
from .mlp import MLPWeights, mlp_branch

__all__ = [
    'AttentionSettings',
    'AttentionWeights',
    'MLPWeights',
    'attention_branch',
    'mlp_branch',
    'runs_in_strips',
    'sum_dtype',
]
