"""Backbones of mmdet and mmseg in the classifiers of mmpretrain."""

from typing import Tuple

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class TupleOutputs(BaseModule):
    """Returns the feature maps of a backbone as a tuple.

    Some backbones of mmdet and mmseg return a list, which the necks of
    mmpretrain reject.

    Args:
        backbone (dict): Config of the backbone.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(self, backbone: dict, init_cfg=None):
        super().__init__(init_cfg)
        self.in_channels = backbone.get('in_channels', 3)
        self.backbone = MODELS.build(backbone)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the feature maps of images ``(B, C, H, W)``."""
        return tuple(self.backbone(x))
