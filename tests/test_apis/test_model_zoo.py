"""Models by name: lists, options, checkpoints, and mmpretrain's functions."""

import functools
import http.server
import logging
import os
import re
import threading

import pytest
import torch
import yaml
from mmengine.logging import MMLogger

from mmvvt.apis import Predictor, get_model, list_models
from mmvvt.apis.model_zoo import _read_models
from mmvvt.checkpoint import convert_to_official, find_weights
from mmvvt.checkpoint.published import PUBLISHED
from mmvvt.errors import CheckpointError, UserError

from conftest import ROOT, photograph, run_tool

# All except base configs and the recipes for the user's own data
CONFIGS = {
    path.stem
    for path in (ROOT / 'configs').rglob('*.py')
    if not {'_base_', 'finetune'} & set(path.parts)
}
# The channels of the published architectures, for necks and heads, with few
# blocks
SHALLOW = dict(
    embed_dims=[96, 160, 320, 512],
    num_heads=[1, 2, 5, 8],
    mlp_ratios=[1, 1, 1, 1],
    depths=[1, 1, 1, 1],
)
TASKS = dict(
    ImageClassifier='classification',
    EncoderDecoder='segmentation',
    RetinaNet='detection',
    MaskRCNN='detection',
    CascadeRCNN='detection',
    DINO='detection',
)
DIGITS = 'vvt-nano_digits'


def build(name, **options):
    """Build a model with a shallow backbone."""
    if 'nano' not in name and 'atto' not in name:
        options.setdefault('arch', SHALLOW)
    return get_model(name, **options)


def save(model, path):
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=model.dataset_meta),
        ),
        path,
    )
    return str(path)


def refused(*args, **kwargs):
    """Return the message of the error, which must be one line."""
    with pytest.raises(UserError) as caught:
        get_model(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def log():
    """Messages that are logged during the test."""
    lines = []

    class Recorder(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger = MMLogger.get_current_instance()
    handler = Recorder(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# -- lists and names ----------------------------------------------------------


def test_list_models():
    assert list_models() == sorted(CONFIGS)
    by_task = [list_models(task=task) for task in set(TASKS.values())]
    assert all(by_task) and sorted(sum(by_task, [])) == sorted(CONFIGS)
    assert list_models('vvt-tiny', 'segmentation') == [
        'vvt-tiny_fpn_8xb4-40k_ade20k-512x512',
        'vvt-tiny_upernet_8xb2-160k_ade20k-512x512',
    ]
    assert list_models('*in1k-384px', task='detection') == []
    assert len(list_models('*vvt-[tm]*_in1k-384px')) == 2
    assert DIGITS in list_models(task='classification')
    with pytest.raises(UserError, match='allowed are classification, segm'):
        list_models(task='segment')


@pytest.mark.parametrize(
    'name,similar',
    [
        ('vvt-tinny_8xb128_in1k', 'vvt-tiny_8xb128_in1k'),
        ('vvt-tiny', 'vvt-tiny_8xb128_in1k'),
        ('cascade', 'cascade-mask-rcnn_vvt-medium_fpn_ms-3x_coco'),
        ('configs/demo/vvt-nano_digits.py', DIGITS),
        ('vvt_tiny_8xb128_in1k-384', 'vvt-tiny_8xb128_in1k-384px'),
    ],
)
def test_unknown_names_have_similar_names(name, similar):
    message = refused(name)
    assert repr(name) in message
    assert similar in message.split('similar names are ')[1].split(', ')


@pytest.mark.parametrize('name', ['', 'resnet50', 'swin', None])
def test_unknown_names_without_similar_names(name):
    assert 'mmvvt.apis.list_models() returns all names' in refused(name)


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_every_model_is_built_with_any_number_of_classes(name, log):
    model = build(name, num_classes=7)
    assert TASKS[type(model).__name__] == _read_models()[name].task
    assert not model.training
    assert log == []
    counts = {
        module_name: module.num_classes
        for module_name, module in model.named_modules()
        if getattr(module, 'num_classes', None) is not None
        and module_name != 'rpn_head'
    }
    assert counts and set(counts.values()) == {7}, counts
    assert model.dataset_meta['classes'] == [f'class {i}' for i in range(7)]
    with torch.no_grad():
        image = torch.randn(1, model.backbone.in_channels, 64, 64)
        if type(model).__name__ in ('ImageClassifier', 'EncoderDecoder'):
            assert model(image).shape[1] == 7
        else:
            assert len(model.extract_feat(image)) >= 3


def test_numbers_of_classes_of_the_config_and_their_names():
    model = get_model(DIGITS)
    assert model.head.num_classes == 10
    assert model.dataset_meta['classes'] == list('0123456789')
    same = get_model(DIGITS, num_classes=10)
    assert same.dataset_meta['classes'] == list('0123456789')


@pytest.mark.parametrize('number', [0, -1, 2.0, '3', True])
def test_wrong_numbers_of_classes(number):
    assert f'got {number!r}' in refused(DIGITS, num_classes=number)


# -- backbone options ---------------------------------------------------------


def test_backbone_options():
    model = get_model(
        DIGITS, drop_path_rate=0.2, frozen_stages=1, out_indices=(0, 3)
    )
    assert model.cfg.model.backbone.drop_path_rate == 0.2
    assert model.backbone.block4[0].drop_path.drop_prob == pytest.approx(0.2)
    model.train()
    frozen = {
        name
        for name, parameter in model.backbone.named_parameters()
        if not parameter.requires_grad
    }
    assert {name.split('.')[0][-1] for name in frozen} == {'1', '2'}
    features = model.backbone(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [32, 128]


def test_wrong_backbone_options():
    assert "no argument 'drop_pth'" in refused(DIGITS, drop_pth=0.1)
    assert 'out_indices' in refused(DIGITS, out_indices=(4,))
    assert 'drop_path_rate' in refused(DIGITS, drop_path_rate=2.0)


def test_the_runner_keeps_the_weights(tmp_path):
    path = save(get_model(DIGITS), tmp_path / 'digits.pth')
    model = get_model(DIGITS, pretrained=path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()  # as the runner does before training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_random_weights_are_those_of_training(tmp_path, monkeypatch):
    """Weights follow init_cfg, without the missing pretrained backbone."""
    monkeypatch.chdir(tmp_path)
    model = get_model('retinanet_vvt-nano_digit-scenes')
    # a prior probability of 0.01 in the focal loss
    assert model.bbox_head.retina_cls.bias.unique().item() == pytest.approx(
        -4.595, abs=1e-3
    )
    weight = model.backbone.block1[0].attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


# -- checkpoints --------------------------------------------------------------

RESIZED = {
    DIGITS: 'head.fc (3 instead of 10)',
    'vvt-nano_fpn_digit-scenes': 'decode_head.conv_seg (3 instead of 11), '
    'auxiliary_head.conv_seg (3 instead of 11)',
    'retinanet_vvt-nano_digit-scenes': 'bbox_head.retina_cls '
    '(27 instead of 90)',
    'mask-rcnn_vvt-nano_digit-scenes': 'roi_head.bbox_head.fc_cls '
    '(4 instead of 11), roi_head.bbox_head.fc_reg (12 instead of 40), '
    'roi_head.mask_head.conv_logits (3 instead of 10)',
    'dino-4scale_vvt-small_12e_coco': 'bbox_head.cls_branches.* '
    '(3 instead of 80), dn_query_generator.label_embedding (3 instead of 80)',
}


@pytest.mark.parametrize('name', RESIZED)
def test_heads_of_another_size(name, tmp_path, log):
    source = build(name)
    path = save(source, tmp_path / 'source.pth')
    torch.manual_seed(1)
    model = build(name, pretrained=path, num_classes=3)
    assert log == [
        f'loaded source.pth except for the newly initialised {RESIZED[name]}'
    ]
    given = source.state_dict()
    changed = set()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all()
        if tensor.shape != given[key].shape:
            changed.add(key)
        else:
            assert torch.equal(tensor, given[key]), key
    assert changed
    # The same size: everything is loaded, and nothing is logged.
    log.clear()
    model = build(name, pretrained=path)
    assert log == []
    assert all(
        torch.equal(tensor, given[key])
        for key, tensor in model.state_dict().items()
    )
    assert model.dataset_meta['classes'] == source.dataset_meta['classes']


def test_the_backbone_of_a_model_of_another_task(tmp_path, log):
    digits = get_model(DIGITS)
    path = save(digits, tmp_path / 'digits.pth')
    model = get_model('vvt-nano_fpn_digit-scenes', pretrained=path)
    assert log == [
        'loaded digits.pth except for the newly initialised neck (not in the '
        'checkpoint), decode_head (not in the checkpoint), auxiliary_head '
        '(not in the checkpoint)'
    ]
    for key, tensor in digits.backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[key]), key

    log.clear()
    path = save(model, tmp_path / 'fpn.pth')
    get_model('retinanet_vvt-nano_digit-scenes', pretrained=path)
    assert log == [
        'loaded fpn.pth except for the newly initialised neck (has another '
        'architecture), bbox_head (not in the checkpoint)'
    ]


def test_checkpoints_of_another_backbone_are_refused(tmp_path):
    """All tensors of the shallow network fit into the deep one."""
    deeper = dict(SHALLOW, depths=[1, 2, 1, 1])
    name = 'vvt-tiny_8xb128_in1k'
    shallow = save(build(name), tmp_path / 'shallow.pth')
    deep = save(get_model(name, arch=deeper), tmp_path / 'deep.pth')
    for path, arch in ((deep, SHALLOW), (shallow, deeper)):
        message = refused(name, pretrained=path, arch=arch)
        assert 'is for another backbone' in message
        assert 'backbone.block2.1.' in message
    grey = refused(name, pretrained=shallow, arch=SHALLOW, in_channels=1)
    assert 'patch_embed1.proj.weight has shape (96, 3, 7, 7)' in grey


@pytest.mark.parametrize('wrapped', [False, True])
def test_official_files_must_be_converted(wrapped, tmp_path):
    model = build('vvt-tiny_8xb128_in1k')
    state = {
        key.replace('backbone.', '').replace('head.fc', 'head'): tensor
        for key, tensor in model.state_dict().items()
    }
    path = tmp_path / 'official.pth'
    torch.save(dict(model=state, epoch=3) if wrapped else state, path)
    message = refused('vvt-tiny_8xb128_in1k', pretrained=path, arch=SHALLOW)
    assert 'fits no part of the model' in message
    assert 'tools/model_converters/official_to_mmvvt.py' in message


def test_files_that_fit_no_part_are_refused(tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict={'layer1.0.conv.weight': torch.ones(3)}), path)
    message = refused(DIGITS, pretrained=str(path))
    assert 'fits no part of the model' in message
    assert 'layer1.0.conv.weight' in message
    path.write_text('a picture of a cat')
    assert str(path) in refused(DIGITS, pretrained=str(path))
    assert 'no such checkpoint' in refused(DIGITS, pretrained='none.pth')
    assert 'got [1]' in refused(DIGITS, pretrained=[1])


def test_checkpoint_from_a_url(tmp_path, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / 'site').mkdir()
    source = get_model(DIGITS)
    save(source, tmp_path / 'site' / 'digits.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0),
        functools.partial(Handler, directory=str(tmp_path / 'site')),
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        site = f'http://127.0.0.1:{server.server_port}'
        model = get_model(DIGITS, pretrained=f'{site}/digits.pth')
        assert torch.equal(model.head.fc.weight, source.head.fc.weight)
        message = refused(DIGITS, pretrained=f'{site}/none.pth')
        assert f'cannot load {site}/none.pth' in message and '404' in message
    finally:
        server.shutdown()
        server.server_close()


# -- published weights --------------------------------------------------------


def test_published_weights(tmp_path, monkeypatch):
    """Found in pretrained/ and then in the folder of torch.hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    name = 'vvt-tiny_8xb128_in1k'
    message = refused(name, pretrained=True)
    assert 'vvt-tiny_in1k.pth is neither in pretrained/ nor in' in message
    assert f'{tmp_path}/cache/hub/checkpoints' in message
    assert 'tools/model_converters/official_to_mmvvt.py' in message
    assert 'convert FILE pretrained/vvt-tiny_in1k.pth' in message

    source = get_model(name)
    hub = tmp_path / 'cache' / 'hub' / 'checkpoints'
    for folder in (hub, tmp_path / 'pretrained'):
        folder.mkdir(parents=True)
        torch.nn.init.normal_(source.head.fc.bias)
        save(source, folder / 'vvt-tiny_in1k.pth')
        model = get_model(name, pretrained=True)
        assert torch.equal(model.head.fc.bias, source.head.fc.bias)

    # A file with the wrong content is refused.
    path = tmp_path / 'pretrained' / 'vvt-tiny_in1k.pth'
    official = convert_to_official(dict(state_dict=source.state_dict()))
    torch.save(official, path)
    assert 'was not converted' in refused(name, pretrained=True)
    os.rename(path, tmp_path / 'pretrained' / 'vvt-small_in1k.pth')
    save(source, tmp_path / 'pretrained' / 'vvt-small_in1k.pth')
    message = refused('vvt-small_8xb128_in1k', pretrained=True)
    assert 'do not match arch small' in message


def test_weights_that_were_not_published():
    message = refused(DIGITS, pretrained=True)
    assert f'python -m mmvvt train {DIGITS}' in message
    with pytest.raises(CheckpointError, match='allowed are mmvvt://'):
        find_weights('mmvvt://vvt-nano_digits.pth')


def test_metafiles_mark_published_results():
    """Results as in the table of the README, with the official link."""
    published = {}
    for path in (ROOT / 'configs').glob('*/metafile.yml'):
        for model in yaml.safe_load(path.read_text())['Models']:
            assert model['Config'].endswith(f'/{model["Name"]}.py')
            converted = 'Converted From' in model
            assert converted == ('Weights' in model), model['Name']
            if converted:
                assert 'OpenNLPLab' in model['Converted From']['Code']
                (result,) = model['Results']
                published[model['Weights']] = result['Metrics'].values()
    readme = (ROOT / 'configs/classification/README.md').read_text()
    for name, arch in PUBLISHED.items():
        (accuracy,) = published.pop(f'mmvvt://{name}')
        size = 384 if '384px' in name else 224
        row = next(
            line
            for line in readme.splitlines()
            if line.startswith(f'| VVT-{arch} | {size} |')
        )
        assert f'| {accuracy} | N/A |' in row
    assert not published


# -- mmpretrain ---------------------------------------------------------------

MMPRETRAIN = """
import numpy as np, sys
{imports}
names = mmpretrain.list_models('vvt')
assert names == [
    n for n in list_models('vvt-', task='classification')], names
assert 'resnet50_8xb32_in1k' in mmpretrain.list_models('resnet50')
inferencer = mmpretrain.ImageClassificationInferencer
assert set(names) == set(inferencer.list_models('vvt'))
image = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)

import torch
model = get_model('vvt-nano_digits')
torch.save(dict(state_dict=model.state_dict()), 'digits.pth')
ours = mmpretrain.inference_model(model, image)
stock = mmpretrain.get_model('vvt-nano_digits', pretrained='digits.pth')
assert type(stock) is type(model)
for result in (
    mmpretrain.inference_model(stock, image),
    inferencer('vvt-nano_digits', pretrained='digits.pth')(image)[0],
    mmpretrain.inference_model(
        'vvt-nano_digits', image, pretrained='digits.pth'),
):
    assert result['pred_class'] == ours['pred_class'] in '0123456789'
    assert np.array_equal(result['pred_scores'], ours['pred_scores'])
extract = mmpretrain.FeatureExtractor(
    'vvt-nano_digits', pretrained='digits.pth',
    backbone=dict(out_indices=(0, 1, 2, 3)))
shapes = [tuple(f.shape) for f in extract(image, stage='backbone')[0]]
assert shapes == [(32, 8, 8), (64, 4, 4), (96, 2, 2), (128, 1, 1)], shapes

name = 'vvt-tiny_8xb128_in1k'
try:
    mmpretrain.inference_model(name, image)
except UserError as error:
    assert 'vvt-tiny_in1k.pth is neither in' in str(error), error
else:
    raise AssertionError('no weights')
print('done')
"""


def test_mmpretrain_finds_the_classifiers(tmp_path):
    imports = (
        'from mmvvt.apis import get_model, list_models\n'
        'from mmvvt.errors import UserError\n'
        'import mmpretrain'
    )
    done = run_tool(
        '-c',
        MMPRETRAIN.format(imports=imports),
        cwd=tmp_path,
        env=dict(PYTHONPATH=str(ROOT), TORCH_HOME=str(tmp_path / 'cache')),
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == 'done'


def test_models_and_predictor_agree(tmp_path):
    import numpy as np

    model = get_model(DIGITS)
    path = save(model, tmp_path / 'digits.pth')
    predictor = Predictor(model.cfg, path, device='cpu')
    image = np.zeros((32, 32, 3), np.uint8)
    batch, _ = predictor.pipeline(image)
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    assert predictor(image)['labels'][0] == int(sample.pred_label)


MISSING = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {missing!r}:
            package = name.split('.')[0]
            raise ModuleNotFoundError(
                f'No module named {{package!r}}', name=package)

sys.meta_path.insert(0, Block())
from mmvvt.apis import get_model, list_models
from mmvvt.errors import UserError
assert len(list_models()) == {number}
for name in {names!r}:
    try:
        get_model(name)
    except UserError as error:
        print(error)
"""


def test_missing_packages_are_named():
    names = [
        'vvt-nano_digits',
        'vvt-nano_fpn_digit-scenes',
        'retinanet_vvt-nano_digit-scenes',
        'vvt_nano_fpn_digit_scenes',
        'retinanet_vvt_nano_digit_scenes',
    ]
    code = MISSING.format(
        missing=['mmpretrain', 'mmseg', 'mmdet'],
        number=len(CONFIGS),
        names=names,
    )
    done = run_tool('-c', code)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if 'needs' in line]
    assert len(lines) == len(names), done.stdout
    for line, name in zip(lines, names):
        assert name in line
        assert 'which is not installed: pip install' in line
    assert 'mmvvt[segmentation]' in lines[1]
    assert 'mmvvt[detection]' in lines[2]


# -- docs/model_zoo.md --------------------------------------------------------


def test_code_of_the_documentation_runs(tmp_path):
    import cv2

    text = (ROOT / 'docs' / 'model_zoo.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    code = [b for b in blocks if 'import' in b or ' = ' in b]
    assert len(code) >= 6
    for name in ('digit', 'scene'):
        assert cv2.imwrite(str(tmp_path / f'{name}.png'), photograph(96, 128))
    assert cv2.imwrite(str(tmp_path / 'photo.jpg'), photograph(96, 128))
    model = get_model('vvt-tiny_8xb128_in1k')
    for path in ('pretrained/vvt-tiny_in1k.pth', 'anywhere/vvt-tiny.pth'):
        (tmp_path / path).parent.mkdir()
        save(model, tmp_path / path)
    config = code.pop()
    assert config.startswith('_base_ = ')
    (tmp_path / 'own.py').write_text(config)
    code.append(
        'from mmengine.config import Config\n'
        "assert Config.fromfile('own.py').model.head.num_classes == 3\n"
    )
    done = run_tool(
        '-c',
        '\n'.join(code),
        cwd=tmp_path,
        env=dict(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stdout
