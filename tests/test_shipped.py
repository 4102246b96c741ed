"""Tests of the names of the configs of the package."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmvvt import shipped
from mmvvt.cli import load_config
from mmvvt.errors import MissingFileError
from mmvvt.preflight import read_config

from conftest import ROOT

TINY = 'classification/vvt-tiny_8xb128_in1k.py'


def test_names_are_unique():
    """A name of a config identifies its file."""
    configs = [
        path
        for path in (ROOT / 'configs').rglob('*.py')
        if '_base_' not in path.parts
    ]
    found = shipped.shipped_configs()
    assert len(found) == len(configs)
    for path in configs:
        assert found[path.stem].samefile(path)


@pytest.mark.parametrize('name', [Path(TINY).stem, f'mmvvt::{TINY}'])
def test_the_same_config_by_path_and_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = Config.fromfile(ROOT / 'configs' / TINY)
    assert read_config(name).to_dict() == expected.to_dict()


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('vvt-nano_digits').write_text('text')
    assert shipped.find_config('vvt-nano_digits') == 'vvt-nano_digits'
    # A folder, such as a work directory, is no config.
    Path('vvt-nano_fpn_digit-scenes').mkdir()
    found = shipped.find_config('vvt-nano_fpn_digit-scenes')
    assert Path(found).is_file()


@pytest.mark.parametrize(
    'name,similar',
    [
        ('vvt-nano_digit', 'vvt-nano_digits'),
        ('configs/demo/vvt-nano-digits.py', 'vvt-nano_digits'),
        ('mmvvt::vvt-small_8xb128_in1k.py', 'vvt-small_8xb128_in1k'),
        ('mmvvt::segmentation/vvt-tiny_8xb128_in1k', 'vvt-tiny_8xb128_in1k'),
        # base configs and configs of other packages have no names
        ('vvt_classifier', None),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', None),
        ('mmvvt::', None),
        ('', None),
    ],
)
def test_unknown_names(name, similar):
    with pytest.raises(MissingFileError) as caught:
        read_config(name)
    message = str(caught.value)
    assert message.startswith(f'no such config file: {name}')
    assert ('; similar names: ' in message) == (similar is not None)
    assert similar is None or similar in message.split(': ')[-1].split(', ')


BASES = {
    'mmpretrain': 'demo/vvt-nano_digits.py',
    'mmseg': 'demo/vvt-nano_fpn_digit-scenes.py',
    'mmdet': 'demo/retinanet_vvt-nano_digit-scenes.py',
}


@pytest.mark.parametrize('scope', BASES)
def test_base_config(scope, tmp_path):
    """A config with a base of the package equals that base.

    In particular, mmengine adds no ``_scope_``, which functions such as
    ``default_collate`` would be given as an argument.
    """
    child = tmp_path / 'child.py'
    child.write_text(
        f"_base_ = ['mmvvt::{BASES[scope]}']\n"
        'hooks = _base_.default_hooks\n'
        'loader = _base_.train_dataloader\n'
        'train_cfg = dict(val_interval=5)\n'
    )
    cfg = Config.fromfile(child).to_dict()
    base = Config.fromfile(ROOT / 'configs' / BASES[scope]).to_dict()
    assert cfg.pop('hooks') == base['default_hooks']
    assert cfg.pop('loader') == base['train_dataloader']
    assert cfg['train_cfg'].pop('val_interval') == 5
    base['train_cfg'].pop('val_interval')
    assert cfg == base


def test_bases_of_other_packages_keep_their_scope(tmp_path):
    pytest.importorskip('mmpretrain')
    child = tmp_path / 'child.py'
    child.write_text("_base_ = 'mmpretrain::_base_/models/resnet18.py'")
    assert Config.fromfile(child).model._scope_ == 'mmpretrain'


def test_unknown_base(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = 'mmvvt::demo/vvt-nano_digit.py'")
    with pytest.raises(MissingFileError, match='similar names: vvt-nano_dig'):
        read_config(str(child))


def test_the_hub_of_mmengine(tmp_path, monkeypatch):
    """``get_config`` reads ``.mim``, see also tests/test_wheel.py."""
    package = tmp_path / 'mmvvt'
    (package / '.mim').mkdir(parents=True)
    for name in ('configs', 'model-index.yml'):
        (package / '.mim' / name).symlink_to(ROOT / name)
    monkeypatch.setattr(
        'mmengine.hub.hub.get_installed_path', lambda name: str(package)
    )
    cfg = get_config(f'mmvvt::{TINY}')
    assert cfg.to_dict() == Config.fromfile(ROOT / 'configs' / TINY).to_dict()


def test_a_package_without_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, '__file__', str(tmp_path / 'a' / 'b.py'))
    with pytest.raises(MissingFileError, match='has no configs and tools'):
        shipped.find_config('vvt-nano_digits')


@pytest.mark.parametrize(
    'config', ['vvt-nano_digits', f'mmvvt::{BASES["mmpretrain"]}']
)
def test_work_dir(config):
    """The default work directory has the name of the config."""
    from argparse import Namespace

    arguments = Namespace(
        config=config, cfg_options=None, work_dir=None, launcher='none'
    )
    assert load_config(arguments).work_dir == 'work_dirs/vvt-nano_digits'
