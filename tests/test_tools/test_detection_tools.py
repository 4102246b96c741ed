"""Tests of tools/train.py and tools/test.py with detectors."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import torch

from conftest import ROOT, run_tool, write_coco

pytest.importorskip('mmdet')

# Config with a shallow VVT, images of 100 x 160 pixels and few proposals
CONFIG = """
_base_ = '{root}/configs/detection/{recipe}.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[96, 160, 320, 512],
            num_heads=[1, 2, 5, 8],
            mlp_ratios=[1, 1, 1, 1],
            depths=[1, 1, 1, 1]),
        drop_path_rate=0.,
        init_cfg=None){model})
data_root = '{data}'
train_dataloader = dict(
    num_workers=0,
    dataset=dict(
        data_root=data_root,
        filter_cfg=dict(filter_empty_gt=False, min_size=0)))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=data_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""
MASK_RCNN = """,
    train_cfg=dict(
        rpn_proposal=dict(max_per_img=30), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(
        rpn=dict(max_per_img=20), rcnn=dict(score_thr=0., max_per_img=6))"""
RETINANET = """,
    test_cfg=dict(score_thr=0., max_per_img=6)"""


def write_config(path, recipe, model, data):
    path.write_text(
        CONFIG.format(root=ROOT, recipe=recipe, model=model, data=data)
    )
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Dataset with two images per split, one of them empty."""
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp('data') / 'coco'
    write_coco(root, CocoDataset.METAINFO['classes'])
    return root


@pytest.fixture(scope='module')
def config(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('config')
    path = write_config(
        folder / 'mask-rcnn.py',
        'mask-rcnn_vvt-tiny_fpn_1x_coco',
        MASK_RCNN,
        data,
    )
    with open(path, 'a') as file:
        file.write("""
load = dict(type='LoadImageFromFile')
resize = dict(type='Resize', scale=(160, 100), keep_ratio=True)
objects = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
pack = dict(type='PackDetInputs', meta_keys=(
    'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
train_dataloader['dataset']['pipeline'] = [load, objects, resize, pack]
val_dataloader['dataset']['pipeline'] = [load, resize, objects, pack]
""")
    return path


def test_stock_get_flops(config):
    """The tool of mmdet counts a detector with VVT at the data set's sizes."""
    import mmdet

    tool = Path(mmdet.__path__[0]) / '.mim/tools/analysis_tools/get_flops.py'
    done = run_tool(tool, config, '--num-images', 1)
    assert done.returncode == 0, done.stdout
    assert 'Input shape: (128, 160)' in done.stdout
    (flops,) = re.findall(r'^Flops: ([0-9.]+)G$', done.stdout, re.MULTILINE)
    assert float(flops) > 1


@pytest.fixture(scope='module')
def trained(tmp_path_factory, config):
    """Work directory after one epoch with one step."""
    work_dir = tmp_path_factory.mktemp('trained')
    done = run_tool('tools/train.py', config, '--work-dir', work_dir)
    assert done.returncode == 0, done.stdout
    assert 'coco/segm_mAP' in done.stdout
    assert list(work_dir.glob('best_coco_bbox_mAP_epoch_1.pth'))
    return work_dir


def test_results_in_coco_format(trained, config, data, tmp_path):
    from pycocotools.coco import COCO

    done = run_tool(
        'tools/test.py',
        config,
        trained / 'epoch_1.pth',
        '--out',
        tmp_path / 'p.pkl',
        '--show-dir',
        tmp_path / 'show',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        f'test_evaluator.outfile_prefix={tmp_path}/result',
    )
    assert done.returncode == 0, done.stdout
    assert 'coco/bbox_mAP: ' in done.stdout
    truth = COCO(str(data / 'annotations' / 'instances_val2017.json'))
    predictions = {p['img_id']: p for p in mmengine.load(tmp_path / 'p.pkl')}
    assert set(predictions) == set(truth.getImgIds()) == {0, 1}
    for kind in ('bbox', 'segm'):
        results = truth.loadRes(str(tmp_path / f'result.{kind}.json'))
        assert len(results.getAnnIds()) == 12
        for image in truth.getImgIds():
            found = results.loadAnns(results.getAnnIds(imgIds=[image]))
            instances = predictions[image]['pred_instances']
            np.testing.assert_allclose(
                [f['score'] for f in found], instances['scores'], rtol=1e-6
            )
            # Labels are indices of classes; category ids are not consecutive.
            assert [f['category_id'] for f in found] == [
                2 * int(label) + 1 for label in instances['labels']
            ]
            if kind == 'segm':
                assert all(
                    truth.annToMask(f).shape == (75, 101) for f in found
                )
    pictures = list((tmp_path / 'show').iterdir())
    assert len(pictures) == 2
    assert all(cv2.imread(str(p)) is not None for p in pictures)


def exit_line(monkeypatch, tool, *arguments):
    """Return the exit message of a tool, without a new process."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    return caught.value.code


def test_bad_data_stops_both_tools(config, data, tmp_path, monkeypatch):
    root = tmp_path / 'coco'
    shutil.copytree(data, root)
    (root / 'train2017' / '000000000001.jpg').unlink()
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'][2]['name'] = 'Car'
    path.write_text(json.dumps(content))

    line = exit_line(
        monkeypatch,
        'train.py',
        config,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        f'train_dataloader.dataset.data_root={root}',
    )
    assert line == (
        'error: train_dataloader (CocoDataset): '
        f'{root}/annotations/instances_train2017.json lists 2 images, of '
        f"which 1 do not exist: '{root}/train2017/000000000001.jpg'"
    )

    line = exit_line(
        monkeypatch,
        'test.py',
        config,
        __file__,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        f'test_dataloader.dataset.data_root={root}',
    )
    assert line.startswith(
        f'error: test_dataloader (CocoDataset): {path} is missing the '
        "categories 'car' of 80 classes; it has 'person', 'bicycle', 'Car' "
        'and 77 more'
    )


def test_masks_have_no_test_time_augmentation(monkeypatch):
    config = ROOT / 'configs/detection/mask-rcnn_vvt-tiny_fpn_1x_coco.py'
    line = exit_line(monkeypatch, 'test.py', config, __file__, '--tta')
    assert line == 'error: --tta needs tta_model in the config'


def test_training_step():
    done = run_tool(
        'tools/analysis_tools/training_step.py',
        'configs/detection/mask-rcnn_vvt-tiny_fpn_1x_coco.py',
        '--batch',
        1,
        '--runs',
        1,
        '--shape',
        65,
        96,
        '--cfg-options',
        'model.backbone.with_cp=True',
        'model.train_cfg.rcnn.sampler.num=16',
    )
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(
        r'1 x 65 x 96: [\d.]+ s per step \(median of 1\), peak [\d.]+ GiB',
        done.stdout.splitlines()[-1],
    )


def losses(work_dir):
    """Return the logged losses by name for each step."""
    (log,) = Path(work_dir).glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if 'loss' in k}
        for r in records
        if 'loss' in r
    ]


def test_two_processes_equal_one(tmp_path):
    """Two processes give the same losses and weights as one.

    RetinaNet divides the loss by the number of positive samples in a process.
    All images have the same boxes, so this number is the same. The image size
    needs no padding: with random weights, the biases are zero, and the
    LayerNorms amplify rounding errors in padding by 1 / sqrt(eps).
    """
    from mmdet.datasets import CocoDataset

    data = tmp_path / 'coco'
    write_coco(data, CocoDataset.METAINFO['classes'], images=4, empty=0)
    config = write_config(
        tmp_path / 'retinanet.py',
        'retinanet_vvt-tiny_fpn_1x_coco',
        RETINANET,
        data,
    )
    with open(config, 'a') as file:
        file.write("""
load = dict(type='LoadImageFromFile')
resize = dict(type='Resize', scale=(160, 96), keep_ratio=False)  # no padding
objects = dict(type='LoadAnnotations', with_bbox=True)
pack = dict(type='PackDetInputs', meta_keys=(
    'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
train_dataloader['dataset']['pipeline'] = [load, objects, resize, pack]
optim_wrapper = dict(optimizer=dict(
    _delete_=True, type='SGD', lr=1e-4, weight_decay=0.))
param_scheduler = []
val_dataloader = val_evaluator = val_cfg = None
randomness = dict(seed=3)
""")
    one = run_tool('tools/train.py', config, '--work-dir', tmp_path / 'one')
    assert one.returncode == 0, one.stdout
    two = subprocess.run(
        [
            'bash',
            'tools/dist_train.sh',
            str(config),
            '2',
            '--work-dir',
            str(tmp_path / 'two'),
            '--cfg-options',
            'train_dataloader.batch_size=1',
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHON': sys.executable, 'PORT': '29527'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stdout
    first, second = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert len(first) == len(second) == 2
    for a, b in zip(first, second):
        assert set(a) == {'loss', 'loss_cls', 'loss_bbox'}
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    # After two steps of SGD, equal weights imply equal gradients.
    one, two = (
        torch.load(tmp_path / name / 'epoch_1.pth')['state_dict']
        for name in ('one', 'two')
    )
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6)
