"""The house: what imports what, and what importing mmvvt brings along."""

import ast

import pytest
from conftest import ROOT, run_tool

# Floors from the ground up; a file may import from its own and lower ones.
FLOORS = [
    ['mmvvt.version', 'mmvvt.arch'],
    ['mmvvt.ops', 'mmvvt.checkpoint'],
    ['mmvvt.models'],
    ['mmvvt.analysis', 'mmvvt.datasets', 'mmvvt.engine'],
    ['mmvvt'],
]
FILES = sorted((ROOT / 'mmvvt').rglob('*.py'))


def floor_of(module):
    best = max((name for names in FLOORS for name in names
                if module == name or module.startswith(f'{name}.')), key=len)
    return next(i for i, names in enumerate(FLOORS) if best in names)


def imports_of(path):
    """Names of the modules that a file imports, relative ones resolved."""
    package = list(path.relative_to(ROOT).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level] if node.level else []
            module = '.'.join(base + ([node.module] if node.module else []))
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES,
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    own = floor_of(name.removesuffix('.__init__'))
    for module in imports_of(path):
        if module.split('.')[0] == 'mmvvt':
            assert floor_of(module) <= own, f'{name} imports {module}'


@pytest.mark.parametrize('path', sorted((ROOT / 'mmvvt/ops').glob('*.py')),
                         ids=lambda p: p.name)
def test_ops_import_torch_alone(path):
    allowed = {'torch', 'mmvvt', 'math', 'os', 'collections', 'contextlib',
               'functools', 'importlib', 'typing'}
    assert {m.split('.')[0] for m in imports_of(path)} <= allowed


def test_lean_import():
    """No code base of a task, no compiled ops, no Triton, no CUDA context."""
    code = '''
import sys, warnings
import torch, mmengine.runner, mmcv.cnn
with warnings.catch_warnings():
    warnings.simplefilter('error')
    import mmvvt
heavy = {'mmseg', 'mmdet', 'mmpretrain', 'mmcv.ops', 'sklearn', 'skimage'}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
'''
    bare = run_tool('-c', "import sys, torch, mmengine, mmcv, mmcv.cnn, "
                    "mmengine.runner; print('triton' in sys.modules)")
    done = run_tool('-c', code)
    assert done.returncode == 0, done.stdout
    found, cuda = done.stdout.strip().splitlines()[-1].rsplit(' ', 1)
    assert found == '[]' and cuda == 'False', done.stdout
    ours = run_tool('-c', "import sys, mmvvt; print('triton' in sys.modules)")
    assert ours.stdout == bare.stdout  # torch itself may import it
