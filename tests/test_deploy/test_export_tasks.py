"""Exported segmentors and detectors, and the layers made for them."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmvvt.apis import export_model
from mmvvt.deploy.formats import FORMATS
from mmvvt.deploy.networks import (
    DetectorNetwork,
    _AdaptiveAvgPool,
    _dynamic_layer,
    build_network,
    prepare,
)
from mmvvt.deploy.verify import compare
from mmvvt.errors import UserError

from conftest import relative_error
from export_cases import build, load, save_random, small_config

pytest.importorskip('mmseg')
DetDataSample = pytest.importorskip('mmdet.structures').DetDataSample


def segment(model, images):
    """Class scores of mmseg itself."""
    size = tuple(images.shape[2:])
    metas = [dict(img_shape=size, ori_shape=size, pad_shape=size)]
    with torch.no_grad():
        return model.encode_decode(images, metas * len(images)).softmax(dim=1)


@pytest.mark.parametrize('name', ['onnx', 'torchscript'])
def test_fpn_segmentor_at_other_sizes(name, tmp_path):
    """The Upsample of mmseg keeps the size of the example when exported."""
    cfg = small_config('segmentor')
    # With larger weights, logits exceed 1000, and the scores of PyTorch itself
    # differ by 1e-5 from those in float64.
    checkpoint = save_random(cfg, tmp_path / 'random.pth', noise=0.05)
    out = str(tmp_path / f'model{FORMATS[name].suffix}')
    result = export_model(cfg, checkpoint, out, name)
    assert result.error < 1e-5
    run = FORMATS[name].open(out, threads=1)
    model = load(cfg, checkpoint)
    for shape in ((1, 3, 160, 96), (2, 3, 64, 200)):
        images = torch.randn(shape)
        (scores,) = run(images.numpy())
        assert relative_error(scores, segment(model, images)) < 1e-5


def test_label_map(tmp_path):
    cfg = small_config('segmentor')
    checkpoint = save_random(cfg, tmp_path / 'random.pth')
    out = str(tmp_path / 'model.pt')
    export_model(cfg, checkpoint, out, 'torchscript', label_map=True)
    images = torch.randn(1, 3, 96, 64)
    (labels,) = FORMATS['torchscript'].open(out)(images.numpy())
    expected = segment(load(cfg, checkpoint), images).argmax(dim=1)
    assert labels.dtype == np.int32
    assert (labels == expected.numpy()).mean() > 0.999


def test_upernet(tmp_path):
    """Adaptive pooling of the head, a slide mode and a size it was not
    traced with."""
    cfg = small_config('upernet', **{'model.test_cfg.mode': 'slide'})
    cfg.model.test_cfg.update(crop_size=(64, 64), stride=(32, 32))
    checkpoint = save_random(cfg, tmp_path / 'random.pth')
    out = str(tmp_path / 'model.pt')
    result = export_model(cfg, checkpoint, out, 'torchscript')
    assert 'slide' in result.notes[0]
    images = torch.randn(2, 3, 130, 70)
    (scores,) = FORMATS['torchscript'].open(out)(images.numpy())
    assert (
        relative_error(scores, segment(load(cfg, checkpoint), images)) < 2e-4
    )


@pytest.mark.parametrize('size', [1, 2, 3, 6, (2, 3)])
def test_adaptive_pooling_as_matrix_products(size):
    layer = nn.AdaptiveAvgPool2d(size)
    for shape in ((1, 4, 7, 11), (2, 3, 6, 6), (2, 3, 2, 1), (1, 1, 16, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.allclose(
            _AdaptiveAvgPool(layer)(x), layer(x), rtol=1e-12, atol=1e-12
        )


def test_layers_that_are_kept():
    """Layers with a fixed size or a fractional scale are not replaced."""
    from mmseg.models.utils import Upsample

    for layer in (
        Upsample(scale_factor=1.5),
        Upsample(size=(8, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2),
    ):
        assert _dynamic_layer(layer, 'tokens') is None
    model = build(small_config('segmentor'))
    prepare(model)
    assert type(model.backbone).__name__ == 'VVT'  # the original


# -- detectors ----------------------------------------------------------------


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    cfg = small_config('detector')
    path = tmp_path_factory.mktemp('detector') / 'random.pth'
    return cfg, save_random(cfg, path, noise=0.002)


def detect(model, images):
    """Boxes of mmdet itself."""
    sample = DetDataSample()
    size = tuple(images.shape[2:])
    sample.set_metainfo(
        dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    )
    with torch.no_grad():
        (result,) = model.predict(images, [sample], rescale=False)
    return result.pred_instances


def test_dense_head(detector, tmp_path):
    cfg, checkpoint = detector
    out = str(tmp_path / 'model.pt')
    assert export_model(cfg, checkpoint, out, 'torchscript').error < 1e-5
    images = torch.randn(2, 3, 130, 96)
    outs = FORMATS['torchscript'].open(out)(images.numpy())
    with torch.no_grad():
        scores, boxes = load(cfg, checkpoint)(images, mode='tensor')
    assert len(outs) == len(scores) + len(boxes)
    for found, expected in zip(outs, (*scores, *boxes)):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    'threshold,clip', [(0.05, True), (0.9, True), (0.05, False)]
)
def test_boxes_are_those_of_mmdet(detector, threshold, clip):
    cfg, checkpoint = detector
    model = load(cfg, checkpoint)
    model.bbox_head.bbox_coder.clip_border = clip
    # More and fewer boxes than a level and a result may have.
    model.bbox_head.test_cfg.update(score_thr=threshold, nms_pre=300)
    network = build_network(model, nms=True)
    assert isinstance(network, DetectorNetwork)
    for size in ((64, 96), (200, 130)):
        images = torch.randn(1, 3, *size)
        expected = detect(model, images)
        with torch.no_grad():
            boxes, scores, labels = network(images)
        count = len(expected)
        assert count > 0
        assert relative_error(scores[:count], expected.scores) < 1e-5
        assert not scores[count:].any()
        assert (labels[count:] == -1).all()
        same = (labels[:count] == expected.labels) & (
            (boxes[:count] - expected.bboxes).abs().amax(dim=1) < 1e-2
        )
        assert same.float().mean() > 0.97  # ties may change places


@pytest.mark.parametrize('name', ['onnx', 'openvino'])
def test_boxes_in_engines(detector, name, tmp_path):
    cfg, checkpoint = detector
    out = str(tmp_path / f'model{FORMATS[name].suffix}')
    result = export_model(
        cfg, checkpoint, out, name, nms=True, fixed_size=(64, 96)
    )
    assert result.error < 1e-4
    images = torch.randn(1, 3, 64, 96)
    boxes, scores, labels = FORMATS[name].open(out, threads=1)(images.numpy())
    expected = detect(load(cfg, checkpoint), images)
    count = (scores > 0).sum()
    assert count == len(expected) > 0
    assert relative_error(scores[:count], expected.scores) < 1e-4


@pytest.mark.parametrize(
    'nms',
    [
        dict(type='soft_nms', iou_threshold=0.5),
        dict(type='nms', iou_threshold=0.5, class_agnostic=True),
        dict(type='nms', iou_threshold=0.5, max_num=5),
        dict(type='nms', iou_threshold=0.5, score_threshold=0.1),
        dict(type='nms'),
        None,
    ],
    ids=str,
)
def test_unsupported_suppression(detector, nms):
    """Options that would be ignored are refused."""
    cfg, _ = detector
    model = build(cfg)
    model.bbox_head.test_cfg.nms = nms
    with pytest.raises(UserError, match='requires test_cfg with nms of type'):
        build_network(model, nms=True)


def test_options_without_effect(detector):
    cfg, _ = detector
    model = build(cfg)
    model.bbox_head.test_cfg.nms.update(
        class_agnostic=False, max_num=-1, split_thr=5000
    )
    build_network(model, nms=True)


@pytest.mark.parametrize('change', ['none', 'box', 'label', 'missing'])
def test_box_errors_are_found(detector, change):
    """The comparison of boxes ignores their order, and nothing else."""
    cfg, checkpoint = detector
    network = build_network(load(cfg, checkpoint), nms=True)
    images = torch.randn(1, 3, 64, 96)

    def run(array):
        with torch.no_grad():
            outs = network(torch.from_numpy(array))
        boxes, scores, labels = (t.numpy().copy() for t in outs)
        order = np.arange(len(scores))
        order[:2] = [1, 0]
        if change == 'box':
            boxes[0] += 5
        elif change == 'label':
            labels[0] = (labels[0] + 1) % 10
        elif change == 'missing':
            scores[0] = 0
        return [boxes[order], scores[order], labels[order]]

    error = compare(run, network, None, images, 'float32')
    assert (error < 1e-4) == (change == 'none')
