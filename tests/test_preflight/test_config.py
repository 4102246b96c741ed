"""Names of classes and modules in configs."""

import importlib
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvvt.datasets import Digits
from mmvvt.errors import UserError
from mmvvt.preflight import (
    class_names,
    guard_pipelines,
    read_config,
    type_name,
)
from mmvvt.preflight.config import innermost_datasets, pipeline_steps


@pytest.mark.parametrize(
    'config,expected',
    [
        (dict(type='CocoMetric'), 'CocoMetric'),
        (dict(type='mmdet.CocoMetric'), 'CocoMetric'),
        (dict(type=Digits), 'Digits'),
        (dict(), ''),
        (None, ''),
    ],
)
def test_type_name(config, expected):
    assert type_name(config) == expected


def names(dataset, meta=None, scope='mmpretrain'):
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    with DefaultScope.overwrite_default_scope(scope):
        found = class_names(cfg, meta)
    return found['classes'], found['palette']


def test_names_of_the_checkpoint_come_first():
    own = dict(type='Digits', metainfo=dict(classes=('a', 'b')))
    meta = dict(dataset_meta=dict(CLASSES=('x', 'y'), PALETTE=[[1, 2, 3]]))
    assert names(own, meta) == (['x', 'y'], [(1, 2, 3)])
    for empty in (None, {}, dict(dataset_meta=None), dict(dataset_meta={})):
        assert names(own, empty) == (['a', 'b'], [])


def test_names_of_the_config_come_before_those_of_the_class(tmp_path):
    file = tmp_path / 'classes.txt'
    file.write_text('a\nb\n')
    for own in (
        dict(metainfo=dict(classes=['a', 'b'])),
        dict(metainfo=dict(CLASSES=['a', 'b'])),
        dict(metainfo=dict(classes=str(file))),
        dict(classes=['a', 'b']),
    ):
        dataset = dict(type='Digits', **own)
        wrapped = dict(type='RepeatDataset', dataset=dataset)
        assert names(dataset)[0] == names(wrapped)[0] == ['a', 'b']
    assert names(dict(type='Digits'))[0] == list('0123456789')
    assert names(dict(type=Digits))[0] == list('0123456789')
    assert names(dict(type='NoSuchDataset')) == ([], [])


def test_palette_of_the_class_is_not_used_for_other_classes():
    pytest.importorskip('mmdet')
    own = dict(type='CocoDataset', metainfo=dict(classes=('cup',)))
    assert names(own, scope='mmdet') == (['cup'], [])
    classes, palette = names(dict(type='CocoDataset'), scope='mmdet')
    assert classes[0] == 'person' and len(palette) == 80


def test_guarded_pipelines():
    def loader(**dataset):
        return dict(dataset=dict(type='Digits', **dataset))

    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(
                    type='ConcatDataset',
                    datasets=[
                        dict(type='Digits', pipeline=[dict(type='A')]),
                        dict(type='Digits'),
                    ],
                )
            ),
            val_dataloader=loader(pipeline=[dict(type='B')]),
            test_dataloader=None,
        )
    )
    loaders = ['train_dataloader', 'val_dataloader', 'test_dataloader']
    guard_pipelines(cfg, loaders, skip=True, log_file='log.txt')
    first, second = innermost_datasets(cfg.train_dataloader.dataset)
    assert first.pipeline == [
        dict(
            type='GuardedPipeline',
            transforms=[dict(type='A')],
            skip=True,
            log_file='log.txt',
        )
    ]
    assert 'pipeline' not in second
    (guard,) = cfg.val_dataloader.dataset.pipeline
    assert guard == dict(type='GuardedPipeline', transforms=[dict(type='B')])
    steps = [type_name(step) for step in pipeline_steps(first)]
    assert steps == ['GuardedPipeline', 'A']


def test_steps_of_test_time_augmentation():
    tta = dict(
        type='TestTimeAug',
        transforms=[[dict(type='A'), dict(type='B')], [dict(type='C')]],
    )
    dataset = dict(pipeline=[dict(type='Load'), tta, dict(type='Pack')])
    assert [type_name(step) for step in pipeline_steps(dataset)] == [
        'Load',
        'TestTimeAug',
        'A',
        'B',
        'C',
        'Pack',
    ]


def test_a_config_object_is_not_modified():
    cfg = Config(dict(default_scope='mmpretrain', a=1))
    assert read_config(cfg, dict(a=2)).a == 2
    assert cfg.a == 1


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg', 'mmdet'])
@pytest.mark.parametrize(
    'package,version,install',
    [('mmcv', '2.9.0', 'mmcv==2.1.0'), ('mmengine', '1.1.0', 'mmengine==0.')],
)
def test_unsupported_versions(
    scope, package, version, install, tmp_path, monkeypatch
):
    """The version checks of OpenMMLab's packages are assertions."""
    pytest.importorskip(scope)
    path = tmp_path / 'config.py'
    path.write_text(f'default_scope = {scope!r}')
    monkeypatch.delitem(sys.modules, scope)  # it is imported again
    module = importlib.import_module(package)
    monkeypatch.setattr(module, '__version__', version)
    with pytest.raises(UserError) as caught:
        read_config(str(path))
    assert str(caught.value).startswith(
        f'{path} needs {scope}, which does not support {package} {version}: '
        f'install {install}'
    )


def test_other_assertions_keep_their_traceback(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('assert 1 > 2, "a mistake in the config"')
    with pytest.raises(AssertionError, match='a mistake in the config'):
        read_config(str(path))
