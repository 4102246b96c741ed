"""Tests of imports between modules and of the effects of importing."""

import ast
import sys

import pytest

from conftest import ROOT, run_tool

# Layers of packages, from the lowest to the highest. A file imports only from
# its own package and from lower layers, also inside functions.
FLOORS = [
    ['mmvvt.version'],
    ['mmvvt.errors'],
    ['mmvvt.arch', 'mmvvt.arguments', 'mmvvt.fileio', 'mmvvt.shipped'],
    # modules and subpackages of ops
    ['mmvvt.ops.processor'],
    [
        'mmvvt.ops.autograd',
        'mmvvt.ops.dispatch',
        'mmvvt.ops.native',
        'mmvvt.ops.unflatten',
    ],
    ['mmvvt.ops.selection'],
    ['mmvvt.ops.angles', 'mmvvt.ops.clamp'],
    ['mmvvt.ops.linear', 'mmvvt.ops.reference'],
    ['mmvvt.ops.strips', 'mmvvt.ops.triton_kernels'],
    ['mmvvt.ops.attention', 'mmvvt.ops.convolution'],
    ['mmvvt.ops'],
    ['mmvvt.checkpoint'],
    ['mmvvt.models'],
    ['mmvvt.datasets'],
    ['mmvvt.engine'],
    ['mmvvt.deploy'],
    ['mmvvt.analysis'],
    ['mmvvt.visualization'],
    ['mmvvt.preflight'],
    ['mmvvt.apis'],
    ['mmvvt.cli'],
    ['mmvvt'],
]
FILES = sorted((ROOT / 'mmvvt').rglob('*.py'))
OPS = sorted((ROOT / 'mmvvt' / 'ops').rglob('*.py'))


def room_of(module):
    """Return the most specific package of a module or name."""
    names = [name for floor in FLOORS for name in floor]
    return max(
        (
            name
            for name in names
            if module == name or module.startswith(f'{name}.')
        ),
        key=len,
    )


def floor_of(module):
    room = room_of(module)
    return next(i for i, names in enumerate(FLOORS) if room in names)


def module_of(path):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return name.removesuffix('.__init__')


def imports_of(path):
    """Return the absolute names of the imports of a file."""
    package = list(path.relative_to(ROOT).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = '.'.join(base + ([node.module] if node.module else []))
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=module_of)
def test_imports_go_downwards(path):
    own = module_of(path)
    for module in imports_of(path):
        if module.split('.')[0] != 'mmvvt':
            continue
        if room_of(module) != room_of(own):
            assert floor_of(module) < floor_of(own), f'{own} imports {module}'


def test_every_room_has_a_floor():
    """Each module of the package is listed in ``FLOORS``."""
    rooms = {room_of(module_of(path)) for path in FILES}
    assert {
        f'mmvvt.{p.name.removesuffix(".py")}'
        for p in (ROOT / 'mmvvt').iterdir()
        if not p.name.startswith(('__', '.'))
    } <= rooms
    assert rooms == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize('path', OPS, ids=module_of)
def test_ops_import_torch_only(path):
    allowed = {'torch', 'mmvvt', *sys.stdlib_module_names}
    if path.parent.name == 'triton_kernels':
        allowed.add('triton')
    assert {m.split('.')[0] for m in imports_of(path)} <= allowed


def calls_of(path):
    """Return the dotted names of all calls and raised errors."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc)


@pytest.mark.parametrize(
    'path',
    [*FILES, *sorted((ROOT / 'tools').rglob('*.py'))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_only_cli_ends_the_process(path):
    if path == ROOT / 'mmvvt' / 'cli.py':
        return
    ends = {'sys.exit', 'exit', 'quit', 'os._exit', 'SystemExit'}
    assert not ends & set(calls_of(path))


@pytest.mark.parametrize(
    'path',
    sorted((ROOT / 'tools').rglob('*.py')),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_tools_run_through_cli(path):
    assert (
        path.read_text()
        .rstrip()
        .endswith("if __name__ == '__main__':\n    run(main)")
    )


def test_lean_import():
    """Importing loads no task package, compiled ops, Triton or CUDA."""
    code = """
import sys, warnings
import torch, mmengine.runner, mmcv.cnn
with warnings.catch_warnings():
    warnings.simplefilter('error')
    import mmvvt
heavy = {'mmseg', 'mmdet', 'mmpretrain', 'mmcv.ops', 'sklearn', 'skimage',
         'matplotlib'}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
"""
    bare = run_tool(
        '-c',
        'import sys, torch, mmengine, mmcv, mmcv.cnn, '
        "mmengine.runner; print('triton' in sys.modules)",
    )
    done = run_tool('-c', code)
    assert done.returncode == 0, done.stdout
    found, cuda = done.stdout.strip().splitlines()[-1].rsplit(' ', 1)
    assert cuda == 'False', done.stdout
    assert set(ast.literal_eval(found)) <= {'matplotlib'}  # from mmengine
    ours = run_tool('-c', "import sys, mmvvt; print('triton' in sys.modules)")
    assert ours.stdout == bare.stdout  # torch may import it


# State of a process that importing, building and calling must not change
STATE = """
import ctypes, logging, os, random, sys, warnings
import numpy, torch, mmengine.runner, mmcv.cnn

def state():
    return dict(
        environment=dict(os.environ),
        filters=list(warnings.filters),
        threads=torch.get_num_threads(),
        interop=torch.get_num_interop_threads(),
        dtype=torch.get_default_dtype(),
        grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        precision=torch.get_float32_matmul_precision(),
        mkldnn=torch.backends.mkldnn.enabled,
        random=random.getstate(),
        numpy=numpy.random.get_state()[1].tolist(),
        logging=(logging.root.level, len(logging.root.handlers)),
        hook=sys.excepthook,
        path=list(sys.path))
"""


def test_import_build_and_call_change_nothing():
    done = run_tool(
        '-c',
        STATE
        + """
before = state()
import mmvvt
from mmvvt.models import VVT
assert state() == before, 'import'
model = VVT('tiny')
assert state() == before, 'build'
image = torch.randn(1, 3, 256, 256)  # large enough for strips
torch_state = torch.get_rng_state()
model(image)[0].sum().backward()
with torch.no_grad():
    model.eval()(image)
assert state() == before, 'call'
assert torch.equal(torch.get_rng_state(), torch_state), 'random numbers'
""",
    )
    assert done.returncode == 0, done.stdout
