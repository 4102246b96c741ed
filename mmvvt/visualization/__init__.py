"""Visualization of training runs, predictions and benchmarks."""

from .attention import draw_attention
from .cam import draw_activation_maps
from .curves import plot_curves
from .predictions import draw_classification, draw_detection, draw_segmentation
from .sheets import (
    draw_classification_sheet,
    draw_detection_sheet,
    draw_segmentation_sheet,
)

__all__ = [
    'draw_activation_maps',
    'draw_attention',
    'draw_classification',
    'draw_classification_sheet',
    'draw_detection',
    'draw_detection_sheet',
    'draw_segmentation',
    'draw_segmentation_sheet',
    'plot_curves',
]
