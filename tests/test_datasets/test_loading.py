"""Files that cannot be loaded are named, or skipped and counted."""

import json
import os
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmvvt.datasets import CheckLabels, GuardedPipeline
from mmvvt.datasets.loading import MAX_SKIPPED
from mmvvt.engine import SkippedFilesHook
from mmvvt.errors import LabelError, UnreadableFileError
from mmvvt.preflight import guard_pipelines

from conftest import ROOT, run_tool

DAMAGES = {
    'empty': (lambda path: path.write_bytes(b''), 'the file is empty'),
    'missing': (lambda path: path.unlink(), 'No such file or directory'),
    'text': (lambda path: path.write_text('no image'), 'Error'),
    'folder': (
        lambda path: (path.unlink(), path.mkdir()),
        'Is a directory',
    ),
    'truncated': (
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        'Error',
    ),
}


@pytest.fixture
def files(tmp_path):
    """Four images with label maps."""
    for kind in ('images', 'labels'):
        (tmp_path / kind / 'a').mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    for number in range(4):
        name = f'a/{number}.png'
        cv2.imwrite(str(tmp_path / 'images' / name), noise)
        cv2.imwrite(str(tmp_path / 'labels' / name), noise[..., 0] % 2)
    return tmp_path


def segmentation(root):
    pytest.importorskip('mmseg')
    return 'mmseg', dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        data_prefix=dict(img_path='images/a', seg_map_path='labels/a'),
        metainfo=dict(classes=('a', 'b')),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )


def classification(root):
    return 'mmpretrain', dict(
        type='CustomDataset',
        data_root=str(root),
        data_prefix='images',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )


def load_all(scope, dataset, workers=0, wrapped=False, **options):
    """Load all samples of a guarded dataset; returns their number."""
    if wrapped:
        dataset = dict(type='RepeatDataset', times=1, dataset=dataset)
    cfg = Config(
        dict(
            train_dataloader=dict(
                batch_size=1,
                num_workers=workers,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dataset,
            )
        )
    )
    guard_pipelines(cfg, ['train_dataloader', 'val_dataloader'], **options)
    guard_pipelines(cfg, ['train_dataloader'], **options)  # no second time
    with DefaultScope.overwrite_default_scope(scope):
        return len(list(Runner.build_dataloader(cfg.train_dataloader)))


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize(
    'config,kind',
    [
        (classification, 'images'),
        (segmentation, 'images'),
        (segmentation, 'labels'),
    ],
)
@pytest.mark.parametrize('wrapped', [False, True])
def test_the_file_is_named(damage, config, kind, wrapped, files):
    path = files / kind / 'a' / '2.png'
    scope, dataset = config(files)
    if damage in ('missing', 'folder') and kind == 'images':
        # Listed, and removed after that.
        (files / 'list.txt').write_text('a/2.png 0')
        if config is classification:
            dataset['ann_file'] = 'list.txt'
        else:
            (files / 'list.txt').write_text('2')
            dataset['ann_file'] = 'list.txt'
    change, reason = DAMAGES[damage]
    change(path)
    with pytest.raises(UnreadableFileError) as caught:
        load_all(scope, dataset, wrapped=wrapped)
    message = str(caught.value)
    assert message.startswith(f'{path} cannot be loaded: ')
    assert reason in message and '\n' not in message


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('config', [classification, segmentation])
def test_files_are_skipped_and_listed(config, workers, files):
    scope, dataset = config(files)
    bad = {str(files / 'images' / 'a' / '1.png')}
    (files / 'images' / 'a' / '1.png').write_bytes(b'')
    if config is segmentation:
        bad.add(str(files / 'labels' / 'a' / '3.png'))
        (files / 'labels' / 'a' / '3.png').write_bytes(b'no image')
    log = files / 'new' / 'skipped.txt'
    count = load_all(scope, dataset, workers, skip=True, log_file=str(log))
    assert count == 4
    assert set(log.read_text().splitlines()) == bad


def detection(root):
    pytest.importorskip('mmdet')
    objects = [
        dict(
            id=i,
            image_id=i,
            category_id=1,
            bbox=[1, 2, 20, 20],
            area=400,
            segmentation=[[1, 2, 21, 2, 21, 22, 1, 22]],
        )
        for i in range(4)
    ]
    content = dict(
        images=[
            dict(id=i, file_name=f'{i}.png', height=40, width=40)
            for i in range(4)
        ],
        annotations=objects,
        categories=[dict(id=1, name='a')],
    )
    objects[3]['segmentation'] = dict(counts=[1], size=[10, 10])
    (root / 'train.json').write_text(json.dumps(content))
    return 'mmdet', dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='train.json',
        data_prefix=dict(img='images/a'),
        metainfo=dict(classes=('a',)),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    )


def test_files_of_a_detection_dataset(files):
    scope, dataset = detection(files)
    images = files / 'images' / 'a'
    with pytest.raises(UnreadableFileError) as caught:
        load_all(scope, dataset)
    assert str(caught.value).startswith(
        f'the annotations of {images / "3.png"} cannot be loaded: '
    )
    (images / '1.png').write_bytes(b'')
    with pytest.raises(UnreadableFileError) as caught:
        load_all(scope, dataset)
    assert str(caught.value) == (
        f'{images / "1.png"} cannot be loaded: the file is empty'
    )
    log = files / 'skipped.txt'
    assert load_all(scope, dataset, skip=True, log_file=str(log)) == 4
    assert set(log.read_text().splitlines()) == {
        str(images / '1.png'),
        str(images / '3.png'),
    }


def test_pipeline_that_a_hook_switches_to():
    steps = [dict(type='LoadImageFromFile')]
    cfg = Config(
        dict(
            train_dataloader=dict(dataset=dict(type='A', pipeline=steps)),
            custom_hooks=[
                dict(type='PipelineSwitchHook', switch_pipeline=steps),
                dict(type='EMAHook'),
            ],
        )
    )
    guard_pipelines(cfg, ['train_dataloader'], skip=True, log_file='a.txt')
    switched, other = cfg.custom_hooks
    assert switched.switch_pipeline == cfg.train_dataloader.dataset.pipeline
    assert switched.switch_pipeline[0].skip
    assert other == dict(type='EMAHook')


def test_skipping_ends(tmp_path):
    """A run whose files all cannot be loaded does not search for ever."""
    log = tmp_path / 'skipped.txt'
    pipeline = GuardedPipeline(
        [dict(type='mmcv.LoadImageFromFile')], True, str(log)
    )
    path = str(tmp_path / 'b\udcff.png')  # not UTF-8
    for _ in range(MAX_SKIPPED):
        assert pipeline(dict(img_path=path)) is None
    with pytest.raises(UnreadableFileError, match='500 files before it were'):
        pipeline(dict(img_path=path))
    with open(log, encoding='utf-8', errors='surrogateescape') as file:
        assert set(file) == {f'{path}\n'}
    lines = []
    logger = SimpleNamespace(info=lines.append, warning=lines.append)
    for file in (log, tmp_path / 'missing.txt'):
        SkippedFilesHook(str(file)).after_train(SimpleNamespace(logger=logger))
    assert lines[0].startswith('1 files could not be loaded and were skipped')
    assert r'b\xff.png' in lines[0] and lines[0].isprintable()
    assert lines[1] == 'no files were skipped'


def test_a_bug_in_a_transform_keeps_its_type():
    def bug(results):
        raise ZeroDivisionError('a bug')

    pipeline = GuardedPipeline([bug], skip=True)
    with pytest.raises(ZeroDivisionError, match='a bug') as caught:
        pipeline.transform(dict(img_path='a.png'))
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ['The image is a.png']
    assert GuardedPipeline([lambda r: None]).transform({}) is None


def test_shape_of_label_maps():
    check = CheckLabels(num_classes=3)
    labels = np.zeros((4, 6), np.uint8)
    for shapes in (
        dict(img_shape=(4, 6)),
        dict(img_shape=(8, 12, 3), ori_shape=(4, 6, 3)),
        {},
    ):
        check(dict(gt_seg_map=labels, seg_map_path='a.png', **shapes))
    for wrong in (np.zeros((4, 6, 3), np.uint8), labels.T):
        with pytest.raises(LabelError, match='a.png: the label map has sh'):
            check(
                dict(gt_seg_map=wrong, seg_map_path='a.png', img_shape=(4, 6))
            )


CONFIG = """
_base_ = '{demo}'
train_cfg = dict(max_epochs=2, val_interval=10)
default_hooks = dict(checkpoint=dict(interval=10, save_last=False))
train_dataloader = dict(
    batch_size=2, num_workers=1, drop_last=False, dataset=dict(
        _delete_=True, type='CustomDataset', data_root={root!r},
        data_prefix='images', pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(32, 32)),
            dict(type='PackInputs')]))
val_dataloader = None
val_evaluator = None
val_cfg = None
model = dict(head=dict(num_classes=1), train_cfg=None)
data_preprocessor = dict(num_classes=1)
"""


def test_train_tool(files):
    demo = ROOT / 'configs' / 'demo' / 'vvt-nano_digits.py'
    config = files / 'config.py'
    config.write_text(CONFIG.format(demo=demo, root=str(files)))
    bad = files / 'images' / 'a' / '3.png'
    bad.write_bytes(b'')
    arguments = ['tools/train.py', config, '--work-dir', files / 'work']
    done = run_tool(*arguments)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        f'error: {bad} cannot be loaded: the file is empty'
    )
    done = run_tool(*arguments, '--skip-unreadable')
    assert done.returncode == 0, done.stdout[-2000:]
    listed = files / 'work' / 'skipped_files.txt'
    assert (
        '1 files could not be loaded and were skipped, such as '
        f'{bad}; all are listed in {listed}' in done.stdout
    )
    assert os.path.getsize(listed) > 0
