"""Missing data is reported before anything is built."""

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvvt.errors import UserError

from conftest import check_files


def config(**dataset):
    return Config(dict(train_dataloader=dict(dataset=dataset)))


def check(cfg):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        check_files(cfg, ['train_dataloader', 'val_dataloader'])


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.png').touch()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'list.txt').touch()
    return tmp_path


@pytest.mark.parametrize(
    'dataset,message',
    [
        (
            dict(data_root='nowhere'),
            r'train_dataloader \(CustomDataset\): the '
            'data folder does not exist: nowhere$',
        ),
        (dict(data_root='{root}/empty'), 'folder is empty: .*empty'),
        (
            dict(data_root='{root}', data_prefix='labels'),
            'does not exist: .*labels',
        ),
        (
            dict(
                data_root='{root}', data_prefix=dict(img='images', seg='empty')
            ),
            'is empty: .*empty',
        ),
        (
            dict(data_root='{root}', ann_file='val.txt'),
            'annotation file does not exist: .*val.txt',
        ),
    ],
)
def test_what_is_missing_is_named(root, dataset, message, capsys):
    dataset['data_root'] = dataset['data_root'].format(root=root)
    with pytest.raises(UserError, match=message) as caught:
        check(config(type='CustomDataset', **dataset))
    assert '\n' not in str(caught.value)
    wrapped = dict(
        type='RepeatDataset', dataset=dict(type='CustomDataset', **dataset)
    )
    with pytest.raises(UserError, match=message):
        check(config(**wrapped))
    with pytest.raises(UserError, match=message):
        check(config(type='ConcatDataset', datasets=[wrapped]))


def test_paths_without_a_root(root):
    with pytest.raises(UserError, match='does not exist: /no/images'):
        check(config(type='CustomDataset', data_prefix='/no/images'))
    with pytest.raises(UserError, match='does not exist: /no/list.txt'):
        check(config(type='CustomDataset', ann_file='/no/list.txt'))


@pytest.mark.parametrize(
    'dataset',
    [
        dict(
            type='CustomDataset',
            data_root='{root}',
            ann_file=['a', 'b'],
            data_prefix=dict(img=None, seg=['images']),
        ),
        dict(type='CustomDataset', data_root='s3://bucket/data'),
        dict(
            type='CustomDataset',
            data_root='{root}',
            data_prefix='images',
            ann_file='list.txt',
        ),
        dict(type='CIFAR100', data_root='nowhere'),
        dict(type='Digits', data_root='nowhere', split='train'),
    ],
)
def test_what_is_there_or_fetches_itself_passes(root, dataset):
    dataset = dict(dataset)
    dataset['data_root'] = dataset['data_root'].format(root=root)
    check(config(**dataset))


def test_a_data_set_told_not_to_fetch_is_checked():
    with pytest.raises(UserError, match='does not exist: nowhere'):
        check(config(type='CIFAR100', data_root='nowhere', download=False))
