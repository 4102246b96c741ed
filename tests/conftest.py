"""Fixtures and helper functions shared by several tests."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import mmvvt  # noqa: F401, registers the modules

from tool_server import ToolServer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / 'tests' / 'data'

# Architecture of the network in tests/data/backbone.npz
GOLDEN_ARCH = dict(
    embed_dims=[16, 24, 40, 48],
    num_heads=[1, 2, 5, 4],
    mlp_ratios=[8, 8, 4, 4],
    depths=[1, 1, 2, 1],
)


def relative_error(actual, expected) -> float:
    """Return ``||actual - expected|| / ||expected||``, in float64."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def build_model(model, scope='mmpretrain'):
    """Build a model from its config, as the runner of a scope does."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(model)


def check_files(cfg, loaders):
    """Raise the problems in the files of the datasets of a config."""
    from mmvvt.preflight.data import find_data_problems
    from mmvvt.preflight.run import raise_problems
    from mmvvt.preflight.sources import open_sources

    raise_problems(list(find_data_problems(cfg, open_sources(cfg, loaders))))


def run_two_processes(script, folder, timeout):
    """Run code in two processes; both must reach its end.

    Args:
        script (str): Code that calls ``init_process_group``. Its arguments
            are the rank and the path of a file for the rendezvous.
        folder (Path): Empty folder.
        timeout (float): Limit of each process in seconds.
    """
    # Without the last step, threads of gloo may abort a process that exits.
    script += "\ndist.barrier()\ndist.destroy_process_group()\nprint('done')\n"
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', script, str(rank), str(folder / 'store')],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=timeout)
            assert process.returncode == 0, error[-3000:]
            assert out.splitlines()[-1] == 'done'
    finally:
        for process in processes:
            process.kill()


def run_tool(*arguments, env=None, timeout=300, cwd=ROOT):
    """Run a Python tool of the project; stderr is merged into stdout."""
    arguments = [str(argument) for argument in arguments]
    if env is None and arguments[0].endswith('.py') and hasattr(os, 'fork'):
        return _tool_server.run(arguments, cwd, timeout)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


_tool_server = ToolServer()


def load_tool(path):
    """Import a tool, a path relative to the root, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(height, width):
    """Return a real photograph, ``(H, W, 3)``, BGR."""
    import cv2

    path = resources.files('sklearn') / 'datasets' / 'images' / 'china.jpg'
    return cv2.resize(cv2.imread(str(path)), (width, height))


def write_coco(root, classes, images=2, empty=1, size=(75, 101)):
    """Write a dataset in COCO's layout: a few objects on a photograph.

    Args:
        root (Path): Folder for annotations/, train2017/ and val2017/.
        classes (Sequence[str]): Names of the categories.
        images (int): Number of images per split. They have the same objects
            and differ in the brightness of the photograph.
        empty (int): Number of images without objects; they are the last ones.
        size (tuple[int, int]): Height and width.
    """
    import cv2

    height, width = size
    (root / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        annotations = []
        for number in range(images):
            image = photograph(height, width) // (number + 1)
            assert cv2.imwrite(str(root / split / f'{number:012d}.jpg'), image)
            if number >= images - empty:
                continue
            for k, (x, y, w, h) in enumerate(
                [(3, 5, 40, 30), (50, 20, 30, 48), (10, 30, 24, 24)]
            ):
                # polygons, and a crowd with column-major run lengths last
                crowd = int(k == 2)
                counts = [x * height + y]
                for _ in range(w):
                    counts += [h, height - h]
                counts[-1] += height * width - sum(counts)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=2 * k + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=crowd,
                        segmentation=dict(counts=counts, size=[height, width])
                        if crowd
                        else [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
        content = dict(
            images=[
                dict(
                    id=number,
                    file_name=f'{number:012d}.jpg',
                    height=height,
                    width=width,
                )
                for number in range(images)
            ],
            annotations=annotations,
            # ids are not consecutive, as in COCO
            categories=[
                dict(id=2 * i + 1, name=name) for i, name in enumerate(classes)
            ],
        )
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(content)
        )


# Test files that require neither new processes nor mmpretrain, mmseg or mmdet
FAST = (
    'test_fileio.py',
    'test_cli.py',
    'test_checkpoint/',
    'test_engine/test_checkpoint_hook.py',
    'test_engine/test_hooks.py',
    'test_engine/test_mean_loss.py',
    'test_engine/test_optim_constructor.py',
    'test_engine/test_optim_wrapper.py',
    'test_preflight/',
    'test_visualization/',
    'test_datasets/test_labels.py',
    'test_ops/test_clamp.py',
    'test_ops/test_vicinity_attention.py',
)


# Files that take minutes. They are started first: otherwise, one process would
# run the last of them while the others wait.
SLOW = (
    'test_tools/test_stock_tools.py',
    'test_tools/test_finetune.py',
    'test_apis/test_model_zoo.py',
    'test_wheel.py',
    'test_models/test_inductor.py',
    'test_deploy/test_export_tasks.py',
    'test_deploy/test_export.py',
    'test_ops/test_triton_attention.py',
    'test_tools/test_kill_and_resume.py',
    'test_engine/test_parallel_training.py',
    'test_configs/test_all_configs.py',
)


def pytest_collection_modifyitems(items):
    """Sort the tests, and mark those of the files in ``FAST`` as fast."""

    def place(item):
        path = item.path.relative_to(ROOT / 'tests').as_posix()
        return SLOW.index(path) if path in SLOW else len(SLOW)

    items.sort(key=place)  # stable: the tests of a file keep their order
    for item in items:
        path = item.path.relative_to(ROOT / 'tests').as_posix()
        if path.startswith(FAST):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope='session')
def golden():
    """Recorded values of the official code, from two files."""
    return {
        name: np.load(DATA / f'{name}.npz')
        for name in ('attention', 'backbone')
    }


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """Folder with the complete digits dataset, written once per session."""
    from mmvvt.datasets import write_digits

    root = tmp_path_factory.mktemp('data') / 'digits'
    write_digits(str(root))
    return root


@pytest.fixture(autouse=True)
def _same_start():
    """Seed random numbers and remove scopes set by other tests."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield
