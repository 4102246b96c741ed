"""Run the fast tests with other versions of Python, PyTorch and OpenMMLab.

Each session has an environment of its own in .nox, with mmcv-lite: building
mmcv's compiled ops takes 6 to 20 minutes for each version of PyTorch. Without
mmseg and mmdet, their tests are skipped. `make compat` runs all sessions, and
skips versions of Python that are not installed. With pyenv, name them first:
`export PYENV_VERSION=3.11:3.10:3.12:3.13`. To run one session:
`.nox/bin/nox --session "torch(2.4.1)"`.
"""

from pathlib import Path

import nox

nox.options.envdir = '.nox/envs'
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
# torchvision by version of PyTorch; the tested set has another one.
TORCHVISION = {'2.4.1': '0.19.1', '2.6.0': '0.21.0', '2.14.1': '0.29.1'}
# mmcv 2.1.0 imports pkg_resources, which setuptools 81 no longer provides.
TOOLS = ['setuptools>=75,<81', 'wheel', 'pytest', 'pytest-xdist']
TESTED = [
    line
    for line in (ROOT / 'requirements' / 'classification.txt')
    .read_text()
    .splitlines()
    if '==' in line
]
PYTORCH = [line for line in TESTED if line.startswith('torch')]
OTHERS = [line for line in TESTED if not line.startswith(('torch', 'mm'))]


def run_tests(session: nox.Session) -> None:
    session.install('--no-deps', '--no-build-isolation', '--editable', '.')
    session.run(
        *('python', '-m', 'pytest', '-q', '-m', 'fast'),
        *('-n', 'auto', '--dist', 'loadfile', *session.posargs),
        env={'OMP_NUM_THREADS': '1'},
    )


@nox.session(python=['3.10', '3.11', '3.12', '3.13'])
def python(session: nox.Session) -> None:
    """The tested set with another version of Python."""
    session.install(*TOOLS)
    session.install('-r', 'requirements/classification.txt')
    session.install('--no-deps', 'mmcv-lite==2.1.0')
    run_tests(session)


@nox.session
@nox.parametrize('version', list(TORCHVISION), ids=list(TORCHVISION))
def torch(session: nox.Session, version: str) -> None:
    """Another version of PyTorch with the original builds of OpenMMLab."""
    session.install(*TOOLS)
    session.install(
        f'torch=={version}', f'torchvision=={TORCHVISION[version]}'
    )
    session.install('mmengine==0.10.7', 'mmpretrain==1.2.0', *OTHERS)
    session.install('--no-deps', 'mmcv-lite==2.1.0')
    run_tests(session)


@nox.session
def onedl(session: nox.Session) -> None:
    """The maintained builds of OpenMMLab with the tested PyTorch."""
    session.install(*TOOLS, 'packaging')
    # Without PyTorch, mmcv is built without its compiled ops.
    session.install('--no-build-isolation', '--no-deps', 'onedl-mmcv==2.3.6')
    session.install(*PYTORCH, *OTHERS)
    session.install('onedl-mmengine==0.10.12', 'onedl-mmpretrain==1.3.6')
    run_tests(session)
