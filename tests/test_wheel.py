"""What a wheel, a source distribution and a develop install contain.

Each is installed in an environment of its own, which also finds the packages
of the environment of the tests, but not this clone.
"""

import ast
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT

SOURCES = (
    *('mmvvt', 'configs', 'tools', 'model-index.yml', 'README.md', 'LICENSE'),
    *('setup.py', 'setup.cfg', 'pyproject.toml'),
)
OFFLINE = ('--no-index', '--no-deps', '--no-build-isolation', '--no-cache-dir')
INSTALL = ('install', *OFFLINE, '--ignore-installed', '--no-compile')
MIM_FILES = {
    path.relative_to(ROOT).as_posix()
    for name in ('configs', 'tools')
    for path in (ROOT / name).rglob('*')
    if path.suffix in ('.py', '.sh', '.yml', '.md')
} | {'model-index.yml'}


def execute(python, *arguments, cwd, code=0, timeout=300):
    """Run Python without the clone in its path, and return its output."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env={**env, 'PIP_DISABLE_PIP_VERSION_CHECK': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def copy_sources(folder):
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns('__pycache__', '.mim')
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def make_environment(folder):
    """Create an environment, and return the path of its Python."""
    execute(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=ROOT)
    python = next(folder.glob('bin/python')).absolute()
    (packages,) = folder.glob('lib/*/site-packages')
    # Packages in these folders are found. Their .pth files are not read, one
    # of which makes this clone importable.
    others = [path for path in sys.path if path.endswith('-packages')]
    (packages / 'others.pth').write_text('\n'.join(others))
    return python


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    """Wheels built from the sources and from a source distribution."""
    folder = tmp_path_factory.mktemp('dist')
    sources = copy_sources(folder / 'sources')
    build = (sys.executable, '-m', 'pip', 'wheel', *OFFLINE, '-w')
    execute(*build, folder / 'direct', sources, cwd=folder)
    # What the build left behind must not get into the next one.
    (folder / 'sources/configs/demo/vvt-nano_digits.py').rename(
        folder / 'sources/configs/demo/renamed.py'
    )
    execute(*build, folder / 'renamed', sources, cwd=folder)

    sources = copy_sources(folder / 'clean')
    backend = 'from setuptools import build_meta as b; b.build_sdist("sdist")'
    execute(sys.executable, '-c', backend, cwd=sources)
    (sdist,) = sources.glob('sdist/*.tar.gz')
    execute(*build, folder / 'from_sdist', sdist, cwd=folder)
    return {
        name: next((folder / name).glob('mmvvt-*.whl'))
        for name in ('direct', 'renamed', 'from_sdist')
    }


@pytest.fixture(scope='module')
def python(wheels, tmp_path_factory):
    """Python of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp('environment')
    python = make_environment(folder)
    execute(python, '-m', 'pip', *INSTALL, wheels['direct'], cwd=folder)
    code = 'import mmvvt; print(mmvvt.__file__)'
    found = execute(python, '-c', code, cwd=folder).splitlines()[-1]
    assert found.startswith(str(folder)), found
    return python


def mim_files(wheel):
    prefix = 'mmvvt/.mim/'
    with zipfile.ZipFile(wheel) as file:
        return {
            name[len(prefix) :]: file.read(name)
            for name in file.namelist()
            if name.startswith(prefix)
        }


def test_the_wheel_is_whole(wheels):
    files = mim_files(wheels['direct'])
    assert set(files) == MIM_FILES
    for name, content in files.items():
        assert content == (ROOT / name).read_bytes(), name
    with zipfile.ZipFile(wheels['direct']) as file:
        modules = set(file.namelist())
        script = file.getinfo('mmvvt/.mim/tools/dist_train.sh')
    assert {
        path.relative_to(ROOT).as_posix()
        for suffix in ('py', 'cpp', 'h')
        for path in (ROOT / 'mmvvt').rglob(f'*.{suffix}')
    } <= modules
    assert script.external_attr >> 16 & 0o100  # executable


def test_the_same_wheel_from_a_source_distribution(wheels):
    contents = []
    for name in ('direct', 'from_sdist'):
        with zipfile.ZipFile(wheels[name]) as file:
            contents.append({n: file.read(n) for n in file.namelist()})
    assert contents[0] == contents[1]


def test_removed_configs_are_not_in_the_next_wheel(wheels):
    files = set(mim_files(wheels['renamed']))
    assert files ^ MIM_FILES == {
        'configs/demo/vvt-nano_digits.py',
        'configs/demo/renamed.py',
    }


BUILD_EVERYTHING = """
import torch
from mmengine.hub import get_config
from mmvvt.preflight import build_model, read_config

for name in NAMES:
    cfg = read_config(name)
    with torch.device('meta'):
        model = build_model(cfg)
    print('built', name, sum(p.numel() for p in model.parameters()))
for path in ('classification/vvt-tiny_8xb128_in1k', 'demo/vvt-nano_digits'):
    print('found', get_config(f'mmvvt::{path}.py').filename)
"""


def test_every_model_is_listed_and_built(python, tmp_path):
    listed = execute(python, '-m', 'mmvvt', 'list', cwd=tmp_path)
    names = sorted(
        path.stem
        for path in (ROOT / 'configs').rglob('*.py')
        # Templates for the data of users are no models.
        if not {'_base_', 'finetune'} & set(path.parts)
    )
    assert listed.splitlines()[-len(names) :] == names
    code = f'NAMES = {names}{BUILD_EVERYTHING}'
    lines = execute(python, '-c', code, cwd=tmp_path).splitlines()
    built = [line.split()[1] for line in lines if line.startswith('built ')]
    assert built == names
    assert 'built vvt-tiny_8xb128_in1k 12882440' in lines
    found = [line.split()[1] for line in lines if line.startswith('found ')]
    (configs,) = python.parents[1].glob('lib/*/*/mmvvt/.mim/configs')
    assert found == [
        f'{configs}/classification/vvt-tiny_8xb128_in1k.py',
        f'{configs}/demo/vvt-nano_digits.py',
    ]


def test_the_digits_demo_in_an_empty_folder(python, tmp_path):
    mmvvt = (python, '-m', 'mmvvt')
    epochs = ('--cfg-options', 'train_cfg.max_epochs=2')
    config = 'mmvvt::demo/vvt-nano_digits.py'
    execute(*mmvvt, 'train', config, *epochs, cwd=tmp_path)
    work = tmp_path / 'work_dirs' / 'vvt-nano_digits'
    weights = work / 'epoch_2.pth'
    assert weights.is_file()
    execute(
        *(*mmvvt, 'test', 'vvt-nano_digits', weights),
        *('--out', 'metrics.json', '--work-dir', work),
        cwd=tmp_path,
    )
    metrics = ast.literal_eval((tmp_path / 'metrics.json').read_text())
    assert metrics['accuracy/top1'] > 80  # 10 with random weights


def test_a_develop_install_follows_the_sources(tmp_path):
    sources = copy_sources(tmp_path / 'sources')
    python = make_environment(tmp_path / 'environment')
    # Files of an older version are replaced.
    (sources / 'mmvvt' / '.mim' / 'configs').mkdir(parents=True)
    for _ in range(2):  # installing again works
        execute(python, '-m', 'pip', *INSTALL, '-e', sources, cwd=tmp_path)

    (sources / 'configs' / 'demo' / 'new.py').write_text('value = 7')
    (sources / 'configs' / 'demo' / 'vvt_nano_digits.py').unlink()
    metafile = sources / 'configs' / 'classification' / 'metafile.yml'
    text = metafile.read_text().replace('Name: vvt-tiny', 'Name: new-tiny')
    metafile.write_text(text)
    tool = sources / 'tools' / 'list_models.py'
    tool.write_text(tool.read_text().replace('print(*', 'print("edited", *'))
    (tmp_path / 'child.py').write_text("_base_ = 'mmvvt::demo/new.py'")
    code = """
import sys
from mmengine.config import Config
from mmengine.hub import get_config
from mmvvt.__main__ import main
from mmvvt.shipped import shipped_configs

sys.argv[1:] = ['list']
main()
print(Config.fromfile('child.py').value,
      get_config('mmvvt::demo/new.py').value,
      get_config('mmvvt::demo/new.py').filename)
print('removed:', 'vvt_nano_digits' not in shipped_configs())
"""
    lines = execute(python, '-c', code, cwd=tmp_path).splitlines()
    assert f'7 7 {sources}/mmvvt/.mim/configs/demo/new.py' in lines
    listed = ' '.join(lines).partition('edited ')[2].split()
    assert 'new-tiny_8xb128_in1k' in listed
    assert 'vvt-tiny_8xb128_in1k' not in listed
    assert 'removed: True' in lines
