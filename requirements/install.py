"""Create .venv: `demo` without compiled ops, `full` with all dependencies.

`docs` has only what the documentation site needs, without torch.

An existing environment is checked and reused; a broken or incomplete one is
removed and created again. The script requires only Python.

Building mmcv's compiled ops takes several minutes. The wheel is cached outside
the clone, in a folder named after the versions of Python, torch and mmcv. The
cache is MMVVT_WHEELS, by default ~/.cache/mmvvt/wheels.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
STAMP = VENV / 'mmvvt-install.json'
BIN = VENV / ('Scripts' if os.name == 'nt' else 'bin')
PYTHON = BIN / ('python.exe' if os.name == 'nt' else 'python')

MMCV_VERSION = '2.1.0'
# mmcv 2.1.0 imports pkg_resources, which setuptools 81 no longer provides.
# With ninja and psutil, it is built on all cores.
BUILD_TOOLS = ['setuptools>=75,<81', 'wheel', 'ninja', 'psutil']
REQUIREMENTS = {
    'demo': ROOT / 'requirements' / 'classification.txt',
    'docs': ROOT / 'requirements' / 'docs.txt',
    'full': ROOT / 'requirements.txt',
}
# An environment is ready if all packages can be imported and mmvvt is
# imported from this clone.
CHECK_CLONE = (
    f'import mmvvt; assert mmvvt.__path__[0] == '
    f'{str(ROOT / "mmvvt")!r}, mmvvt.__path__'
)
CHECK_DOCS = 'import mkdocs, material, mkdocstrings, latex2mathml\n'
CHECKS = {
    'docs': CHECK_DOCS,
    'demo': 'import torch, torchvision, cv2, sklearn, matplotlib, mmcv\n'
    'import mmpretrain\n' + CHECK_CLONE,
    'full': 'import torch, torchvision, cv2, sklearn, skimage, matplotlib\n'
    'import mmcv.ops, mmpretrain, mmseg, mmdet, pytest\n'
    'mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n'
    + CHECK_DOCS
    + CHECK_CLONE,
}
HEARTBEAT = 15  # seconds between progress messages of a long step

started = time.monotonic()


def say(message: str) -> None:
    print(f'[{time.monotonic() - started:5.0f} s] {message}', flush=True)


def run(
    title: str, command: List[str], extra_env: Optional[Dict[str, str]] = None
) -> None:
    """Run a step, log its output to a file and print its progress."""
    say(title)
    log = Path(tempfile.gettempdir()) / f'mmvvt-install-{os.getpid()}.log'
    env = {**os.environ, **(extra_env or {})}
    last = ['']

    with open(log, 'w', encoding='utf-8') as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        )

        def follow():
            for line in process.stdout:
                file.write(line)
                if line.strip() and not line.startswith('WARNING'):
                    last[0] = line.strip()

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        while True:
            try:
                process.wait(timeout=HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                count = re.match(r'\[\d+/\d+\]', last[0])
                say(f'  ... {count.group() if count else last[0][:60]}')
        reader.join()
    if process.returncode:
        tail = log.read_text(encoding='utf-8').splitlines()[-20:]
        print('\n'.join(tail), file=sys.stderr)
        sys.exit(f'error: this step failed: {title}\nthe whole log: {log}')
    log.unlink()


def pip(title: str, *arguments: str, **options) -> None:
    run(
        title,
        [str(PYTHON), '-m', 'pip', '--disable-pip-version-check', *arguments],
        **options,
    )


def output_of(code: str) -> Optional[str]:
    """Run Python code in the environment and return its output.

    The code runs outside the clone: inside, mmvvt could be imported without
    being installed. Returns None if the code fails.
    """
    try:
        done = subprocess.run(
            [str(PYTHON), '-c', code],
            capture_output=True,
            text=True,
            cwd=tempfile.gettempdir(),
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fingerprint(kind: str) -> str:
    """Hash of the requirements, this script and the Python version."""
    digest = hashlib.sha256(sys.version.encode())
    setup = (ROOT / 'setup.py', ROOT / 'setup.cfg')
    for path in (Path(__file__), *REQUIREMENTS.values(), *setup):
        digest.update(path.read_bytes())
    return f'{kind}-{digest.hexdigest()[:16]}'


def installed_kind() -> Optional[str]:
    """Return the kind of a complete, working environment, or None."""
    try:
        stamp = json.loads(STAMP.read_text())['fingerprint']
    except (OSError, ValueError, KeyError):
        return None
    for kind in ('full', 'demo', 'docs'):
        if stamp == fingerprint(kind):
            return kind if output_of(CHECKS[kind]) is not None else None
    return None


def make_venv() -> None:
    if VENV.exists():
        say('.venv is not whole or out of date: removing it')
        shutil.rmtree(VENV)
    run('making .venv', [sys.executable, '-m', 'venv', str(VENV)])
    pip('installing build tools', 'install', *BUILD_TOOLS)


def wheel_folder() -> Path:
    """Cache folder of the wheel for these Python, torch and mmcv."""
    key = output_of(
        'import sys, torch; print(f"py{sys.version_info[0]}'
        '{sys.version_info[1]}-torch{torch.__version__}-'
        "{'cuda' if torch.cuda.is_available() else 'cpu'}\")"
    )
    base = os.environ.get('MMVVT_WHEELS')
    base = Path(base) if base else Path.home() / '.cache' / 'mmvvt' / 'wheels'
    return base / f'{key}-mmcv{MMCV_VERSION}'


def build_mmcv(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix='building-')
    try:
        # With build isolation, mmcv would not find torch and would skip the
        # ops. pip's cache does not distinguish wheels with and without ops.
        pip(
            'building mmcv with its compiled ops (about 13 minutes on 2 '
            f'cores; once, then kept in {folder})',
            'wheel',
            '--verbose',
            '--no-deps',
            '--no-build-isolation',
            '--no-cache-dir',
            '--no-binary=mmcv',
            f'--wheel-dir={temporary}',
            f'mmcv=={MMCV_VERSION}',
            extra_env={'MMCV_WITH_OPS': '1'},
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def install_mmcv_with_ops() -> None:
    folder = wheel_folder()
    for attempt in range(2):
        wheels = list(folder.glob('mmcv-*.whl'))
        if not wheels:
            build_mmcv(folder)
            wheels = list(folder.glob('mmcv-*.whl'))
        # mmcv-lite is mmcv without ops; only one may be installed.
        pip('removing mmcv-lite, if there', 'uninstall', '--yes', 'mmcv-lite')
        pip(
            f'installing {wheels[0].name}',
            'install',
            '--force-reinstall',
            '--no-deps',
            '--no-cache-dir',
            str(wheels[0]),
        )
        # Import torch first: the ops link against its libraries.
        if output_of('import torch, mmcv.ops') is not None:
            return
        if attempt == 0:
            say(f'the ops of {wheels[0]} do not load: building them again')
            shutil.rmtree(folder)
    sys.exit(f'error: the compiled ops of mmcv {MMCV_VERSION} do not load')


def finish(kind: str) -> None:
    say('checking that everything imports')
    if output_of(CHECKS[kind]) is None:
        subprocess.run(
            [str(PYTHON), '-c', CHECKS[kind]], cwd=tempfile.gettempdir()
        )
        sys.exit('error: the environment does not import, see above')
    STAMP.write_text(json.dumps({'fingerprint': fingerprint(kind)}))
    say('.venv is ready')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('kind', choices=['demo', 'full', 'docs'])
    kind = parser.parse_args().kind
    if sys.version_info < (3, 10):
        sys.exit(
            f'error: Python 3.10 or newer is needed, this is '
            f'{sys.version.split()[0]}; name another one with '
            'make PYTHON=...'
        )

    present = installed_kind()
    if present == 'full' or present == kind:
        say('.venv is ready')
        return
    if present is None:
        make_venv()
    STAMP.unlink(missing_ok=True)

    if kind == 'docs':
        requirements = str(REQUIREMENTS['docs'])
        pip(
            'installing the documentation tools', 'install', '-r', requirements
        )
        finish(kind)
        return

    # Install torch separately: it is the largest download.
    torch_lines = [
        line
        for line in REQUIREMENTS['demo'].read_text().splitlines()
        if line.startswith(('torch==', 'torchvision==', 'numpy=='))
    ]
    pip(
        f'installing {", ".join(torch_lines)} (the largest download)',
        'install',
        *torch_lines,
    )
    pip(
        f'installing {REQUIREMENTS[kind].relative_to(ROOT)}',
        'install',
        '-r',
        str(REQUIREMENTS[kind]),
    )
    if kind == 'full':
        install_mmcv_with_ops()
    else:
        pip(
            'installing mmcv-lite',
            'install',
            '--no-deps',
            f'mmcv-lite=={MMCV_VERSION}',
        )
    pip(
        'installing mmvvt',
        'install',
        '--no-deps',
        '--no-build-isolation',
        '--editable',
        '.',
    )
    finish(kind)


if __name__ == '__main__':
    main()
