"""Quantisation to 8-bit integers with ONNX Runtime and NNCF."""

import logging
from typing import Any, List

from torch import Tensor

from .formats import FORMATS, INPUT_NAME, openvino_core, require

# Formats and the package that quantises them.
QUANTIZERS = dict(onnx='onnxruntime', openvino='nncf')


def quantize(
    source: str, path: str, name: str, images: List[Tensor], metadata: dict
) -> None:
    """Quantise the convolutions of an exported file.

    Linear layers are convolutions in exported files. The products of the
    attention stay in float32: their sums extend over many orders of
    magnitude. Weights are quantised per channel.

    Args:
        source (str): Exported file in float32.
        path (str): Path of the file to write.
        name (str): Format of both: a key of :data:`QUANTIZERS`.
        images (list[Tensor]): Calibration images ``(1, C, H, W)``.
        metadata (dict[str, str]): Stored in the file.

    Raises:
        UserError: If the quantiser is not installed.
    """
    if name == 'onnx':
        _quantize_onnx(source, path, images)
    else:
        _quantize_openvino(source, path, images, metadata)


def _quantize_onnx(source: str, path: str, images: List[Tensor]) -> None:
    quantization: Any = require('onnxruntime.quantization')[0]
    base: Any = quantization.CalibrationDataReader

    class Reader(base):
        def __init__(self):
            self.images = iter(images)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {INPUT_NAME: image.numpy()}

    # It recommends its own preprocessing, which the exporter has done.
    logging.disable(logging.WARNING)
    try:
        quantization.quantize_static(
            source,
            path,
            Reader(),
            per_channel=True,
            op_types_to_quantize=['Conv'],
        )
    finally:
        logging.disable(logging.NOTSET)


def _quantize_openvino(
    source: str, path: str, images: List[Tensor], metadata: dict
) -> None:
    (nncf,) = require('nncf')
    nncf.set_log_level(logging.ERROR)
    model = openvino_core().read_model(source)
    # The averages of LayerNorm, see mmvvt/models/image_form.py: their squares
    # extend over many orders of magnitude.
    averages = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() == 'Convolution'
        and op.input_value(1).get_partial_shape()[0] == 1
    ]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: image.numpy()),
        subset_size=len(images),
        # Leaves the normalisation and the attention in float32.
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(
            names=averages, types=['MatMul'], validate=False
        ),
    )
    form: Any = FORMATS['openvino']
    form.save(quantized, path, metadata)
