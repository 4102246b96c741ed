"""Tests of VVT in mmdet's detectors."""

from importlib import resources

import cv2
import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT, photograph

pytest.importorskip('mmdet')
from mmdet.structures import DetDataSample  # noqa: E402

BASES = ROOT / 'configs' / '_base_'
NANO = dict(
    embed_dims=[32, 64, 96, 128],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[4, 4, 4, 4],
    depths=[1, 1, 2, 1],
)
KINDS = [
    'retinanet_vvt_fpn',
    'mask-rcnn_vvt_fpn',
    'cascade-mask-rcnn_vvt_fpn',
    'dino_vvt',
]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def nano_model(kind, **backbone):
    """Build the detector of a base config with a small VVT.

    It keeps a few boxes independent of their scores.
    """
    model = Config.fromfile(BASES / 'models' / f'{kind}.py').model
    model.backbone.update(arch=NANO, **backbone)
    stages = len(model.neck.in_channels)
    model.neck.in_channels = NANO['embed_dims'][-stages:]
    if model.type == 'DINO':
        model.update(num_queries=20)
        model.test_cfg.max_per_img = 4
    elif model.type == 'RetinaNet':
        model.test_cfg.update(score_thr=0.0, max_per_img=4)
    else:
        model.test_cfg.rpn.max_per_img = 8
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
    return model


def build(*args, **kwargs):
    model = MODELS.build(nano_model(*args, **kwargs))
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_classifier_fills_the_backbone(kind, tmp_path, capfd):
    """A pretrained classifier provides all tensors of the backbone."""
    init_default_scope('mmpretrain')
    pytest.importorskip('mmpretrain')
    classifier = MODELS.build(
        Config.fromfile(BASES / 'models' / 'vvt-nano_classifier.py').model
    )
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict()), path)

    init_default_scope('mmdet')
    model = build(
        kind,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        ),
    )
    assert 'unexpected key' not in (said := ''.join(capfd.readouterr()))
    assert 'missing keys' not in said
    state = classifier.backbone.state_dict()
    assert set(state) == set(model.backbone.state_dict())
    for key, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize('kind', KINDS)
def test_sizes_not_divisible_by_32(kind):
    """A batch with two odd image sizes works without padding to 32."""
    model = build(kind)
    model.data_preprocessor.pad_size_divisor = 1
    sizes = [(97, 131), (85, 150)]
    samples = [
        DetDataSample(
            metainfo=dict(
                img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)
            )
        )
        for size in sizes
    ]
    images = [torch.randint(256, (3, *size)).byte() for size in sizes]
    with torch.no_grad():
        data = model.data_preprocessor(
            dict(inputs=images, data_samples=samples)
        )
        assert data['inputs'].shape == (2, 3, 97, 150)
        results = model(**data, mode='predict')
    for result, (height, width) in zip(results, sizes):
        found = result.pred_instances
        assert len(found) == 4
        assert found.bboxes.isfinite().all()
        assert found.bboxes.min() >= 0
        assert found.bboxes[:, 0::2].max() <= width + 0.01
        assert found.bboxes[:, 1::2].max() <= height + 0.01
        if 'mask' in kind:
            assert found.masks.shape == (4, height, width)


@pytest.mark.parametrize('kind', ['retinanet_vvt_fpn', 'mask-rcnn_vvt_fpn'])
def test_boxes_are_of_the_original_image(kind):
    """Boxes are in pixels of the original image."""
    model = build(kind)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(96, 120), ori_shape=(48, 60), scale_factor=(2.0, 2.0)
        )
    )
    data = dict(
        inputs=[torch.randint(256, (3, 96, 120)).byte()], data_samples=[sample]
    )
    with torch.no_grad():
        (result,) = model.test_step(data)
    found = result.pred_instances
    assert len(found) == 4 and found.bboxes.max() <= 60.01
    assert found.bboxes[:, 1::2].max() <= 48.01


@pytest.mark.parametrize('kind', ['retinanet_vvt_fpn', 'dino_vvt'])
def test_test_time_augmentation(kind, tmp_path):
    """Boxes of six views are merged in the original image."""
    cfg = Config.fromfile(BASES / 'datasets' / 'coco_detection.py')
    for resize in cfg.tta_pipeline[-1].transforms[0]:
        resize.scale = tuple(side // 10 for side in resize.scale)
    path = tmp_path / 'image.png'
    assert cv2.imwrite(str(path), photograph(60, 90))
    views = Compose(cfg.tta_pipeline)(
        dict(img_path=str(path), img_id=0, instances=[])
    )
    assert len(views['inputs']) == 6

    cfg.tta_model.tta_cfg.max_per_img = 7
    model = MODELS.build(dict(cfg.tta_model, module=nano_model(kind)))
    model.module.init_weights()
    model.eval()
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([views]))
    found = result.pred_instances
    assert len(found) == 7  # of 6 x 4 boxes
    assert (found.scores.diff() <= 0).all()
    assert -0.01 <= found.bboxes.min()
    assert found.bboxes[:, 0::2].max() <= 90.01
    assert found.bboxes[:, 1::2].max() <= 60.01


@pytest.mark.parametrize('kind', ['retinanet_vvt_fpn', 'mask-rcnn_vvt_fpn'])
def test_inferencer_on_a_photograph(kind, tmp_path):
    from mmdet.apis import DetInferencer

    dataset = 'instance' if 'mask' in kind else 'detection'
    cfg = Config.fromfile(BASES / 'detection_runtime.py')
    cfg.merge_from_dict(
        dict(Config.fromfile(BASES / 'datasets' / f'coco_{dataset}.py'))
    )
    cfg.model = nano_model(kind)
    (resize,) = [
        step
        for step in cfg.test_dataloader.dataset.pipeline
        if step.type == 'Resize'
    ]
    resize.scale = (320, 200)
    model = MODELS.build(cfg.model)
    model.init_weights()
    classes = tuple(f'class {i}' for i in range(80))
    weights = tmp_path / 'weights.pth'
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=dict(classes=classes)),
        ),
        weights,
    )

    inferencer = DetInferencer(cfg, str(weights), device='cpu')
    path = resources.files('sklearn') / 'datasets' / 'images' / 'china.jpg'
    result = inferencer(
        str(path),
        out_dir=str(tmp_path),
        pred_score_thr=0.0,
        no_save_pred=False,
    )
    (prediction,) = result['predictions']
    assert len(prediction['bboxes']) == len(prediction['scores']) == 4
    assert all(0 <= label < 80 for label in prediction['labels'])
    for x1, y1, x2, y2 in prediction['bboxes']:
        assert 0 <= x1 <= x2 <= 640.01 and 0 <= y1 <= y2 <= 427.01
    assert ('masks' in prediction) == ('mask' in kind)
    assert inferencer.model.dataset_meta['classes'] == classes

    drawn = cv2.imread(str(tmp_path / 'vis' / 'china.jpg'))
    assert drawn.shape == (427, 640, 3)
    plain = photograph(427, 640).astype(int)
    assert (abs(drawn - plain).max(axis=2) > 60).sum() > 100  # the boxes
    assert (
        mmengine.load(tmp_path / 'preds' / 'china.json')['labels']
        == prediction['labels']
    )
