"""Backbones in ONNX Runtime and OpenVINO, for the benchmark."""

import multiprocessing
import os
import tempfile
from typing import Any, Callable, Dict, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..deploy.formats import FORMATS, openvino_core, require
from ..deploy.networks import build_network
from ..errors import UserError
from .memory import peak_memory_gib

# Formats of the engines that run a file, see :mod:`mmvvt.deploy.formats`.
FILES: Dict[str, str] = dict(onnxruntime='onnx', openvino='openvino')
ENGINES = ('pytorch', 'compiled', *FILES)
# Maximum relative error of the feature maps. bfloat16 has 8 significant bits,
# and its rounding errors add up over the blocks.
TOLERANCES = dict(float32=1e-4, bfloat16=0.1)
PRECISIONS = dict(float32='f32', bfloat16='bf16')
Outputs = Tuple[Tensor, ...]


def check_engines(
    engines: Sequence[str],
    names: Sequence[str],
    modes: Sequence[str],
    dtype: str,
) -> None:
    """Check that the engines can run all models.

    Args:
        engines (Sequence[str]): From :data:`ENGINES`.
        names (Sequence[str]): Names of models.
        modes (Sequence[str]): 'forward', 'train_step' or both.
        dtype (str): 'float32', 'bfloat16' or 'float16'.

    Raises:
        UserError: If an engine of :data:`FILES` is combined with training
            steps, a dtype that it does not have, the reference
            implementation, the Triton kernels or a GPU, or if its packages
            are missing.
    """
    for engine in engines:
        if engine not in FILES:
            continue
        if any(mode != 'forward' for mode in modes):
            raise UserError(
                f'{engine} allows --modes forward, got {" ".join(modes)}'
            )
        other = [
            name for name in names if name.endswith(('-plain', '-triton'))
        ]
        if other:
            raise UserError(
                f'{engine} allows models without -plain and -triton, because '
                f'their attention is not exported, got {" ".join(other)}'
            )
        if torch.cuda.is_available():
            raise UserError(
                f'{engine} runs on the CPU: hide the GPU with '
                'CUDA_VISIBLE_DEVICES='
            )
        require(*FORMATS[FILES[engine]].packages)
        _check_dtype(engine, dtype)


def _check_dtype(engine: str, dtype: str) -> None:
    if dtype == 'float32':
        return
    if engine != 'openvino':
        raise UserError(f'{engine} allows --dtype float32, got {dtype}')
    if dtype != 'bfloat16':
        raise UserError(
            f'{engine} allows --dtype float32 or bfloat16, got {dtype}'
        )
    if not has_bfloat16():
        raise UserError(
            f'{engine} allows --dtype float32 on this processor, which does '
            f'not compute in bfloat16, got {dtype}'
        )


def has_bfloat16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this processor."""
    return 'BF16' in openvino_core().get_property(
        'CPU', 'OPTIMIZATION_CAPABILITIES'
    )


def export(model: nn.Module, engine: str, folder: str) -> str:
    """Export a backbone with dynamic batch size and image size.

    Args:
        model (nn.Module): Backbone. It is not changed.
        engine (str): Key of :data:`FILES`.
        folder (str): Existing folder. The files are written to a new folder
            inside.

    Returns:
        str: Path of the file.
    """
    form = FORMATS[FILES[engine]]
    path = os.path.join(tempfile.mkdtemp(dir=folder), f'model{form.suffix}')
    network = build_network(model, backbone=True, norm=form.norm)
    form.write(network, torch.randn(2, 3, 64, 96), path, False, {})
    return path


def open_engine(
    path: str, engine: str, dtype: str = 'float32'
) -> Callable[[Tensor], Outputs]:
    """Open a file with the number of threads of PyTorch.

    Args:
        path (str): Path returned by :func:`export`.
        engine (str): Key of :data:`FILES`.
        dtype (str): Key of :data:`TOLERANCES`. Defaults to 'float32'.

    Returns:
        Callable: Function from images ``(B, C, H, W)`` to feature maps.
    """
    form: Any = FORMATS[FILES[engine]]
    options = {}
    if engine == 'openvino':
        options['precision'] = PRECISIONS[dtype]
    runner = form.open(path, torch.get_num_threads(), **options)
    return lambda image: tuple(
        torch.as_tensor(out) for out in runner(image.numpy())
    )


def _peak(path: str, engine: str, dtype: str, batch: int, side: int) -> float:
    runner = open_engine(path, engine, dtype)
    runner(torch.randn(batch, 3, side, side))
    return peak_memory_gib()


def peak_memory_of_file(
    path: str, engine: str, dtype: str, batch: int, side: int
) -> float:
    """Measure the peak memory of opening and running a file once.

    A separate process opens the file, so that the peak does not include the
    model in PyTorch nor other engines. As for
    :func:`mmvvt.analysis.benchmark.peak_memory`, it includes the libraries,
    of which PyTorch is one.

    Args:
        path (str): Path returned by :func:`export`.
        engine (str): Key of :data:`FILES`.
        dtype (str): Key of :data:`TOLERANCES`.
        batch (int): Batch size.
        side (int): Height and width of the images, in pixels.

    Returns:
        float: Peak memory in GiB.

    Raises:
        UserError: If the system is not Linux.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_peak, (path, engine, dtype, batch, side))


def check_engine(
    name: str,
    engine: str,
    model: nn.Module,
    runner: Callable[[Tensor], Outputs],
    image: Tensor,
    dtype: str = 'float32',
) -> float:
    """Compare the outputs of an engine with those of PyTorch in float32.

    Args:
        name (str): Name of the model.
        engine (str): Key of :data:`FILES`.
        model (nn.Module): Backbone.
        runner (Callable): Function returned by :func:`open_engine`.
        image (Tensor): Images ``(B, C, H, W)``.
        dtype (str): Key of :data:`TOLERANCES`. Defaults to 'float32'.

    Returns:
        float: Maximum relative error ``|a - b| / |b|`` over the outputs.

    Raises:
        UserError: If the outputs have other shapes, or if the error exceeds
            the tolerance or is NaN.
    """
    model.eval()
    with torch.no_grad():
        expected = model(image)
    outs = runner(image)
    shapes = [tuple(out.shape) for out in outs]
    if shapes != [tuple(out.shape) for out in expected]:
        raise UserError(
            f'{name} in {engine} returns maps of other shapes than in '
            f'PyTorch: {shapes}'
        )
    errors = torch.stack(
        [
            (a.detach().double() - b.double()).norm() / b.double().norm()
            for a, b in zip(outs, expected)
        ]
    )
    error = float(errors.max())  # NaN if one is NaN
    if not error <= TOLERANCES[dtype]:
        raise UserError(
            f'the outputs of {name} in {engine} and in PyTorch differ by '
            f'{error:.1e} at {image.shape[-1]} pixels, allowed is a relative '
            f'error of {TOLERANCES[dtype]:.0e} in {dtype}'
        )
    return error
