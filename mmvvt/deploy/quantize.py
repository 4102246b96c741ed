"""Quantisation to 8-bit integers with NNCF."""

from typing import Any, List

from torch import Tensor

from .formats import FORMATS, INPUT_NAME, require

QUANTIZABLE = ('onnx', 'openvino')


def quantize(
    source: str, path: str, name: str, images: List[Tensor], metadata: dict
) -> None:
    """Quantise the convolutions of an exported file.

    The products of the attention stay in float32: their sums and clamps
    extend over eight orders of magnitude.

    Args:
        source (str): Exported file in float32.
        path (str): Path of the file to write.
        name (str): Format of both: one of :data:`QUANTIZABLE`.
        images (list[Tensor]): Calibration images ``(1, C, H, W)``.
        metadata (dict[str, str]): Stored in the file.

    Raises:
        UserError: If NNCF is not installed.
    """
    (nncf,) = require('nncf')
    model: Any
    if name == 'onnx':
        (onnx,) = require('onnx')
        model = onnx.load(source)

        def feed(image: Tensor):
            return {INPUT_NAME: image.numpy()}

    else:
        (openvino,) = require('openvino')
        model = openvino.Core().read_model(source)

        def feed(image: Tensor):
            return image.numpy()

    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, feed),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(types=['MatMul'], validate=False),
    )
    form: Any = FORMATS[name]
    form.save(quantized, path, metadata)
