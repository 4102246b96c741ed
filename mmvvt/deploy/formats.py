"""File formats: how a network is written, opened and run in each."""

import functools
import importlib
import io
import json
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager, redirect_stdout
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

INPUT_NAME = 'images'
ONNX_OPSET = 20
METADATA_KEY = 'mmvvt'
EXTRA = "pip install 'mmvvt[deploy]'"
Runner = Callable[[np.ndarray], List[np.ndarray]]


def require(*packages: str) -> List[Any]:
    """Import optional packages.

    Args:
        *packages (str): Names of modules.

    Returns:
        list: The modules.

    Raises:
        UserError: If one is not installed. The message names the extra.
    """
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise UserError(
            f'the package {error.name or packages[0]} is missing; install '
            f'the packages for deployment with: {EXTRA}'
        ) from error


@functools.cache
def openvino_core() -> Any:
    """Return the only ``openvino.Core`` of the process.

    OpenVINO's CPU plugin, one per core, replaces the stack of signal handlers
    and restores the previous one when it is destroyed. If two cores are not
    destroyed in reverse order, freed memory becomes the stack, and the next
    signal, such as the end of a data loader's process, kills the process.
    """
    (openvino,) = require('openvino')
    return openvino.Core()


def dynamic_shapes(network: Any, fixed_size: bool) -> tuple:
    """Describe the dynamic dimensions of the images for torch.export."""
    dynamic = torch.export.Dim.DYNAMIC
    axes = {} if network.fixed_batch else {0: dynamic}
    if not fixed_size:
        axes |= {2: dynamic, 3: dynamic}
    return (axes,)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings and messages of exporters about themselves."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


class Format(ABC):
    """A file format and the engine that runs it.

    Attributes:
        name (str): Name of the format.
        suffix (str): Suffix of the file.
        companions (tuple[str, ...]): Suffixes of further files that are
            written next to the file.
        packages (tuple[str, ...]): Optional packages that the format needs.
        norm (str): Form of LayerNorm that is fastest in the engine, see
            :class:`~mmvvt.models.image_form.ImageForm`.
        note (str, optional): What a user of the file must know.
        min_size (int): Minimum height and width in pixels of images of a
            dynamic size.
    """

    name: str
    suffix: str
    companions: Tuple[str, ...] = ()
    norm = 'tokens'
    note: Optional[str] = None
    min_size = 32

    packages: Tuple[str, ...] = ()

    @abstractmethod
    def write(
        self,
        network: Any,
        example: Tensor,
        path: str,
        fixed_size: bool,
        metadata: Dict[str, str],
    ) -> None:
        """Write a network to a file.

        Args:
            network (Network): Function of images.
            example (Tensor): Example images ``(B, C, H, W)``. B is 2, because
                torch.export does not make a dimension of length 1 dynamic;
                it is 1 if the network has a fixed batch.
            path (str): Path of the file.
            fixed_size (bool): Whether H and W are fixed.
            metadata (dict[str, str]): Stored in the file.
        """

    @abstractmethod
    def open(self, path: str, threads: Optional[int] = None) -> Runner:
        """Open a file in its engine.

        Args:
            path (str): Path of the file.
            threads (int, optional): Number of threads. Defaults to None, the
                default of the engine. The formats of PyTorch use its setting.

        Returns:
            Callable: Function from images ``(B, C, H, W)`` to the outputs.
        """

    @abstractmethod
    def read_metadata(self, path: str) -> Dict[str, str]:
        """Read the metadata that :meth:`write` stored in a file."""


class OnnxFormat(Format):
    """ONNX, run by ONNX Runtime."""

    name = 'onnx'
    suffix = '.onnx'

    packages = ('onnx', 'onnxscript', 'onnxruntime')

    def write(self, network, example, path, fixed_size, metadata) -> None:
        """Write a network to a file, see :meth:`Format.write`."""
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=dynamic_shapes(network, fixed_size),
                input_names=[INPUT_NAME],
                output_names=network.output_names,
                opset_version=ONNX_OPSET,
                verbose=False,
            )
            model = program.model_proto
        self.save(model, path, metadata)

    @staticmethod
    def save(model: Any, path: str, metadata: Dict[str, str]) -> None:
        """Write a model and its metadata to a file."""
        (onnx,) = require('onnx')
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)

    def open(self, path, threads=None) -> Runner:
        """Open a file in its engine, see :meth:`Format.open`."""
        (ort,) = require('onnxruntime')
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = ort.InferenceSession(
            path, options, providers=['CPUExecutionProvider']
        )
        return lambda images: session.run(None, {INPUT_NAME: images})

    def read_metadata(self, path) -> Dict[str, str]:
        """Read the metadata that :meth:`write` stored in a file."""
        (onnx,) = require('onnx')
        model = onnx.load(path, load_external_data=False)
        return {prop.key: prop.value for prop in model.metadata_props}


class OpenVinoFormat(Format):
    """OpenVINO's intermediate representation, an .xml and a .bin file."""

    name = 'openvino'
    suffix = '.xml'
    companions = ('.bin',)
    note = (
        "open the file with {'INFERENCE_PRECISION_HINT': 'f32'}: by default, "
        'OpenVINO computes in bfloat16 on processors that can, which '
        'changes the outputs, most of all for large images'
    )
    norm = 'channels'

    packages = ('openvino', 'onnx', 'onnxscript')

    def write(self, network, example, path, fixed_size, metadata) -> None:
        """Write a network to a file, see :meth:`Format.write`."""
        (openvino,) = require('openvino')
        with tempfile.TemporaryDirectory() as folder:
            onnx_path = os.path.join(folder, 'model.onnx')
            OnnxFormat().write(network, example, onnx_path, fixed_size, {})
            with _quiet():
                model = openvino.convert_model(onnx_path)
            self.save(model, path, metadata)

    @staticmethod
    def save(model: Any, path: str, metadata: Dict[str, str]) -> None:
        """Write a model and its metadata to a file."""
        (openvino,) = require('openvino')
        for key, value in metadata.items():
            model.set_rt_info(value, [METADATA_KEY, key])
        openvino.save_model(model, path, compress_to_fp16=False)

    def open(self, path, threads=None, precision='f32') -> Runner:
        """Open a file in its engine, see :meth:`Format.open`.

        Args:
            path (str): Path of the file.
            threads (int, optional): Number of threads. Defaults to None.
            precision (str): 'f32', or 'bf16' on a processor that computes in
                bfloat16. Defaults to 'f32'.

        Returns:
            Callable: Function from images ``(B, C, H, W)`` to the outputs.
        """
        options: Dict[str, Any] = {
            'PERFORMANCE_HINT': 'LATENCY',
            # By default, some processors compute in bfloat16.
            'INFERENCE_PRECISION_HINT': precision,
        }
        if threads is not None:
            options['INFERENCE_NUM_THREADS'] = threads
        request = (
            openvino_core()
            .compile_model(path, 'CPU', options)
            .create_infer_request()
        )

        def run(images: np.ndarray) -> List[np.ndarray]:
            request.infer([images])
            return [np.array(t.data) for t in request.output_tensors]

        return run

    def read_metadata(self, path) -> Dict[str, str]:
        """Read the metadata that :meth:`write` stored in a file."""
        info = openvino_core().read_model(path).get_rt_info([METADATA_KEY])
        return {
            key: str(getattr(value, 'value', value))
            for key, value in info.value.items()
        }


def _write(buffer: io.BytesIO, path: str) -> None:
    """Write a file; PyTorch's writer ends the process if the disk is full."""
    with open(path, 'wb') as file:
        file.write(buffer.getbuffer())


class ExportedProgramFormat(Format):
    """An exported program of ``torch.export``, run by PyTorch."""

    name = 'exported-program'
    suffix = '.pt2'
    min_size = 33
    note = (
        'without --fixed-size, images need at least 33 pixels on each side, '
        'because torch.export fixes dimensions of length 1, and the last '
        'feature map of an image of 32 pixels has one pixel'
    )

    def write(self, network, example, path, fixed_size, metadata) -> None:
        """Write a network to a file, see :meth:`Format.write`."""
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                network,
                (example,),
                dynamic_shapes=dynamic_shapes(network, fixed_size),
            )
            buffer = io.BytesIO()
            torch.export.save(
                program,
                buffer,
                extra_files={METADATA_KEY: json.dumps(metadata)},
            )
        _write(buffer, path)

    def open(self, path, threads=None) -> Runner:
        """Open a file in its engine, see :meth:`Format.open`."""
        import torchvision  # noqa: F401, registers non-maximum suppression

        return _torch_runner(torch.export.load(path).module())

    def read_metadata(self, path) -> Dict[str, str]:
        """Read the metadata that :meth:`write` stored in a file."""
        extra = {METADATA_KEY: ''}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[METADATA_KEY])


class TorchScriptFormat(Format):
    """TorchScript written by tracing, run by PyTorch, also in C++."""

    name = 'torchscript'
    suffix = '.pt'

    def write(self, network, example, path, fixed_size, metadata) -> None:
        """Write a network to a file, see :meth:`Format.write`."""
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(network, example, check_trace=False)
            buffer = io.BytesIO()
            torch.jit.save(
                traced,
                buffer,
                _extra_files={METADATA_KEY: json.dumps(metadata)},
            )
        _write(buffer, path)

    def open(self, path, threads=None) -> Runner:
        """Open a file in its engine, see :meth:`Format.open`."""
        import torchvision  # noqa: F401, registers non-maximum suppression

        return _torch_runner(torch.jit.load(path, map_location='cpu'))

    def read_metadata(self, path) -> Dict[str, str]:
        """Read the metadata that :meth:`write` stored in a file."""
        extra = {METADATA_KEY: ''}
        torch.jit.load(path, _extra_files=extra)
        return json.loads(extra[METADATA_KEY])


def _torch_runner(module: Callable) -> Runner:
    def run(images: np.ndarray) -> List[np.ndarray]:
        with torch.no_grad():
            outs = module(torch.from_numpy(images))
        outs = (outs,) if isinstance(outs, Tensor) else outs
        return [out.numpy() for out in outs]

    return run


FORMATS: Dict[str, Format] = {
    form.name: form
    for form in (
        OnnxFormat(),
        OpenVinoFormat(),
        ExportedProgramFormat(),
        TorchScriptFormat(),
    )
}
