"""Files that cannot be loaded are named, or skipped and counted."""

import os

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmvvt.datasets import CheckLabels, GuardedPipeline
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


def test_a_bug_in_a_transform_keeps_its_type(files):
    def bug(results):
        raise ZeroDivisionError('a bug')

    pipeline = GuardedPipeline([bug], skip=True)
    with pytest.raises(ZeroDivisionError, match='a bug'):
        pipeline.transform(dict(img_path='a.png'))
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
