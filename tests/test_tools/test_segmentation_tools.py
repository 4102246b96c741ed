"""Tests of tools/train.py and tools/test.py with segmentors."""

import shutil

import cv2
import mmengine
import numpy as np
import pytest
import torch

from mmvvt.datasets import write_digit_scenes

from conftest import ROOT, run_tool

pytest.importorskip('mmseg')

DEMO = ROOT / 'configs' / 'demo' / 'vvt-nano_fpn_digit-scenes.py'
ADE = (
    ROOT
    / 'configs'
    / 'segmentation'
    / 'vvt-tiny_fpn_8xb4-40k_ade20k-512x512.py'
)
NO_PRETRAINED = 'model.backbone.init_cfg=None'
STEPS = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]


def roots(root):
    return [
        f'{loader}_dataloader.dataset.data_root={root}'
        for loader in ('train', 'val', 'test')
    ]


@pytest.fixture(scope='module')
def scenes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes') / 'digit-scenes'
    write_digit_scenes(str(root), 4, 4)
    return root


@pytest.fixture(scope='module')
def trained(tmp_path_factory, scenes_root):
    """Work directory after two steps."""
    work_dir = tmp_path_factory.mktemp('trained')
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        work_dir,
        '--cfg-options',
        NO_PRETRAINED,
        *STEPS,
        *roots(scenes_root),
    )
    assert done.returncode == 0, done.stdout
    assert 'mIoU' in done.stdout
    return work_dir


def run_test(trained, scenes_root, *arguments):
    return run_tool(
        'tools/test.py',
        DEMO,
        trained / 'iter_2.pth',
        '--work-dir',
        trained / 'test',
        *arguments,
        '--cfg-options',
        *roots(scenes_root),
    )


def last_line(done):
    assert done.returncode != 0
    return done.stdout.strip().splitlines()[-1]


def test_out_and_show_dir(trained, scenes_root, tmp_path):
    out = tmp_path / 'predictions.pkl'
    done = run_test(
        trained, scenes_root, '--out', out, '--show-dir', tmp_path / 'show'
    )
    assert done.returncode == 0, done.stdout
    assert 'per class results' in done.stdout and 'background' in done.stdout

    predictions = mmengine.load(out)
    assert len(predictions) == 4
    for sample in predictions:
        labels = sample['pred_sem_seg']['data'].squeeze()
        assert labels.shape == (128, 128)
        assert 0 <= labels.min() and labels.max() <= 10
        assert 'seg_logits' not in sample
        annotation = sample['img_path'].replace('images', 'annotations')
        truth = cv2.imread(annotation, cv2.IMREAD_UNCHANGED)
        assert (sample['gt_sem_seg']['data'].squeeze().numpy() == truth).all()
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 4

    sheet = tmp_path / 'sheet.png'
    done = run_tool(
        'tools/analysis_tools/report_segmentation.py', DEMO, out, sheet
    )
    assert done.returncode == 0, done.stdout
    image = cv2.imread(str(sheet))
    assert image.shape[1] > 600 and len(np.unique(image)) > 50


def test_metrics_and_test_time_augmentation(trained, scenes_root, tmp_path):
    out = tmp_path / 'metrics.json'
    done = run_test(trained, scenes_root, '--out', out, '--tta')
    assert done.returncode == 0, done.stdout
    metrics = mmengine.load(out)
    assert set(metrics) >= {'aAcc', 'mIoU', 'mAcc'}
    assert 0 <= metrics['mIoU'] <= 100


def test_sheet_of_no_predictions(tmp_path):
    done = run_tool(
        'tools/analysis_tools/report_segmentation.py',
        DEMO,
        tmp_path / 'none.pkl',
        tmp_path / 'sheet.png',
    )
    assert last_line(done) == f'error: no such file: {tmp_path / "none.pkl"}'


def test_pretrained_file_is_absent(scenes_root, tmp_path):
    path = tmp_path / 'none.pth'
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *roots(scenes_root),
        f'model.backbone.init_cfg.checkpoint={path}',
    )
    assert last_line(done) == (
        f'error: no such pretrained checkpoint: {path}; download it, or '
        'start from random weights with --cfg-options '
        'model.backbone.init_cfg=None'
    )


def test_pretrained_backbone_of_another_architecture(
    scenes_root, trained, tmp_path
):
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *STEPS,
        *roots(scenes_root),
        f'model.backbone.init_cfg.checkpoint={trained / "iter_2.pth"}',
        'model.backbone.arch.depths=[1,1,3,1]',
    )
    assert 'does not match the architecture of the model: 20 of' in last_line(
        done
    ), done.stdout
    assert 'block3.2.norm1.weight is missing' in last_line(done)


def test_checkpoint_of_another_architecture(scenes_root, trained, tmp_path):
    checkpoint = torch.load(trained / 'iter_2.pth', map_location='cpu')
    key = 'backbone.patch_embed1.proj.weight'
    checkpoint['state_dict'][key] = torch.zeros(96, 3, 7, 7)
    torch.save(checkpoint, tmp_path / 'other.pth')
    done = run_tool(
        'tools/test.py',
        DEMO,
        tmp_path / 'other.pth',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *roots(scenes_root),
    )
    line = last_line(done)
    assert line.startswith(
        f'error: the checkpoint {tmp_path / "other.pth"} '
        'does not match the architecture'
    )
    assert line.endswith(
        f'{key} has shape (96, 3, 7, 7), the model requires (32, 3, 7, 7)'
    )


def test_annotations_are_absent(tmp_path):
    root = tmp_path / 'ade'
    for split in ('training', 'validation'):
        (root / 'images' / split).mkdir(parents=True)
        (root / 'images' / split / 'a.jpg').touch()
    done = run_tool(
        'tools/train.py',
        ADE,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        NO_PRETRAINED,
        *roots(root),
    )
    assert done.stdout.splitlines()[-2:] == [
        f'error: {loader}_dataloader (ADE20KDataset): the data folder does '
        f'not exist: {root / "annotations" / split}'
        for loader, split in (('train', 'training'), ('val', 'validation'))
    ]


@pytest.fixture
def bad_scenes(scenes_root, tmp_path):
    """Scenes with an invalid label value."""
    root = tmp_path / 'scenes'
    shutil.copytree(scenes_root, root)
    for path in (root / 'annotations').rglob('*.png'):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        labels[0, 0] = 77
        cv2.imwrite(str(path), labels)
    return root


def test_label_value_outside_the_classes(bad_scenes, tmp_path):
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        NO_PRETRAINED,
        *STEPS,
        *roots(bad_scenes),
    )
    lines = done.stdout.splitlines()[-2:]
    for line, loader, split in zip(
        lines, ('train', 'val'), ('training', 'validation')
    ):
        assert line.startswith(
            f'error: {loader}_dataloader (DigitScenes): '
            f'{bad_scenes / "annotations" / split / "0000"}'
        )
        assert (
            'has label values [77] that are out of range: allowed are 0 to 10 '
            'and 255 (ignored)' in line
        )
    assert 'Traceback' not in done.stdout


def test_label_value_outside_the_classes_with_tta(bad_scenes, trained):
    done = run_test(trained, bad_scenes, '--tta')
    assert 'label values [77] that are out of range' in last_line(done)
    assert 'Traceback' not in done.stdout


def test_one_annotation_is_absent(scenes_root, tmp_path):
    root = tmp_path / 'scenes'
    shutil.copytree(scenes_root, root)
    gone = root / 'annotations' / 'training' / '00002.png'
    gone.unlink()
    done = run_tool(
        'tools/train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        NO_PRETRAINED,
        *STEPS,
        *roots(root),
    )
    assert last_line(done) == (
        'error: train_dataloader (DigitScenes): the annotation file does not '
        f'exist: {gone}'
    )
    assert 'Traceback' not in done.stdout
