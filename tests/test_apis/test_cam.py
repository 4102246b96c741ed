"""Class activation maps equal Grad-CAM computed from gradients by hand."""

import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmvvt.apis import Predictor, class_activation_maps
from mmvvt.errors import UserError
from mmvvt.models import strips
from mmvvt.ops.native import load
from mmvvt.ops.strips import common
from mmvvt.preflight import build_model, read_config

from conftest import ROOT, photograph, run_tool

pytest.importorskip('pytorch_grad_cam')
for package in ('mmpretrain', 'mmseg', 'mmdet'):
    pytest.importorskip(package)

bbox2roi = pytest.importorskip('mmdet.structures.bbox').bbox2roi

DEMOS = ROOT / 'configs' / 'demo'
CONFIGS = dict(
    classification=str(DEMOS / 'vvt-nano_digits.py'),
    segmentation=str(DEMOS / 'vvt-nano_fpn_digit-scenes.py'),
    detection=str(DEMOS / 'retinanet_vvt-nano_digit-scenes.py'),
)
TOOL = 'tools/analysis_tools/vis_cam.py'
SCALE = 'test_dataloader.dataset.pipeline.1.scale'
TINY = dict(
    embed_dims=[32, 64, 96, 128],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[4, 4, 4, 4],
    depths=[1, 1, 1, 1],
)


def random_checkpoint(cfg, folder):
    """Write a checkpoint of random weights.

    The initial weights are too small for a difference between the classes.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    if hasattr(model, 'level_embed'):
        model.init_weights()  # The constructor of DINO leaves it unset.
    is_detector = hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')
    noise = 0.02 if is_detector else 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    path = str(folder / 'random.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    return {
        task: random_checkpoint(
            read_config(config), tmp_path_factory.mktemp(task)
        )
        for task, config in CONFIGS.items()
    }


@pytest.fixture(scope='module')
def predictor_of(checkpoints):
    """Function that returns the predictor of a task and an image size."""
    known = {}

    def build(task, size=None, score_thr=0.3):
        if (task, size, score_thr) not in known:
            # A rounding error moves some element across a bound of the clamps
            # now and then, and its gradient becomes zero or not.
            options = {'model.backbone.attn_cfg': dict(clamp=False)}
            if size:
                options[SCALE] = size
            known[task, size, score_thr] = Predictor(
                read_config(CONFIGS[task], options),
                checkpoints[task],
                'cpu',
                score_thr,
            )
        return known[task, size, score_thr]

    return build


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('image') / 'photograph.png')
    cv2.imwrite(path, photograph(75, 101))
    return path


# -- by hand ------------------------------------------------------------------


def scale(values, size=None):
    values = values - values.min()
    values = values / (1e-7 + values.max())
    return values if size is None else cv2.resize(values, size)


def grad_cam_by_hand(predictor, image, layer, score_of):
    """Compute a map from the gradients of autograd, and the score."""
    data = predictor.model.data_preprocessor(predictor.pipeline(image)[0])
    kept, grids = [], []

    def keep(module, args, output):
        if not output.requires_grad:
            output.requires_grad_()
        kept.append(output)
        return output.clone()  # Later layers may modify it in place.

    def keep_grid(module, args):
        grids.append(args[1])

    module = predictor.model.get_submodule(layer)
    handles = [module.register_forward_hook(keep)]
    if layer.startswith('backbone.'):
        stage = int(layer.removeprefix('backbone.').lstrip('normblck')[0])
        block = getattr(predictor.model.backbone, f'block{stage}')[-1]
        handles.append(block.register_forward_pre_hook(keep_grid))
    score = score_of(predictor.model, data['inputs'], data['data_samples'])
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    maps = [kept[0].detach(), gradient]
    if gradient.dim() == 3:
        ((height, width),) = grids
        # (1, N, C) -> (1, C, N) -> (1, C, h, w)
        maps = [m.transpose(1, 2).reshape(1, -1, height, width) for m in maps]
    activation, gradient = (m[0].double().numpy() for m in maps)
    weights = gradient.mean(axis=(1, 2))
    heat = np.maximum(np.einsum('c,chw->hw', weights, activation), 0)
    size = data['inputs'].shape[:1:-1]  # (W, H)
    return scale(scale(heat, tuple(size))), float(score.detach())


def class_score(label):
    def score_of(model, inputs, samples):
        return model.head(model.extract_feat(inputs))[0, label]

    return score_of


@pytest.mark.parametrize('size', [(128, 128), (96, 160), (384, 352)])  # H, W
@pytest.mark.parametrize(
    'options,layer',
    [
        ({}, 'backbone.norm4'),
        (dict(stage=2), 'backbone.norm2'),
        (dict(layer='backbone.block3.1'), 'backbone.block3.1'),
        (dict(layer='backbone.block1.0.norm2'), 'backbone.block1.0.norm2'),
    ],
)
def test_classifier(predictor_of, image, options, layer, size, monkeypatch):
    """The first block runs in strips if the image is large and it has no hook.

    The map by hand is computed without strips.
    """
    # With the kernels, strips are used from a sixteenth of the size on.
    least = 1 << 20 if load()[0] is None else 1 << 24
    monkeypatch.setattr(common, 'MIN_ELEMENTS', least)
    calls = []
    forward = strips.forward
    monkeypatch.setattr(
        strips, 'forward', lambda *args: calls.append(args) or forward(*args)
    )
    predictor = predictor_of('classification', size[::-1])
    result = class_activation_maps(predictor, image, range(5), **options)
    assert bool(calls) == (size[0] > 300 and 'block1.0.' not in layer)
    monkeypatch.setattr(strips, 'find_obstacle', lambda *args: 'test')
    assert result.layer == layer
    assert result.image.shape == (*size, 3) and result.image.dtype == np.uint8
    for label, found in enumerate(result.maps):
        heat, score = grad_cam_by_hand(
            predictor, image, layer, class_score(label)
        )
        assert (found.label, found.name) == (label, str(label))
        assert found.score == pytest.approx(score, abs=1e-4)
        assert found.heat.shape == size
        np.testing.assert_allclose(found.heat, heat, atol=2e-5)
    # With random weights, some classes have maps that are zero.
    first, second, *_ = (m.heat for m in result.maps if m.heat.any())
    assert first.max() > 0.99 and np.abs(first - second).max() > 0.1


def test_predicted_class_is_the_default(predictor_of, image):
    predictor = predictor_of('classification', (128, 128))
    (found,) = class_activation_maps(predictor, image).maps
    assert found.label == predictor(image)['labels'][0]
    assert found.predicted and found.target == 'predicted'
    other = (found.label + 1) % 10
    (found,) = class_activation_maps(predictor, image, [other]).maps
    assert not found.predicted and found.target == 'not predicted'


def pixel_score(label):
    """Mean over the pixels of the class, or over all pixels."""

    def score_of(model, inputs, samples):
        scores = model.encode_decode(inputs, [s.metainfo for s in samples])
        (scores,) = scores  # (K, H, W)
        mask = scores.argmax(dim=0) == label
        if not mask.any():
            mask[:] = True
        return scores[label][mask].mean()

    return score_of


@pytest.mark.parametrize(
    'options,layer',
    [
        ({}, 'backbone.norm4'),
        (dict(stage=1), 'backbone.norm1'),
        (dict(layer='neck.fpn_convs.1'), 'neck.fpn_convs.1'),
        # A ReLU modifies the output in place.
        (
            dict(layer='decode_head.scale_heads.0.0.bn'),
            'decode_head.scale_heads.0.0.bn',
        ),
    ],
)
def test_segmentor(predictor_of, image, options, layer):
    predictor = predictor_of('segmentation')
    result = class_activation_maps(predictor, image, **options)
    assert result.image.shape == (71, 96, 3)
    shares = predictor(image)
    present = [found.label for found in result.maps]
    assert present == shares['labels'][: len(present)]
    assert 1 <= len(present) <= 3
    absent = sorted(set(range(11)) - set(shares['labels']))[0]
    result = class_activation_maps(
        predictor, image, [present[0], absent], **options
    )
    for found in result.maps:
        heat, score = grad_cam_by_hand(
            predictor, image, layer, pixel_score(found.label)
        )
        assert found.score == pytest.approx(score, abs=1e-4)
        assert found.heat.shape == (71, 96)
        np.testing.assert_allclose(found.heat, heat, atol=2e-4)
    first, second = result.maps
    assert first.predicted and first.target.endswith(' predicted pixels')
    assert not second.predicted
    assert second.target == 'predicted nowhere, mean over all 6816 pixels'
    assert np.abs(first.heat - second.heat).max() > 0.1


def box_score(label, score_thr):
    def score_of(model, inputs, samples):
        levels = model.bbox_head(model.extract_feat(inputs))[0]
        scores = torch.cat(
            [level[0].view(-1, 10, *level.shape[2:])[:, label].flatten()
             for level in levels]
        )  # fmt: skip
        chosen = scores.sigmoid() >= score_thr
        return scores[chosen].mean() if chosen.any() else scores.max()

    return score_of


@pytest.mark.parametrize('score_thr', [0.3, 1.0])
def test_detector(predictor_of, image, score_thr):
    predictor = predictor_of('detection', score_thr=score_thr)
    result = class_activation_maps(predictor, image, [2, 6])
    # The network has the input 96 x 128, of which the last row is padding.
    assert result.image.shape == (95, 128, 3)
    assert result.layer == 'backbone.norm4' and result.grid == (3, 4)
    for found in result.maps:
        heat, score = grad_cam_by_hand(
            predictor,
            image,
            'backbone.norm4',
            box_score(found.label, score_thr),
        )
        assert found.predicted == (score_thr < 1)
        assert ('before NMS' in found.target) == found.predicted
        assert found.score == pytest.approx(score, abs=1e-4)
        assert found.heat.shape == (95, 128)
        np.testing.assert_allclose(found.heat, heat[:95], atol=2e-4)
    assert np.abs(result.maps[0].heat - result.maps[1].heat).max() > 0.1
    best = class_activation_maps(predictor, image).maps
    assert len(best) == (3 if score_thr < 1 else 1)


def test_nothing_is_changed(predictor_of, image):
    """The weights can still be trained, and the blocks run in strips."""
    predictor = predictor_of('segmentation')
    model, before = predictor.model, predictor(image)
    model.backbone.norm1.weight.requires_grad_(False)
    try:
        class_activation_maps(predictor, image)
        with pytest.raises(UserError):
            class_activation_maps(predictor, image, ['no such class'])
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == len(list(model.parameters())) - 1
    finally:
        model.backbone.norm1.weight.requires_grad_(True)
    assert predictor(image) == before
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# -- other models -------------------------------------------------------------


def predictor_from(cfg, folder, **options):
    path = str(folder / 'config.py')
    cfg.dump(path)
    cfg = read_config(path)
    return Predictor(cfg, random_checkpoint(cfg, folder), 'cpu', **options)


def test_frozen_backbone(tmp_path, image):
    """No parameter up to the layer requires a gradient."""
    cfg = Config.fromfile(CONFIGS['segmentation'])
    cfg.model.backbone.frozen_stages = 3
    predictor = predictor_from(cfg, tmp_path)
    assert class_activation_maps(predictor, image).maps[0].heat.max() > 0.99


@pytest.mark.parametrize('threshold', [0.3, 0.5])
def test_segmentor_with_one_score(tmp_path, image, threshold):
    cfg = Config.fromfile(CONFIGS['segmentation'])
    cfg.model.pop('auxiliary_head')
    cfg.model.decode_head.update(
        num_classes=2,
        out_channels=1,
        threshold=threshold,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )
    predictor = predictor_from(cfg, tmp_path)
    batch = predictor.model.data_preprocessor(predictor.pipeline(image)[0])
    metas = [sample.metainfo for sample in batch['data_samples']]
    with torch.no_grad():
        scores = predictor.model.encode_decode(batch['inputs'], metas)
        # Shift the scores so that both classes are predicted.
        predictor.model.decode_head.conv_seg.bias -= scores.median()
        scores = predictor.model.encode_decode(batch['inputs'], metas)
    count = int((scores.sigmoid() > threshold).sum())
    assert 100 < count < scores.numel() - 100
    maps = class_activation_maps(predictor, image, [0, 1]).maps
    for found, number in zip(maps, (scores.numel() - count, count)):
        assert found.target == f'mean over {number} predicted pixels'


def test_last_stage_of_a_head_without_neck(tmp_path, image):
    cfg = Config.fromfile(CONFIGS['segmentation'])
    cfg.model.pop('neck')
    cfg.model.decode_head = dict(
        cfg.model.auxiliary_head, in_index=1, loss_decode=[]
    )
    cfg.model.decode_head.pop('loss_decode')
    predictor = predictor_from(cfg, tmp_path)
    result = class_activation_maps(predictor, image)
    assert result.layer == 'backbone.norm2' and result.grid == (9, 12)
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor, image, stage=4)
    assert str(caught.value) == (
        'the class scores do not depend on the output of backbone.norm4'
    )


def test_dino(tmp_path, image):
    """The scores of a transformer are those of its last layer."""
    cfg = Config.fromfile(CONFIGS['detection'])
    detector = Config.fromfile(
        ROOT / 'configs/detection/dino-4scale_vvt-small_12e_coco.py'
    )
    cfg.model = detector.model
    cfg.model.update(num_queries=20)
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    cfg.model.neck.in_channels = TINY['embed_dims'][1:]
    cfg.model.encoder.num_layers = cfg.model.decoder.num_layers = 1
    cfg.model.test_cfg.max_per_img = 20
    predictor = predictor_from(cfg, tmp_path, score_thr=0.0)
    result = class_activation_maps(predictor, image, [1, 79])
    first, second = result.maps
    assert first.target == 'mean over 20 boxes before NMS'
    assert first.heat.max() > 0.9
    assert np.abs(first.heat - second.heat).max() > 0.01


def proposal_score(label, score_thr):
    """Mean over the proposals, computed with the parts of the RoI heads."""

    def score_of(model, inputs, samples):
        features = model.extract_feat(inputs)
        proposals = model.rpn_head.predict(features, samples, rescale=False)
        rois = bbox2roi([proposal.bboxes for proposal in proposals])
        roi_head = model.roi_head
        if isinstance(roi_head.bbox_head, nn.ModuleList):
            scores = []
            for stage, head in enumerate(roi_head.bbox_head):
                extractor = roi_head.bbox_roi_extractor[stage]
                levels = features[: extractor.num_inputs]
                values, deltas = head(extractor(levels, rois))
                scores.append(values)
                boxes = head.regress_by_class(
                    rois[:, 1:],
                    values[:, :-1].argmax(dim=1),
                    deltas,
                    samples[0].metainfo,
                )
                rois = bbox2roi([boxes])
            scores = sum(scores) / len(scores)
        else:
            extractor = roi_head.bbox_roi_extractor
            levels = features[: extractor.num_inputs]
            scores, _ = roi_head.bbox_head(extractor(levels, rois))
        probabilities = scores.softmax(1)[:, label]
        chosen = probabilities >= score_thr
        if not chosen.any():
            return scores[probabilities.argmax(), label]
        return scores[chosen, label].mean()

    return score_of


@pytest.mark.parametrize('score_thr', [0.05, 1.0])
@pytest.mark.parametrize('cascade', [False, True])
def test_two_stages(tmp_path, image, cascade, score_thr):
    """The score is that of the proposals; the masks are not computed."""
    cfg = Config.fromfile(DEMOS / 'mask-rcnn_vvt-nano_digit-scenes.py')
    cfg.model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    if cascade:
        roi_head = cfg.model.roi_head
        roi_head.update(
            type='CascadeRoIHead',
            num_stages=2,
            stage_loss_weights=[1, 0.5],
            bbox_roi_extractor=[roi_head.bbox_roi_extractor] * 2,
            bbox_head=[dict(roi_head.bbox_head, reg_class_agnostic=True)] * 2,
        )
        cfg.model.update(type='CascadeRCNN')
        cfg.model.train_cfg.rcnn = [cfg.model.train_cfg.rcnn] * 2
    predictor = predictor_from(cfg, tmp_path, score_thr=score_thr)
    result = class_activation_maps(predictor, image, [2, 6])
    for found in result.maps:
        heat, score = grad_cam_by_hand(
            predictor,
            image,
            result.layer,
            proposal_score(found.label, score_thr),
        )
        assert found.predicted == (score_thr < 1)
        assert found.score == pytest.approx(score, abs=1e-4)
        height, width = found.heat.shape
        np.testing.assert_allclose(
            found.heat, heat[:height, :width], atol=2e-4
        )
    assert np.abs(result.maps[0].heat - result.maps[1].heat).max() > 0.05
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor, image, [10])  # the background
    assert str(caught.value).startswith('no class 10; the classes are 0: ')
    assert predictor.model.with_mask
    predictor(image)  # predicts masks


def test_no_proposals(tmp_path, image):
    cfg = Config.fromfile(DEMOS / 'mask-rcnn_vvt-nano_digit-scenes.py')
    cfg.model.test_cfg.rpn.min_bbox_size = 10000
    predictor = predictor_from(cfg, tmp_path)
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor, image)
    assert str(caught.value) == 'the detector proposes no region of this image'


def test_unsupported_detector(tmp_path, image):
    cfg = Config.fromfile(DEMOS / 'mask-rcnn_vvt-nano_digit-scenes.py')
    predictor = predictor_from(cfg, tmp_path)
    predictor.model.roi_head.bbox_head.num_classes = 7
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor, image)
    assert str(caught.value) == (
        'class activation maps do not support MaskRCNN, but classifiers of '
        'mmpretrain, segmentors of mmseg, and detectors of mmdet: RetinaNet '
        'and other single-stage detectors, Mask R-CNN and other two-stage '
        'detectors, and DINO'
    )


def test_another_backbone(tmp_path, image):
    """A layer is found by its name; a stage needs a VVT backbone."""
    cfg = Config.fromfile(CONFIGS['classification'])
    cfg.model.backbone = dict(type='ResNet', depth=18, out_indices=(3,))
    cfg.model.head.in_channels = 512
    predictor = predictor_from(cfg, tmp_path)
    result = class_activation_maps(predictor, image, layer='backbone.layer3')
    assert result.grid == (2, 2)
    with pytest.raises(UserError, match='the model has no VVT backbone'):
        class_activation_maps(predictor, image)


# -- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(classes=['ten']), 'no class ten; the classes are 0: 0, 1: 1, '),
        (dict(classes=[10]), 'no class 10; the classes are 0: 0'),
        (dict(classes=[-1]), 'no class -1; the classes are 0: 0'),
        (dict(stage=5), 'the backbone of this model has the stages 1 to 4, g'),
        (dict(stage=0), 'the backbone of this model has the stages 1 to 4, g'),
        (dict(stage=1, layer='head'), 'a stage and a layer cannot be given'),
        (
            dict(layer='backbone.nrm4'),
            'no layer backbone.nrm4; similar names: backbone.norm4, ',
        ),
        (dict(layer='?'), 'no layer ?; for example backbone.patch_embed1, '),
        (
            dict(layer='backbone.patch_embed1'),
            'position of a stage (1, h * w, C): got tuple',
        ),
        (
            dict(layer='head.fc'),
            'the output of head.fc is no map (1, C, h, w), and has no token '
            'for each position of a stage (1, h * w, C): got shape (1, 10)',
        ),
        (
            dict(layer='backbone.block1.0.attn.se_fc'),
            'got shape (1, 1, 32)',
        ),
        (
            dict(layer='head.loss_module'),
            'head.loss_module is called 0 times for an image; use a layer',
        ),
    ],
)
def test_bad_arguments(predictor_of, image, options, message):
    predictor = predictor_of('classification', (128, 128))
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor, image, **options)
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_layer_that_is_called_for_each_level(predictor_of, image):
    with pytest.raises(UserError, match='retina_cls is called 3 times for an'):
        class_activation_maps(
            predictor_of('detection'), image, layer='bbox_head.retina_cls'
        )


def test_one_position(predictor_of, image):
    with pytest.raises(UserError, match='norm4 has one position for an image'):
        class_activation_maps(predictor_of('classification'), image)


def test_scores_that_do_not_depend_on_a_layer(predictor_of, image):
    predictor = predictor_of('classification', (128, 128))
    head = predictor.model.head
    head.spare = nn.Identity()
    handle = predictor.model.backbone.register_forward_hook(
        lambda module, args, outputs: [head.spare(2 * outputs[-1])] and None
    )
    try:
        with pytest.raises(UserError) as caught:
            class_activation_maps(predictor, image, layer='head.spare')
    finally:
        handle.remove()
        del head.spare
    assert str(caught.value) == (
        'the class scores do not depend on the output of head.spare'
    )


@pytest.mark.parametrize(
    'wanted,message',
    [
        (
            'crane',
            'several classes are called crane: use one of the indices 1',
        ),
        (
            'Hen',
            'no class Hen; similar classes: 7: hen; the classes have the ',
        ),
        ('xyz', 'no class xyz; the classes have the indices 0 to 39'),
        ('12', None),
        ('hen', None),
    ],
)
def test_many_classes(wanted, message):
    from mmvvt.apis.cam import _find_class

    names = [f'class {i}' for i in range(40)]
    names[1] = names[2] = 'crane'
    names[7] = 'hen'
    if message is None:
        assert _find_class(wanted, names, 40) == dict(hen=7).get(wanted, 12)
        return
    with pytest.raises(UserError) as caught:
        _find_class(wanted, names, 40)
    assert message in str(caught.value)


def test_bad_images(predictor_of, tmp_path):
    predictor = predictor_of('classification', (128, 128))
    for name in ('no.png', 'text.png'):
        path = str(tmp_path / name)
        (tmp_path / 'text.png').write_text('text')
        with pytest.raises(UserError) as caught:
            class_activation_maps(predictor, path)
        assert str(caught.value).startswith(f'{path}: ')
    small = predictor_of('classification', (64, 31))
    with pytest.raises(UserError, match='must be at least 32 x 32 pixels'):
        class_activation_maps(small, photograph(31, 64))


def test_missing_package(predictor_of, image, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(UserError) as caught:
        class_activation_maps(predictor_of('segmentation'), image)
    assert str(caught.value).startswith(
        'class activation maps need pytorch-grad-cam: pip install "grad-cam<'
    )


# -- the tool -----------------------------------------------------------------


def test_tool(checkpoints, image, tmp_path):
    """Rows may have different sizes."""
    wide = tmp_path / 'wide.png'
    cv2.imwrite(str(wide), photograph(60, 160))
    out = tmp_path / 'folder' / 'cam.png'
    config, checkpoint = (x['segmentation'] for x in (CONFIGS, checkpoints))
    done = run_tool(
        *(TOOL, image, wide, config, checkpoint, out),
        *('--class', 'background', '3', '--stage', '3'),
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()[-5:]
    assert lines[0].startswith(f'{image}: background: score ')
    assert lines[3].startswith(f'{wide}: 3: score ')
    assert 'pixels' in lines[3]
    assert lines[4] == f'4 maps of 2 images: {out}'
    sheet = cv2.imread(str(out))
    assert sheet.std() > 10 and sheet.std(axis=2).max() > 20  # has colours
    assert [path.name for path in out.parent.iterdir()] == ['cam.png']


@pytest.mark.parametrize(
    'task,options,message',
    [
        ('detection', ['--class', 'ten'], 'error: no class ten; the classes'),
        ('classification', ['--layer', 'norm5'], 'error: no layer norm5; '),
        ('classification', ['--stage', '9'], 'error: the backbone of this '),
        ('detection', ['--score-thr', '2'], 'error: --score-thr must be f'),
        ('detection', ['--stage', '1', '--layer', 'neck'], 2),
        ('detection', ['--stage', 'x'], 2),
    ],
)
def test_exit_codes(checkpoints, image, tmp_path, task, options, message):
    out = tmp_path / 'cam.png'
    done = run_tool(
        TOOL, image, CONFIGS[task], checkpoints[task], out, *options
    )
    assert done.returncode == (1 if isinstance(message, str) else message)
    if isinstance(message, str):
        assert done.stdout.splitlines()[-1].startswith(message), done.stdout
    assert not out.exists()


def test_bad_output(checkpoints, image):
    task = 'classification'
    done = run_tool(TOOL, image, CONFIGS[task], checkpoints[task], 'cam.jpg')
    assert done.returncode == 1
    assert done.stdout == 'error: OUT must end with .png, got cam.jpg\n'
