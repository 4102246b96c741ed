"""Exported files are run in their engines and compared with PyTorch."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvvt.apis import export as export_module
from mmvvt.apis import export_model
from mmvvt.deploy import formats
from mmvvt.deploy.formats import FORMATS
from mmvvt.deploy.networks import build_network, prepare
from mmvvt.errors import UserError, WriteError

from conftest import relative_error, run_tool
from export_cases import SHORT, build, load, save_random, small_config


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    cfg = small_config('classifier', **SHORT)
    path = tmp_path_factory.mktemp('classifier') / 'random.pth'
    names = [f'digit {i}' for i in range(10)]
    return cfg, save_random(cfg, path, dataset_meta=dict(classes=names))


def expected_scores(cfg, checkpoint, images):
    model = load(cfg, checkpoint)
    with torch.no_grad():
        return model(images, mode='tensor').softmax(dim=1)


@pytest.mark.parametrize('name', FORMATS)
def test_classifier(classifier, name, tmp_path):
    cfg, checkpoint = classifier
    out = str(tmp_path / f'model{FORMATS[name].suffix}')
    result = export_model(cfg, checkpoint, out, name)
    assert result.error < 1e-5
    assert sorted(os.listdir(tmp_path)) == sorted(
        f'model{suffix}'
        for suffix in (FORMATS[name].suffix, *FORMATS[name].companions)
    )
    run = FORMATS[name].open(out, threads=1)
    for size in ((130, 66), (FORMATS[name].min_size,) * 2):
        images = torch.randn(3, 3, *size)
        (scores,) = run(images.numpy())
        expected = expected_scores(cfg, checkpoint, images)
        assert relative_error(scores, expected) < 1e-5

    metadata = FORMATS[name].read_metadata(out)
    assert json.loads(metadata['classes'])[9] == 'digit 9'
    assert json.loads(metadata['outputs']) == ['scores']
    assert json.loads(metadata['values']) == 'normalised'
    assert len(metadata['config_sha256']) == 64


PLAIN = {
    'model.backbone.attn_cfg': dict(attention='softmax', fpc=False),
    'model.backbone.mlp_cfg': dict(dwconv=False),
    'model.backbone.patch_cfg': dict(overlap=False, pos_embed_size=64),
}
CONTEXT = {'model.backbone.attn_cfg': dict(attention='global_context')}


@pytest.mark.parametrize(
    'name,variant',
    [('onnx', PLAIN), ('openvino', PLAIN), ('onnx', CONTEXT)],
    ids=['onnx-plain', 'openvino-plain', 'onnx-context'],
)
def test_ablation_variants(name, variant, tmp_path):
    """Sizes that no patch divides, and position tables of another size."""
    cfg = small_config('classifier', **SHORT, **variant)
    checkpoint = save_random(cfg, tmp_path / 'random.pth')
    out = str(tmp_path / f'model{FORMATS[name].suffix}')
    assert export_model(cfg, checkpoint, out, name).error < 1e-5
    images = torch.randn(3, 3, 130, 67)
    (scores,) = FORMATS[name].open(out, threads=1)(images.numpy())
    expected = expected_scores(cfg, checkpoint, images)
    assert relative_error(scores, expected) < 1e-5


@pytest.mark.parametrize('name', ['torchscript', 'exported-program'])
def test_preprocessing_half_and_fixed_size(classifier, name, tmp_path):
    cfg, checkpoint = classifier
    out = str(tmp_path / f'model{FORMATS[name].suffix}')
    result = export_model(
        cfg,
        checkpoint,
        Path(out),
        name,
        half=True,
        fixed_size=(np.int64(48), 64),
        with_preprocessing=True,
    )
    assert 0 < result.error < 3e-2
    images = torch.randint(0, 256, (2, 3, 48, 64)).float()
    (scores,) = FORMATS[name].open(out)(images.numpy())
    mean, std = cfg.data_preprocessor.mean[0], cfg.data_preprocessor.std[0]
    bgr = images.flip(1)  # the order of this config
    expected = expected_scores(cfg, checkpoint, (bgr - mean) / std)
    assert relative_error(scores, expected) < 3e-2


@pytest.mark.parametrize('mean', [[100.0, 120.0, 140.0], [127.5]])
@pytest.mark.parametrize('swap', [True, False])
def test_channel_order_of_preprocessing(classifier, swap, mean, tmp_path):
    """The input is RGB, whatever order the model takes."""
    cfg, checkpoint = classifier
    cfg = cfg.copy()
    std = [50.0] * len(mean)
    cfg.data_preprocessor.update(mean=mean, std=std, to_rgb=swap)
    out = str(tmp_path / 'model.pt')
    export_model(cfg, checkpoint, out, 'torchscript', with_preprocessing=True)
    rgb = torch.randint(0, 256, (1, 3, 64, 64)).float()
    # mmcv loads BGR; the data preprocessor of the model takes it from there.
    model = build(cfg)
    bgr = rgb.flip(1)
    inputs = model.data_preprocessor(dict(inputs=bgr), False)['inputs']
    expected = expected_scores(cfg, checkpoint, inputs)
    (scores,) = FORMATS['torchscript'].open(out)(rgb.numpy())
    assert relative_error(scores, expected) < 1e-5


@pytest.mark.parametrize('name', ['onnx', 'openvino'])
def test_int8(classifier, name, tmp_path, monkeypatch):
    """int8 files are smaller, store the metadata and score nearly the same."""
    cfg, checkpoint = classifier
    images = [torch.randn(1, 3, 32, 32) for _ in range(8)]
    monkeypatch.setattr(
        export_module, '_calibration_images', lambda cfg, model: images
    )
    suffix = FORMATS[name].suffix
    out = str(tmp_path / f'int8{suffix}')
    result = export_model(
        cfg, checkpoint, out, name, int8=True, fixed_size=(32, 32)
    )
    assert 1e-6 < result.error < 0.3
    # OpenVINO may compute in bfloat16, which was not compared.
    hints = ['INFERENCE_PRECISION_HINT' in note for note in result.notes]
    assert hints == [True] * (name == 'openvino')
    assert json.loads(FORMATS[name].read_metadata(out)['precision']) == 'int8'
    text = open(out, 'rb').read()
    assert b'QuantizeLinear' in text or b'FakeQuantize' in text
    scores = FORMATS[name].open(out)(images[0].numpy())[0]
    expected = expected_scores(cfg, checkpoint, images[0])
    assert relative_error(scores, expected) == pytest.approx(
        result.error, rel=30
    )
    assert set(os.listdir(tmp_path)) == {
        f'int8{end}' for end in (suffix, *FORMATS[name].companions)
    }


@pytest.mark.parametrize('worst, allowed', [(0.4, True), (0.9, False)])
def test_int8_of_one_difficult_image(
    worst, allowed, classifier, tmp_path, monkeypatch
):
    """The root mean square over the images decides, not the worst image."""
    cfg, checkpoint = classifier
    images = [torch.randn(1, 3, 32, 32) for _ in range(8)]
    errors = iter([worst] + 7 * [0.05])
    monkeypatch.setattr(
        export_module, '_calibration_images', lambda cfg, model: images
    )
    monkeypatch.setattr(
        export_module, 'compare', lambda *arguments: next(errors)
    )
    out = str(tmp_path / 'int8.onnx')
    arguments = (cfg, checkpoint, out, 'onnx')
    options = dict(int8=True, fixed_size=(32, 32))
    if allowed:
        result = export_model(*arguments, **options)
        assert result.error == pytest.approx(
            ((worst**2 + 7 * 0.05**2) / 8) ** 0.5
        )
    else:
        with pytest.raises(UserError, match='differ from those of PyTorch'):
            export_model(*arguments, **options)
    assert os.path.exists(out) == allowed


def test_int8_keeps_the_averages_of_layer_norm(
    classifier, tmp_path, monkeypatch
):
    """They are convolutions in OpenVINO's files, as the linear layers are."""
    cfg, checkpoint = classifier
    images = [torch.randn(1, 3, 32, 32) for _ in range(8)]
    monkeypatch.setattr(
        export_module, '_calibration_images', lambda cfg, model: images
    )
    out = str(tmp_path / 'int8.xml')
    export_model(
        cfg, checkpoint, out, 'openvino', int8=True, fixed_size=(32, 32)
    )
    quantised = {True: [], False: []}  # by whether it is an average
    for op in formats.openvino_core().read_model(out).get_ops():
        if op.get_type_name() == 'Convolution':
            inputs = [v.get_node().get_type_name() for v in op.input_values()]
            is_average = op.input_value(1).get_partial_shape()[0] == 1
            quantised[is_average].append('FakeQuantize' in inputs)
    # Two for each of the norms of the embedding, the block and the stage
    assert len(quantised[True]) == 8 and not any(quantised[True])
    assert sum(quantised[False]) >= 4


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(format='tensorrt'), "format must be one of onnx, .*'tensorrt'"),
        (dict(out='model.xml'), 'ends with .onnx, got .*model.xml'),
        (dict(format=['onnx']), r"format must be one of onnx, .*\['onnx'\]"),
        (dict(out='.onnx'), 'a name that ends with .onnx, got .*/.onnx'),
        (dict(out='none/model.onnx'), 'output folder .*none does not exist'),
        (dict(fixed_size=(16, 64)), r'at least 32, got \(16, 64\)'),
        (dict(fixed_size=(65, 64)), r'numbers of at least 32, got \(65, 64'),
        (dict(fixed_size=(64,)), 'two even numbers'),
        (dict(fixed_size=64), 'two even numbers of at least 32, got 64'),
        (dict(fixed_size=(64.0, 64)), r'two even numbers.*got \(64.0, 64'),
        (dict(fixed_size='64x64'), "two even numbers.*got '64x64'"),
        (dict(half=True, int8=True), 'half and int8 cannot be combined'),
        (
            dict(out='m.pt', format='torchscript', int8=True),
            'int8 requires one of the formats onnx, openvino',
        ),
        (dict(label_map=True), 'label_map is for a segmentor'),
        (dict(nms=True), 'nms is for a detector'),
    ],
    ids=lambda value: None if isinstance(value, str) else '-'.join(value),
)
def test_bad_arguments(classifier, options, message, tmp_path):
    cfg, checkpoint = classifier
    arguments = dict(format='onnx') | options
    out = str(tmp_path / arguments.pop('out', 'model.onnx'))
    with pytest.raises(UserError, match=message):
        export_model(cfg, checkpoint, out, **arguments)
    assert os.listdir(tmp_path) == []


def test_checkpoint_of_another_model(classifier, tmp_path):
    cfg, _ = classifier
    other = small_config('segmentor')
    checkpoint = save_random(other, tmp_path / 'other.pth')
    with pytest.raises(UserError, match='other.pth'):
        export_model(cfg, checkpoint, str(tmp_path / 'model.onnx'))
    with pytest.raises(UserError, match='no such checkpoint'):
        export_model(cfg, 'none.pth', str(tmp_path / 'model.onnx'))
    assert os.listdir(tmp_path) == ['other.pth']


@pytest.mark.parametrize('package', ['onnxruntime', 'openvino', 'nncf'])
def test_missing_package(classifier, package, tmp_path, monkeypatch):
    import_module = formats.importlib.import_module

    def missing(name):
        if name.split('.')[0] == package:
            raise ModuleNotFoundError(f'No module {name}', name=package)
        return import_module(name)

    monkeypatch.setattr(formats.importlib, 'import_module', missing)
    name = 'onnx' if package == 'onnxruntime' else 'openvino'
    cfg, checkpoint = classifier
    with pytest.raises(
        UserError, match=rf"{package} is missing.*'mmvvt\[deploy\]'"
    ):
        export_model(
            cfg,
            checkpoint,
            str(tmp_path / f'model{FORMATS[name].suffix}'),
            name,
            int8=package == 'nncf',
        )
    assert os.listdir(tmp_path) == []


def test_full_disk(classifier, tmp_path, monkeypatch):
    cfg, checkpoint = classifier
    out = tmp_path / 'model.pt'
    out.write_bytes(b'before')

    def fail(self, *arguments):
        with open(arguments[2], 'wb') as file:
            file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(formats.TorchScriptFormat, 'write', fail)
        with pytest.raises(WriteError, match='No space left.*are free'):
            export_model(cfg, checkpoint, str(out), 'torchscript')
    monkeypatch.setattr(
        export_module.shutil,
        'disk_usage',
        lambda path: os.statvfs_result and type('Usage', (), dict(free=10)),
    )
    with pytest.raises(WriteError, match='and 10 are free'):
        export_model(cfg, checkpoint, str(out), 'torchscript')
    assert out.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['model.pt']


def test_file_that_grows_too_large(tmp_path):
    """PyTorch's own writer would end the process."""
    script = f"""
import resource, signal
from pathlib import Path
from export_cases import SHORT, save_random, small_config
from mmvvt.apis import export_model
from mmvvt.deploy.formats import FORMATS
from mmvvt.errors import WriteError
folder = Path({str(tmp_path)!r})
cfg = small_config('classifier', **SHORT)
checkpoint = save_random(cfg, folder / 'random.pth')
(folder / 'out').mkdir()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name, format in FORMATS.items():
    out = folder / 'out' / ('model' + format.suffix)
    out.write_bytes(b'before')
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for name, format in FORMATS.items():
    out = folder / 'out' / ('model' + format.suffix)
    try:
        export_model(cfg, checkpoint, out, format=name)
    except WriteError as error:
        print(name, 'raised', error)
"""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    done = run_tool('-c', script, env=dict(PYTHONPATH=path))
    assert done.returncode == 0, done.stdout
    for name in FORMATS:
        assert f'{name} raised cannot write' in done.stdout
    files = {'model' + format.suffix for format in FORMATS.values()}
    assert set(os.listdir(tmp_path / 'out')) == files
    for file in files:
        assert (tmp_path / 'out' / file).read_bytes() == b'before'


def test_engine_that_raises(classifier, tmp_path, monkeypatch):
    """Errors of exporters and engines have many classes."""
    cfg, checkpoint = classifier

    def fail(*arguments):
        raise AssertionError('Guard failed\nsecond line')

    out = str(tmp_path / 'model.pt')
    for method in ('write', 'open'):
        with monkeypatch.context() as patch:
            patch.setattr(formats.TorchScriptFormat, method, fail)
            with pytest.raises(
                UserError, match=r'AssertionError: Guard failed$'
            ):
                export_model(cfg, checkpoint, out, 'torchscript')
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('size', ['', '64', '-64x64', '64x64x64'])
def test_fixed_size_of_the_tool(classifier, size, tmp_path):
    """An empty string, such as an unset variable, is not the default."""
    done = run_tool(
        'tools/export.py',
        'configs/demo/vvt-nano_digits.py',
        classifier[1],
        *('--out', str(tmp_path / 'model.onnx'), f'--fixed-size={size}'),
    )
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert f'--fixed-size must be HxW, such as 512x512, got {size!r}' in (
        done.stdout
    )


@pytest.mark.filterwarnings('ignore')
def test_computed_weights():
    """PyTorch cannot copy them; parametrizations are copied."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.nn.utils.weight_norm(model[0])
    model(torch.randn(1, 2))
    with pytest.raises(UserError, match='call torch.nn.utils.remove_weight'):
        prepare(model)
    torch.nn.utils.remove_weight_norm(model[0])
    torch.nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(1, 2)
    assert torch.equal(prepare(model)(x), model(x))


@pytest.mark.parametrize('fault', ['wrong', 'nan', 'shape'])
def test_a_wrong_file_is_not_kept(classifier, fault, tmp_path, monkeypatch):
    """A file that differs from PyTorch is removed; an older one is kept."""
    cfg, checkpoint = classifier
    out = tmp_path / 'model.pt'
    out.write_bytes(b'before')
    open_file = formats.TorchScriptFormat.open

    def open_wrong(self, path, threads=None):
        run = open_file(self, path)

        def wrong(images):
            (scores,) = run(images)
            if fault == 'shape':
                return [scores[:, :-1]]
            return [scores * (np.nan if fault == 'nan' else 1.001)]

        return wrong

    monkeypatch.setattr(formats.TorchScriptFormat, 'open', open_wrong)
    with pytest.raises(UserError, match='was not written: its outputs differ'):
        export_model(cfg, checkpoint, str(out), 'torchscript')
    assert out.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['model.pt']


@pytest.mark.parametrize(
    'config',
    [
        'detection/mask-rcnn_vvt-tiny_fpn_1x_coco.py',
        'detection/cascade-mask-rcnn_vvt-small_fpn_ms-3x_coco.py',
        'detection/dino-4scale_vvt-small_12e_coco.py',
    ],
)
def test_models_that_cannot_be_exported(config):
    from mmvvt.preflight import read_config

    from conftest import ROOT

    cfg = read_config(str(ROOT / 'configs' / config))
    cfg.model.backbone.pop('init_cfg', None)
    model = build(cfg)
    with pytest.raises(
        UserError, match='cannot be exported as a whole; .*RetinaNet.*backbone'
    ):
        build_network(model)
    # Its backbone can.
    network = build_network(model, backbone=True)
    assert network.output_names[-1] == 'feature_3'


def test_signals_are_handled_after_openvino(tmp_path):
    """In a process of its own, which a second core of OpenVINO would kill."""
    script = """
import faulthandler, os, signal, sys
import torch
from mmvvt.deploy.formats import FORMATS

class Network(torch.nn.Conv2d):
    fixed_batch = False
    output_names = ['maps']

# Python handles signals on a stack of its own, which OpenVINO replaces.
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
form = FORMATS['openvino']
form.write(
    Network(3, 4, 4, 4), torch.zeros(2, 3, 64, 96), sys.argv[1], False, {}
)
first, second = form.open(sys.argv[1]), form.open(sys.argv[1])
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = run_tool('-c', script, tmp_path / 'model.xml')
    assert (done.returncode, done.stdout) == (0, 'handled\n')
