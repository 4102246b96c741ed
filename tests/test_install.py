"""Tests of requirements/install.py: which environments are reused."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install script as a module, in a copy of the project files."""
    (tmp_path / 'requirements').mkdir()
    for name in (
        'requirements/install.py',
        'requirements.txt',
        'requirements/classification.txt',
        'requirements/docs.txt',
        'setup.py',
        'setup.cfg',
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location(
        'install', tmp_path / 'requirements' / 'install.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # an environment without packages, and checks that succeed in it
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    module.PYTHON = Path(sys.executable)
    module.CHECKS = {
        'demo': 'import json',
        'full': 'import json, csv',
        'docs': 'import html',
    }
    return module


def stamp(module, kind):
    module.STAMP.write_text(
        json.dumps({'fingerprint': module.fingerprint(kind)})
    )


@pytest.mark.parametrize('kind', ['demo', 'full', 'docs'])
def test_a_finished_environment_is_reused(install, kind):
    stamp(install, kind)
    assert install.installed_kind() == kind


def test_an_unfinished_one_is_not(install):
    assert install.installed_kind() is None
    install.STAMP.write_text('{"finger')
    assert install.installed_kind() is None


def test_a_broken_one_is_not(install):
    stamp(install, 'demo')
    install.CHECKS['demo'] = 'import a_package_that_somebody_removed'
    assert install.installed_kind() is None
    install.CHECKS['demo'] = 'import json'
    install.PYTHON = Path('/no/such/python')
    assert install.installed_kind() is None


@pytest.mark.parametrize(
    'name',
    [
        'requirements.txt',
        'requirements/classification.txt',
        'requirements/docs.txt',
        'setup.py',
        'setup.cfg',
    ],
)
def test_changed_requirements_make_a_new_one(install, name):
    stamp(install, 'demo')
    with open(install.ROOT / name, 'a') as file:
        file.write('# changed\n')
    assert install.installed_kind() is None


def run_main(install, monkeypatch, kind):
    """Return the steps of ``main`` without running them."""
    steps = []
    monkeypatch.setattr(sys, 'argv', ['install.py', kind])
    monkeypatch.setattr(
        install,
        'run',
        lambda title, command, extra_env=None: steps.append(' '.join(command)),
    )
    monkeypatch.setattr(
        install, 'install_mmcv_with_ops', lambda: steps.append('mmcv with ops')
    )
    install.main()
    return steps


def test_what_is_there_is_not_touched(install, monkeypatch):
    stamp(install, 'full')
    assert run_main(install, monkeypatch, 'full') == []
    # The full environment can also be used for the demo.
    assert run_main(install, monkeypatch, 'demo') == []


def test_demo_grows_into_full(install, monkeypatch):
    stamp(install, 'demo')
    marker = install.VENV / 'marker'
    marker.touch()
    steps = run_main(install, monkeypatch, 'full')
    assert marker.exists()  # The environment was reused.
    assert 'mmcv with ops' in steps
    assert not any('mmcv-lite' in step for step in steps)
    assert install.installed_kind() == 'full'


def test_docs_need_no_torch(install, monkeypatch):
    stamp(install, 'docs')
    assert run_main(install, monkeypatch, 'docs') == []
    # The full environment can also build the site.
    stamp(install, 'full')
    assert run_main(install, monkeypatch, 'docs') == []
    stamp(install, 'demo')
    steps = run_main(install, monkeypatch, 'docs')
    assert len(steps) == 1 and 'requirements/docs.txt' in steps[0]
    assert install.installed_kind() == 'docs'


def test_broken_is_removed_and_made_anew(install, monkeypatch):
    marker = install.VENV / 'marker'
    marker.touch()

    def make(title, command, extra_env=None):
        if 'venv' in command:
            (install.VENV / 'bin').mkdir(parents=True)

    monkeypatch.setattr(sys, 'argv', ['install.py', 'demo'])
    monkeypatch.setattr(install, 'run', make)
    install.main()
    assert not marker.exists()
    assert install.installed_kind() == 'demo'


def test_wheels_are_kept_by_version_outside_the_clone(
    install, monkeypatch, tmp_path
):
    import torch

    monkeypatch.setenv('MMVVT_WHEELS', str(tmp_path / 'wheels'))
    folder = install.wheel_folder()
    version = f'py{sys.version_info[0]}{sys.version_info[1]}'
    assert folder.parent == tmp_path / 'wheels'
    assert folder.name.startswith(f'{version}-torch{torch.__version__}-')
    assert folder.name.endswith('-mmcv2.1.0')
    monkeypatch.delenv('MMVVT_WHEELS')
    assert install.ROOT not in install.wheel_folder().parents


def test_a_wheel_that_does_not_load_is_built_anew(
    install, monkeypatch, tmp_path
):
    folder = tmp_path / 'wheels'
    folder.mkdir()
    (folder / 'mmcv-2.1.0-old.whl').touch()
    built = []

    def build(where):
        built.append(where)
        where.mkdir()
        (where / 'mmcv-2.1.0-new.whl').touch()

    monkeypatch.setattr(install, 'wheel_folder', lambda: folder)
    monkeypatch.setattr(install, 'build_mmcv', build)
    monkeypatch.setattr(install, 'run', lambda *a, **k: None)
    monkeypatch.setattr(
        install, 'output_of', lambda code: 'ok' if built else None
    )
    install.install_mmcv_with_ops()
    assert built == [folder]
    # An error is raised if the new wheel does not load either.
    monkeypatch.setattr(install, 'output_of', lambda code: None)
    with pytest.raises(SystemExit, match='do not load'):
        install.install_mmcv_with_ops()


def test_an_environment_of_another_clone_is_not(install):
    # mmvvt is not installed from this copy of the project.
    install.CHECKS['demo'] = install.CHECK_CLONE
    stamp(install, 'demo')
    assert install.installed_kind() is None


def test_a_failing_step_stops_with_its_output(install, capfd):
    with pytest.raises(SystemExit, match='this step failed: trying'):
        install.run(
            'trying',
            [sys.executable, '-c', 'print("the reason"); raise SystemExit(3)'],
        )
    assert 'the reason' in capfd.readouterr().err


def test_signs_of_life(install, monkeypatch, capfd):
    monkeypatch.setattr(install, 'HEARTBEAT', 0.3)
    install.run(
        'long step',
        [
            sys.executable,
            '-uc',
            'import time; print("[54/77] c++ x.cpp"); time.sleep(1.5)',
        ],
    )
    out = capfd.readouterr().out
    assert 'long step' in out and '... [54/77]\n' in out


def test_needs_a_kind():
    done = subprocess.run(
        [sys.executable, str(ROOT / 'requirements' / 'install.py'), 'all'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "'demo', 'full', 'docs'" in done.stderr
