"""The command line of tools/export.py."""

import os
import sys

import pytest

from mmvvt.deploy.formats import FORMATS

from conftest import ROOT, run_tool

sys.path.append(str(ROOT / 'tests' / 'test_deploy'))
from export_cases import (  # noqa: E402
    CONFIGS,
    SHORT,
    save_random,
    small_config,
)

CONFIG = CONFIGS['classifier']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A config file with a small model and its checkpoint."""
    folder = tmp_path_factory.mktemp('export')
    cfg = small_config('classifier', **SHORT)
    cfg.dump(str(folder / 'small.py'))
    return folder / 'small.py', save_random(cfg, folder / 'random.pth')


def export(files, *arguments):
    return run_tool('tools/export.py', *files, *arguments)


def test_writes_a_checked_file(files, tmp_path):
    out = tmp_path / 'model.pt'
    done = export(
        files, '--format', 'torchscript', '--out', out, '--with-preprocessing'
    )
    assert done.returncode == 0, done.stdout
    assert 'worst relative error against PyTorch' in done.stdout
    metadata = FORMATS['torchscript'].read_metadata(str(out))
    assert metadata['config'] == 'small.py'


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['--format', 'trt', '--out', 'm.onnx'], 'format must be one of onnx'),
        (['--out', 'm.pt'], 'must have a name that ends with .onnx, got m.pt'),
        (['--out', 'no/m.onnx'], 'no does not exist'),
        (['--out', 'm.onnx', '--fixed-size', '224'], 'must be HxW, such as'),
        (['--out', 'm.onnx', '--fixed-size', '31x64'], 'least 32, got (31'),
    ],
)
def test_errors_are_one_line(files, arguments, message):
    done = export(files, *arguments)
    assert done.returncode == 1
    assert done.stdout.startswith('error: ') and message in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert not os.path.exists(ROOT / 'm.onnx')


def test_checkpoint_of_another_model(files, tmp_path):
    """The demo config has a larger network than the checkpoint."""
    done = export((CONFIG, files[1]), '--out', tmp_path / 'model.onnx')
    assert done.returncode == 1
    assert 'random.pth' in done.stdout.strip().splitlines()[-1]
    assert 'Traceback' not in done.stdout
    assert os.listdir(tmp_path) == []
