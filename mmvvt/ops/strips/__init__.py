"""The branches of a block on a CPU, a strip of the image at a time."""

from .attention import AttentionSettings, AttentionWeights, attention_branch
from .common import runs_in_strips
from .mlp import MLPWeights, mlp_branch

__all__ = [
    'AttentionSettings',
    'AttentionWeights',
    'MLPWeights',
    'attention_branch',
    'mlp_branch',
    'runs_in_strips',
]
