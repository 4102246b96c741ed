"""Export a trained model to a file that runs without its Python code."""

import copy
import hashlib
import json
import math
import operator
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor

from ..deploy.formats import FORMATS, require
from ..deploy.networks import Preprocess, build_network, to_half
from ..deploy.quantize import QUANTIZERS, quantize
from ..deploy.verify import TOLERANCES, compare, verification_shapes
from ..errors import UserError, WriteError
from ..fileio import atomic_group
from ..preflight import class_names, innermost_datasets, read_config
from ..version import __version__
from .loading import load_model
from .pipeline import TestPipeline

MIN_SIZE = 32
EXAMPLE_SIZE = (64, 96)
CALIBRATION_IMAGES = 64


@dataclass
class ExportResult:
    """Result of :func:`export_model`.

    Attributes:
        path (str): Path of the file.
        error (float): Error of the outputs against PyTorch, see
            :func:`mmvvt.deploy.verify.compare`: the largest over the tested
            images, and for int8 the root mean square.
        size (int): Number of bytes of the file and its companions.
        notes (list[str]): What a user of the file must know.
    """

    path: str
    error: float
    size: int
    notes: List[str]


def _check_arguments(
    out: str, format: str, fixed_size: Any, half: bool, int8: bool
) -> Optional[Tuple[int, int]]:
    """Check the arguments that need no model; return the fixed size."""
    if not isinstance(format, str) or format not in FORMATS:
        raise UserError(
            f'format must be one of {", ".join(FORMATS)}, got {format!r}'
        )
    suffix = FORMATS[format].suffix
    if os.path.splitext(out)[1] != suffix:
        raise UserError(
            f'the file of format {format} must have a name that ends with '
            f'{suffix}, got {out}'
        )
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise UserError(f'the output folder {folder} does not exist')
    if os.path.isdir(out):
        raise UserError(f'{out} is a folder; name a file')
    require(*FORMATS[format].packages)
    if half and int8:
        raise UserError('half and int8 cannot be combined')
    if int8 and format not in QUANTIZERS:
        raise UserError(
            f'int8 requires one of the formats {", ".join(QUANTIZERS)}, got '
            f'{format}'
        )
    if int8:
        require(QUANTIZERS[format])
    if fixed_size is None:
        return None
    try:
        height, width = (operator.index(n) for n in fixed_size)
        valid = min(height, width) >= MIN_SIZE and height % 2 == width % 2 == 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(
            f'fixed_size must be a height and a width, two even numbers of '
            f'at least {MIN_SIZE}, got {fixed_size!r}'
        )
    return height, width


def _in_channels(model: nn.Module) -> int:
    return next(
        layer.in_channels
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    )


def _takes_rgb(cfg: Config, model: Any) -> bool:
    """Whether the normalised images of a model have the order RGB."""
    preprocessor = dict(cfg.get('data_preprocessor') or {})
    preprocessor.update(cfg.model.get('data_preprocessor') or {})
    if preprocessor.get('to_rgb') or preprocessor.get('bgr_to_rgb'):
        return True
    return not preprocessor.get('rgb_to_bgr') and TestPipeline(cfg).rgb


def _calibration_images(cfg: Config, model: Any) -> List[Tensor]:
    """Load training images by the test pipeline, normalised ``(1, C, H, W)``.

    Raises:
        UserError: If the training set cannot be read.
    """
    if not cfg.get('train_dataloader') or not cfg.get('test_dataloader'):
        raise UserError(
            'int8 requires a config with train_dataloader, which provides '
            'the images for calibration, and test_dataloader'
        )
    config = copy.deepcopy(
        next(innermost_datasets(cfg.train_dataloader.dataset))
    )
    test = next(innermost_datasets(cfg.test_dataloader.dataset))
    config['pipeline'] = copy.deepcopy(test['pipeline'])
    pipeline = TestPipeline(cfg)
    images = []
    try:
        dataset = DATASETS.build(config)
        count = min(CALIBRATION_IMAGES, len(dataset))
        for index in np.linspace(0, len(dataset) - 1, count).astype(int):
            batch = pipeline.collate([dataset[int(index)]])
            images.append(model.data_preprocessor(batch, False)['inputs'])
    except (OSError, KeyError) as error:
        raise UserError(
            f'cannot read the training images for calibration: {error}'
        ) from error
    if not images:
        raise UserError('the training set has no images for calibration')
    return images


def _metadata(
    cfg: Config, meta: dict, network: Any, facts: Dict[str, Any]
) -> Dict[str, str]:
    """Describe an exported file; the values are strings or JSON."""
    text = cfg.pretty_text.encode()
    return dict(
        config=os.path.basename(str(cfg.filename)),
        config_sha256=hashlib.sha256(text).hexdigest(),
        classes=json.dumps(class_names(cfg, meta)['classes']),
        outputs=json.dumps(network.output_names),
        mmvvt=__version__,
        torch=torch.__version__,
        **{key: json.dumps(value) for key, value in facts.items()},
    )


def _check_space(folder: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f'cannot write to {folder}: about {needed:,} bytes are needed '
            f'and {free:,} are free'
        )


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Report what exporters and engines raise, many classes, as one line."""
    try:
        yield
    except (UserError, WriteError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ['']
        raise UserError(
            f'{what}: {type(error).__name__}: {lines[0]}'
        ) from error


def export_model(
    config: Union[str, Config],
    checkpoint: str,
    out: Union[str, os.PathLike],
    format: str = 'onnx',
    *,
    backbone: bool = False,
    label_map: bool = False,
    nms: bool = False,
    fixed_size: Optional[Tuple[int, int]] = None,
    half: bool = False,
    int8: bool = False,
    with_preprocessing: bool = False,
) -> ExportResult:
    """Export a classifier, segmentor, detector or backbone to a file.

    After writing, the file is run in its engine at three other sizes and
    compared with the model in PyTorch. If the error is too large, the file is
    removed. The input is named ``images``: normalised images
    ``(B, C, H, W)``, float32. The outputs are described in
    :mod:`mmvvt.deploy.networks`.

    Args:
        config (str | Config): Config, or path of a config file.
        checkpoint (str): Path or URL of a checkpoint.
        out (str | PathLike): Path of the file to write, in an existing
            folder. An existing file is replaced.
        format (str): 'onnx' (.onnx), 'openvino' (.xml and .bin),
            'exported-program' (.pt2) or 'torchscript' (.pt). Defaults to
            'onnx'.
        backbone (bool): Whether to export the backbone only. Defaults to
            False.
        label_map (bool): Whether a segmentor returns label maps instead of
            scores. Defaults to False.
        nms (bool): Whether RetinaNet returns boxes after non-maximum
            suppression, for one image. Defaults to False.
        fixed_size (tuple[int, int], optional): Fixed height and width in
            pixels, even numbers of at least 32. Defaults to None: the batch,
            height and width are dynamic.
        half (bool): Whether the weights and activations are float16; inputs
            and outputs stay float32. Defaults to False.
        int8 (bool): Whether the convolutions are quantised to 8-bit integers,
            calibrated with training images of the config. Defaults to False.
        with_preprocessing (bool): Whether the file takes RGB images with
            values from 0 to 255 and normalises them. Defaults to False.

    Returns:
        ExportResult: Path, error, size and notes.

    Raises:
        UserError: If an argument is invalid, a package is missing, the
            checkpoint does not fit, the model cannot be exported, or the
            file differs from the model.
        WriteError: If the file cannot be written.
    """
    out = os.fspath(out)
    size = _check_arguments(out, format, fixed_size, half, int8)
    form = FORMATS[format]
    cfg = read_config(config)
    model, meta = load_model(cfg, checkpoint)
    model.eval()
    options = dict(backbone=backbone, label_map=label_map, nms=nms)
    network: Any = build_network(model, norm=form.norm, **options)
    expected: Any = build_network(model, norm=None, **options)
    scores: Any = None
    if label_map:
        scores = build_network(model, norm=None)
    if half:
        network = to_half(network)
    preprocessor = getattr(model, 'data_preprocessor', None)
    if with_preprocessing:
        rgb = _takes_rgb(cfg, model)
        network, expected, scores = (
            net and Preprocess(net, preprocessor, rgb).eval()
            for net in (network, expected, scores)
        )
    precision = 'int8' if int8 else 'float16' if half else 'float32'

    generator = torch.Generator().manual_seed(0)

    def random_images(*shape: int) -> Tensor:
        if with_preprocessing:
            return torch.rand(shape, generator=generator) * 255
        return torch.randn(shape, generator=generator)

    channels = _in_channels(model)
    example_size = size or EXAMPLE_SIZE
    shapes = verification_shapes(
        channels,
        example_size,
        size is not None,
        network.fixed_batch,
        form.min_size,
    )
    samples = [random_images(*shape) for shape in shapes]
    calibration: List[Tensor] = []
    if int8:
        calibration = _calibration_images(cfg, model)
        if with_preprocessing:
            calibration = [expected.undo(image) for image in calibration]
        if size is not None:
            calibration = [
                nn.functional.interpolate(image, size, mode='bilinear')
                for image in calibration
            ]
        samples = calibration[:8]
    metadata = _metadata(
        cfg,
        meta,
        network,
        dict(
            precision=precision,
            size=size,
            values='RGB, 0 to 255' if with_preprocessing else 'normalised',
        ),
    )
    stored = sum(
        t.numel() * t.element_size() for t in model.state_dict().values()
    )
    folder = os.path.dirname(os.path.abspath(out))
    # The format of OpenVINO is converted from a temporary ONNX file.
    _check_space(folder, 2 * stored + 2**20)
    batch = 1 if network.fixed_batch else 2
    example = random_images(batch, channels, *example_size)
    with atomic_group(out, form.companions, 2 * stored) as temporary:
        target = f'{temporary}.float{form.suffix}' if int8 else temporary
        with _one_line(f'this model cannot be exported to {format}'):
            form.write(network, example, target, size is not None, metadata)
            if int8:
                quantize(target, temporary, format, calibration, metadata)
        with _one_line(f'{out} was not written, because it does not run'):
            run = form.open(temporary)
            errors = [
                compare(run, expected, scores, images, precision)
                for images in samples
            ]
            del run
        error = max(errors)
        if int8:
            # An image close to a decision boundary changes by much, so the
            # root mean square over the images counts.
            error = math.hypot(*errors) / math.sqrt(len(errors))
        if not error <= TOLERANCES[precision]:
            raise UserError(
                f'{out} was not written: its outputs differ from those of '
                f'PyTorch by {error:.1e}, allowed for {precision} is '
                f'{TOLERANCES[precision]:.0e}'
            )
    stem = os.path.splitext(out)[0]
    files = [out, *(stem + suffix for suffix in form.companions)]
    notes = [] if form.note is None else [form.note]
    test_cfg = getattr(model, 'test_cfg', None) or {}
    if not backbone and test_cfg.get('mode') == 'slide':
        notes.append(
            "test_cfg.mode is 'slide': the file computes whole images, "
            'windows are left to the caller'
        )
    return ExportResult(
        out, error, sum(os.path.getsize(file) for file in files), notes
    )
