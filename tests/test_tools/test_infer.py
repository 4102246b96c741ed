"""Tests of tools/infer.py for each task."""

import json
import os
import runpy
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvvt.apis import Predictor, find_images
from mmvvt.errors import UserError

from conftest import ROOT, build_model, run_tool

DEMOS = ROOT / 'configs' / 'demo'
DIGITS = DEMOS / 'vvt-nano_digits.py'
SCENES = DEMOS / 'vvt-nano_fpn_digit-scenes.py'
FASHION = ROOT / 'configs/classification/vvt-nano_1xb128_fashion-mnist.py'
# Small Mask R-CNN for inference only
MASK_RCNN = """
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3,
        bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(
        type='VVT', out_indices=(0, 1, 2, 3),
        arch=dict(embed_dims=[32, 64, 96, 128], num_heads=[1, 2, 3, 4],
                  mlp_ratios=[4, 4, 4, 4], depths=[1, 1, 1, 1])),
    neck=dict(type='FPN', in_channels=[32, 64, 96, 128], out_channels=16,
              num_outs=5),
    rpn_head=dict(
        type='RPNHead', in_channels=16, feat_channels=16,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[4], ratios=[1.0],
            strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=16, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16,
            num_classes=2),
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=16, featmap_strides=[4, 8, 16, 32]),
        mask_head=dict(
            type='FCNMaskHead', num_convs=1, in_channels=16,
            conv_out_channels=16, num_classes=2)),
    train_cfg=None,
    test_cfg=dict(
        rpn=dict(nms_pre=50, max_per_img=20, min_bbox_size=0,
                 nms=dict(type='nms', iou_threshold=0.7)),
        rcnn=dict(score_thr=0.05, max_per_img=6, mask_thr_binary=0.5,
                  nms=dict(type='nms', iou_threshold=0.5))))
test_dataloader = dict(dataset=dict(
    type='CocoDataset',
    metainfo=dict(classes=('cup', 'dog'), palette=[(255, 0, 0), (0, 200, 0)]),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(128, 96), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]))
visualizer = dict(type='DetLocalVisualizer')
default_scope = 'mmdet'
"""


def save_checkpoint(config, path, change=None, **meta):
    """Save random weights of the model as the runner does."""
    cfg = Config.fromfile(config)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = build_model(cfg.model, cfg.default_scope)
    if change:
        change(model)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


def prefer(label):
    """Make a classifier predict the same class for all images."""

    def change(model):
        model.head.fc.bias.data[label] = 3.0

    return change


@pytest.fixture(scope='module')
def photograph():
    """Part of a photograph ``(90, 120, 3)``, BGR."""
    from sklearn.datasets import load_sample_image

    return load_sample_image('china.jpg')[100:280:2, 100:340:2, ::-1].copy()


@pytest.fixture
def folder(tmp_path, photograph):
    """Folder with images of equal names, a text and a truncated file."""
    root = tmp_path / 'images'
    (root / 'a').mkdir(parents=True)
    cv2.imwrite(str(root / 'photo.png'), photograph)
    cv2.imwrite(str(root / 'photo.JPG'), photograph[:61, :77])
    cv2.imwrite(str(root / 'a' / 'photo.png'), photograph[::-1])
    whole = (root / 'photo.png').read_bytes()
    (root / 'cut.png').write_bytes(whole[: len(whole) // 2])
    (root / 'notes.txt').write_text('no image')
    return root


@pytest.fixture(scope='module')
def digits_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('digits') / 'digits.pth'
    return save_checkpoint(DIGITS, path, prefer(7))


def infer(*arguments):
    return run_tool('tools/infer.py', *arguments)


def infer_here(monkeypatch, *arguments):
    """Return the exit code of the tool, without a new process."""
    monkeypatch.setattr(sys, 'argv', ['infer.py', *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / 'tools' / 'infer.py'), run_name='__main__')
    except SystemExit as stop:
        return stop.code


def read_results(out, done, folder):
    """Check what all tasks have in common; return the results by file."""
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    reason = 'cannot be read as an image'
    assert f'skipped {folder}/cut.png: {reason}' in lines
    assert f'3 of 4 images: {out}/results.json' in lines
    assert lines[-1] == 'error: 1 of 4 images were skipped'
    assert 'Warning' not in done.stdout and 'WARNING' not in done.stdout

    results = json.loads((out / 'results.json').read_text())
    assert results['skipped'] == [
        dict(file=f'{folder}/cut.png', reason=reason)
    ]
    images = {
        os.path.relpath(entry['file'], folder): entry
        for entry in results['images']
    }
    assert list(images) == ['a/photo.png', 'photo.JPG', 'photo.png']
    for file, entry in images.items():
        assert entry['picture'] == f'pictures/{file}.png'
        count = len(entry['labels'])
        assert len(entry['classes']) == count
    assert len(list((out / 'pictures').rglob('*'))) == 4  # includes one folder
    return results, images


def picture_size(out, entry):
    height, width, _ = cv2.imread(str(out / entry['picture'])).shape
    return height, width


def test_classification(folder, digits_checkpoint, tmp_path):
    out = tmp_path / 'new' / 'out'
    done = infer(folder, DIGITS, digits_checkpoint, '--out-dir', out)
    results, images = read_results(out, done, folder)
    assert results['task'] == 'classification'

    import mmpretrain

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        reference = mmpretrain.ImageClassificationInferencer(
            str(DIGITS), pretrained=str(digits_checkpoint), device='cpu'
        )
    for file, entry in images.items():
        assert picture_size(out, entry) == (480, 960)
        (expected,) = reference(str(folder / file))
        order = np.argsort(-expected['pred_scores'])[:5]
        assert entry['labels'] == order.tolist()
        assert entry['labels'][0] == 7
        assert entry['classes'] == [str(label) for label in order]
        assert entry['scores'] == pytest.approx(
            expected['pred_scores'][order].tolist(), abs=2e-6
        )


def test_segmentation(folder, photograph, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmseg')
    checkpoint = save_checkpoint(
        SCENES,
        tmp_path / 'scenes.pth',
        lambda model: model.decode_head.conv_seg.weight.data.mul_(100),
    )
    out = tmp_path / 'out'
    done = infer(folder, SCENES, checkpoint, '--out-dir', out)
    results, images = read_results(out, done, folder)
    assert results['task'] == 'segmentation'

    from mmseg.apis import MMSegInferencer

    reference = MMSegInferencer(
        str(SCENES), weights=str(checkpoint), device='cpu'
    )
    for file, entry in images.items():
        image = cv2.imread(str(folder / file))
        labels = cv2.imread(
            str(out / entry['label_map']), cv2.IMREAD_UNCHANGED
        )
        assert labels.shape == image.shape[:2] and labels.dtype == np.uint8
        assert entry['label_map'] == f'label_maps/{file}.png'
        expected = reference(str(folder / file))['predictions']
        assert (labels == expected).all()

        counts = np.bincount(labels.ravel(), minlength=11)
        assert set(entry['labels']) == set(np.flatnonzero(counts).tolist())
        assert len(entry['labels']) > 1
        for label, name, share in zip(
            entry['labels'], entry['classes'], entry['shares']
        ):
            assert name == ('background' if label == 10 else str(label))
            assert share == pytest.approx(
                counts[label] / labels.size, abs=1e-6
            )
        assert entry['shares'] == sorted(entry['shares'], reverse=True)
        height, width = picture_size(out, entry)
        factor = -(-640 // image.shape[1])
        assert height == factor * image.shape[0]
        assert width > factor * image.shape[1]  # the legend

    small = folder / 'a' / 'small.png'
    cv2.imwrite(str(small), photograph[:31])
    assert (
        infer_here(
            monkeypatch, folder / 'a', SCENES, checkpoint, '--out-dir', out
        )
        == 'error: 1 of 2 images were skipped'
    )
    assert capsys.readouterr().err.strip() == (
        f'skipped {small}: the image must be at least 32 x 32 pixels, got '
        '25 x 96'
    )  # 31 x 120 after Resize


@pytest.fixture
def detector(tmp_path):
    pytest.importorskip('mmcv._ext')
    config = tmp_path / 'mask-rcnn.py'
    config.write_text(MASK_RCNN)
    return config, save_checkpoint(config, tmp_path / 'detector.pth')


def test_detection(folder, detector, tmp_path, monkeypatch, capsys):
    config, checkpoint = detector
    out = tmp_path / 'out'
    done = infer(
        folder, config, checkpoint, '--out-dir', out, '--score-thr', '0.06'
    )
    results, images = read_results(out, done, folder)
    assert results['task'] == 'detection'

    from mmdet.apis import DetInferencer
    from pycocotools import mask as coco

    reference = DetInferencer(
        str(config), weights=str(checkpoint), device='cpu', palette='random'
    )
    for file, entry in images.items():
        image = cv2.imread(str(folder / file))
        expected = reference(
            str(folder / file), return_datasamples=True, no_save_vis=True
        )['predictions'][0].pred_instances
        expected = expected[expected.scores >= 0.06]
        assert len(entry['labels']) == len(expected) > 0
        assert entry['labels'] == expected.labels.tolist()
        assert entry['classes'] == [('cup', 'dog')[i] for i in expected.labels]
        assert entry['scores'] == sorted(entry['scores'], reverse=True)
        assert np.allclose(entry['scores'], expected.scores, atol=1e-6)
        assert np.allclose(entry['boxes'], expected.bboxes, atol=0.01)
        masks = coco.decode(entry['masks'])  # (H, W, n)
        assert masks.shape[:2] == image.shape[:2]
        assert (masks.transpose(2, 0, 1) == np.asarray(expected.masks)).all()
        factor = -(-640 // image.shape[1])
        assert picture_size(out, entry) == (
            factor * image.shape[0],
            factor * image.shape[1],
        )

    # Without detections, the picture equals the image.
    file = folder / 'photo.png'
    assert (
        infer_here(
            monkeypatch,
            file,
            config,
            checkpoint,
            '--out-dir',
            out,
            '--score-thr',
            1,
        )
        is None
    )
    (entry,) = json.loads((out / 'results.json').read_text())['images']
    assert entry['boxes'] == entry['masks'] == entry['labels'] == []
    picture = cv2.imread(str(out / entry['picture']))
    assert (picture[3::6, 3::6] == cv2.imread(str(file))).all()

    # Test a model without masks.
    assert (
        infer_here(
            monkeypatch,
            file,
            config,
            checkpoint,
            '--out-dir',
            out,
            '--score-thr',
            0,
            '--cfg-options',
            'model.roi_head.mask_head=None',
            'model.roi_head.mask_roi_extractor=None',
        )
        is None
    )
    (entry,) = json.loads((out / 'results.json').read_text())['images']
    assert 'masks' not in entry and len(entry['boxes']) > 0


def test_kinds_of_png(
    tmp_path, photograph, digits_checkpoint, monkeypatch, capsys
):
    """Grey, RGBA, 16-bit and palette PNG give the same result."""
    from PIL import Image

    grey = photograph[..., 0]
    root = tmp_path / 'images'
    root.mkdir()
    cv2.imwrite(str(root / 'grey.png'), grey)
    cv2.imwrite(
        str(root / 'rgba.png'),
        np.dstack([grey, grey, grey, np.full_like(grey, 50)]),
    )
    cv2.imwrite(str(root / 'deep.png'), grey.astype(np.uint16) * 257)
    palette = Image.fromarray(255 - grey, mode='P')
    palette.putpalette([v for i in range(256) for v in [255 - i] * 3])
    palette.save(root / 'palette.png')
    assert (
        infer_here(
            monkeypatch,
            root,
            DIGITS,
            digits_checkpoint,
            '--out-dir',
            tmp_path / 'out',
        )
        is None
    )
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert len(results['images']) == 4 and results['skipped'] == []
    first = results['images'][0]['scores']
    for entry in results['images']:
        assert entry['scores'] == pytest.approx(first, abs=1e-6)


def test_a_network_of_one_channel(folder, tmp_path, monkeypatch, capsys):
    checkpoint = save_checkpoint(FASHION, tmp_path / 'fashion.pth', prefer(8))
    assert (
        infer_here(
            monkeypatch,
            folder / 'photo.png',
            FASHION,
            checkpoint,
            '--out-dir',
            tmp_path / 'out',
        )
        is None
    )
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['images'][0]['classes'][0] == 'Bag'


@pytest.mark.parametrize(
    'meta, expected',
    [
        (dict(), 'great white shark'),
        (
            dict(
                dataset_meta=dict(classes=[f'name {i}' for i in range(1000)])
            ),
            'name 2',
        ),
        (dict(dataset_meta=dict(classes=['one', 'two'])), 'class 2'),
    ],
)
def test_names_of_classes(
    meta, expected, folder, tmp_path, monkeypatch, capsys
):
    """Class names are read from the checkpoint, else from the dataset."""
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{DIGITS}'\n"
        'model = dict(head=dict(num_classes=1000))\n'
        'data_preprocessor = dict(num_classes=1000)\n'
        "test_dataloader = dict(dataset=dict(type='ImageNet'))"
    )
    checkpoint = save_checkpoint(
        config, tmp_path / 'in1k.pth', prefer(2), **meta
    )
    assert (
        infer_here(
            monkeypatch,
            folder / 'photo.png',
            config,
            checkpoint,
            '--out-dir',
            tmp_path / 'out',
        )
        is None
    )
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['images'][0]['classes'][0].startswith(expected)


def test_scores_that_are_not_finite(folder, tmp_path, monkeypatch, capsys):
    checkpoint = save_checkpoint(
        DIGITS,
        tmp_path / 'nan.pth',
        lambda m: m.head.fc.bias.data.fill_(np.nan),
    )
    file = folder / 'photo.png'
    assert (
        infer_here(
            monkeypatch,
            file,
            DIGITS,
            checkpoint,
            '--out-dir',
            tmp_path / 'out',
        )
        == 'error: 1 of 1 images were skipped'
    )
    assert (
        f'skipped {file}: the scores are not finite' in capsys.readouterr().err
    )


# -- invalid input is reported in one line ------------------------------------


def test_bad_arguments(folder, digits_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / 'out'

    def message(
        source=folder,
        config=DIGITS,
        checkpoint=digits_checkpoint,
        out=out,
        *more,
    ):
        return infer_here(
            monkeypatch, source, config, checkpoint, '--out-dir', out, *more
        )

    none = tmp_path / 'none'
    assert message(none) == f'error: no such image or folder: {none}'
    assert message(config=none) == f'error: no such config file: {none}'
    assert message(checkpoint=none) == (
        f'error: no such checkpoint file: {none}'
    )
    none.mkdir()
    assert message(none) == (
        f'error: no images in {none}: looked for .bmp, .jpeg, .jpg, .pgm, '
        '.png, .ppm, .tif, .tiff, .webp'
    )
    assert message(out=folder) == (
        f'error: --out-dir {folder} contains the input images; use a '
        'different folder'
    )
    assert message(
        folder, DIGITS, digits_checkpoint, out, '--device', 'abacus'
    ).startswith('error: --device abacus cannot be used: ')
    assert (
        message(folder, DIGITS, digits_checkpoint, out, '--score-thr', '30')
        == 'error: --score-thr must be from 0 to 1, got 30.0'
    )
    assert message(
        folder,
        DIGITS,
        digits_checkpoint,
        out,
        '--cfg-options',
        'model.head.num_classes=5',
        'data_preprocessor.num_classes=5',
    ).startswith(
        f'error: the checkpoint {digits_checkpoint} does not match the '
        'architecture of the model'
    )
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(digits_checkpoint.read_bytes()[:9999])
    assert message(checkpoint=cut).startswith(
        f'error: {cut} is truncated or not a PyTorch checkpoint'
    )
    for text in ("default_scope = 'mmengine'", "default_scope = 'mmdet'"):
        (tmp_path / 'config.py').write_text(text)
        line = message(config=tmp_path / 'config.py')
        assert line.startswith('error: ') and '\n' not in line
    assert not out.exists()


def test_what_is_found(folder):
    (folder / '.hidden.png').touch()
    (folder / 'out' / 'pictures').mkdir(parents=True)
    shutil.copy(folder / 'photo.png', folder / 'out' / 'pictures')
    (folder / 'out-of-doors').mkdir()
    shutil.copy(folder / 'photo.png', folder / 'out-of-doors')
    found = [
        'a/photo.png',
        'cut.png',
        'out-of-doors/photo.png',
        'photo.JPG',
        'photo.png',
    ]
    root, files = find_images(str(folder), str(folder / 'out'))
    assert root == str(folder) and files == found
    root, files = find_images(str(folder / 'notes.txt'), 'anywhere')
    assert os.path.join(root, files[0]) == str(folder / 'notes.txt')


# -- Python API ---------------------------------------------------------------


def test_predictor(folder, digits_checkpoint):
    predictor = Predictor(str(DIGITS), str(digits_checkpoint), device='cpu')
    assert predictor.task == 'classification'
    path = str(folder / 'photo.png')
    result = predictor(path)
    assert result['labels'][0] == 7 and result['classes'][0] == '7'
    assert predictor(cv2.imread(path)) == result


def test_everything_can_be_caught(folder, digits_checkpoint, tmp_path):
    digits, weights = str(DIGITS), str(digits_checkpoint)
    other = tmp_path / 'config.py'
    other.write_text("default_scope = 'mmengine'")
    for arguments, message in [
        (('none.py', weights), 'no such config file: none.py'),
        ((digits, 'none.pth'), 'no such checkpoint file: none.pth'),
        ((digits, __file__), 'refused to load|truncated'),
        ((str(other), weights), 'config.py has no model'),
        ((digits, weights, 'abacus'), 'device abacus cannot be used'),
        ((digits, weights, 'cpu', 30), 'score_thr must be from 0 to 1'),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Predictor(*arguments)
        assert '\n' not in str(caught.value)
    predictor = Predictor(digits, weights, device='cpu')
    for file in ('cut.png', 'notes.txt', 'none.png'):
        with pytest.raises(UserError):
            predictor(str(folder / file))
    with pytest.raises(UserError, match='no such image or folder'):
        find_images(str(tmp_path / 'none'), 'out')
