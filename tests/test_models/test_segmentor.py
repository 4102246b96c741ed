"""Tests of VVT in mmseg's segmentors."""

from importlib import resources

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from mmvvt.datasets import DigitScenes

from conftest import ROOT

pytest.importorskip('mmseg')

DEMO = ROOT / 'configs' / 'demo' / 'vvt-nano_fpn_digit-scenes.py'
CLASSIFIER = ROOT / 'configs' / '_base_' / 'models' / 'vvt-nano_classifier.py'


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmseg')


def demo_model(**backbone):
    cfg = Config.fromfile(DEMO)
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.update(backbone)
    return cfg


def test_pretrained_classifier_fills_the_backbone(tmp_path, capfd):
    """A pretrained classifier provides all tensors of the backbone."""
    init_default_scope('mmpretrain')
    pytest.importorskip('mmpretrain')
    classifier = MODELS.build(Config.fromfile(CLASSIFIER).model)
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict()), path)

    init_default_scope('mmseg')
    cfg = demo_model(
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        )
    )
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert 'unexpected key' not in (said := ''.join(capfd.readouterr()))
    assert 'missing keys' not in said
    state = classifier.backbone.state_dict()
    assert set(state) == set(model.backbone.state_dict())
    for key, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize('shape', [(97, 131), (64, 200), (33, 34)])
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_odd_sizes(mode, shape):
    cfg = demo_model()
    if mode == 'slide':
        cfg.model.test_cfg = dict(
            mode='slide', crop_size=(64, 64), stride=(40, 40)
        )
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        (sample,) = model.predict(torch.randn(1, 3, *shape))
    assert sample.pred_sem_seg.shape == shape
    assert sample.seg_logits.data.isfinite().all()


def test_slide_of_one_crop_is_whole():
    cfg = demo_model()
    model = MODELS.build(cfg.model).eval()
    image = torch.randn(1, 3, 61, 83)
    with torch.no_grad():
        (whole,) = model.predict(image)
        model.test_cfg = ConfigDict(
            mode='slide', crop_size=(96, 96), stride=(64, 64)
        )
        (slide,) = model.predict(image)
    assert torch.equal(whole.seg_logits.data, slide.seg_logits.data)


def test_inferencer_on_a_photograph(tmp_path):
    from mmseg.apis import MMSegInferencer

    cfg = demo_model()
    model = MODELS.build(cfg.model)
    weights = tmp_path / 'weights.pth'
    meta = DigitScenes.METAINFO
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)),
        weights,
    )
    inferencer = MMSegInferencer(cfg, str(weights), device='cpu')
    photograph = resources.files('sklearn') / 'datasets/images/flower.jpg'
    result = inferencer(str(photograph), out_dir=str(tmp_path))
    labels = result['predictions']
    assert labels.shape == (427, 640)
    assert 0 <= np.min(labels) and np.max(labels) <= 10
    assert len(list(tmp_path.rglob('*.png'))) >= 1
    assert inferencer.model.dataset_meta['classes'] == meta['classes']
