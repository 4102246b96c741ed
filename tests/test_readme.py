"""The Python code in the README runs, and the named files exist."""

import re

import pytest
import torch

from mmvvt.arch import resolve_arch
from mmvvt.checkpoint import convert_official, official_shapes

from conftest import ROOT, run_tool

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Folder with the files that the README assumes."""
    import cv2
    from sklearn.datasets import load_sample_image

    path = tmp_path_factory.mktemp('readme')
    (path / 'configs').symlink_to(ROOT / 'configs')
    cv2.imwrite(str(path / 'photo.jpg'), load_sample_image('china.jpg'))
    shapes = official_shapes(resolve_arch('tiny'), num_classes=1000)
    official = {key: 0.02 * torch.randn(s) for key, s in shapes.items()}
    torch.save(convert_official(official), path / 'vvt-tiny_in1k.pth')
    return path


def run_block(word, folder):
    (block,) = (b for b in BLOCKS if word in b)
    done = run_tool('-c', block, cwd=folder)
    assert done.returncode == 0, done.stdout
    return block, done.stdout.strip().splitlines()


def test_backbone_alone(folder):
    block, lines = run_block('backbone(torch.randn', folder)
    expected = [line[2:] for line in block.splitlines() if line[:2] == '# ']
    assert len(expected) == 4 and lines[-4:] == expected


def test_photograph_with_a_converted_checkpoint(folder):
    _, lines = run_block('ImageClassificationInferencer', folder)
    name, score = lines[-1].rsplit(' ', 1)
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    # A progress bar may precede the name in the line.
    assert name.endswith(tuple(IMAGENET_CATEGORIES))
    assert 0 < float(score) < 1


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmvvt', 'mmengine', 'mmcv'):
            raise ImportError(f'{name} must not be imported')

sys.meta_path.insert(0, NoTorch())
try:
    import torch
    raise SystemExit('torch was imported')
except ImportError:
    pass
"""


def test_photograph_without_pytorch(folder):
    """ONNX Runtime, NumPy and Pillow alone give five names."""
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    from mmvvt.apis import export_model
    from mmvvt.preflight import build_model, read_config

    # A narrow network with one stage is exported faster.
    cfg = read_config(
        str(ROOT / 'configs/classification/vvt-tiny_8xb128_in1k.py')
    )
    cfg.model.backbone.update(
        arch=dict(
            embed_dims=[8, 8, 8, 8],
            num_heads=[1, 1, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            depths=[1, 1, 1, 1],
        ),
        out_indices=(0,),
    )
    cfg.model.head.in_channels = 8
    model = build_model(cfg)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / 'narrow.pth')
    export_model(
        cfg,
        str(folder / 'narrow.pth'),
        str(folder / 'vvt.onnx'),
        with_preprocessing=True,
        fixed_size=(224, 224),
    )
    (block,) = (b for b in BLOCKS if 'onnxruntime' in b)
    done = run_tool('-c', WITHOUT_TORCH + block, cwd=folder)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 5
    scores = [float(line.rsplit(': ', 1)[1]) for line in lines]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    for line in lines:
        assert line.rsplit(': ', 1)[0] in IMAGENET_CATEGORIES


def test_own_size(folder):
    (block,) = (b for b in BLOCKS if 'embed_dims' in b)
    names = {}
    exec(block, names)
    from mmengine.registry import MODELS

    backbone = MODELS.build(names['model']['backbone'])
    assert len(backbone(torch.randn(1, 3, 64, 64))) == 4


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(
        r'\b(?:XXX|TBD|FIXME|QUICKTIME|REPOSITORY)\b', README
    )


@pytest.mark.parametrize(
    'document',
    [
        p.relative_to(ROOT)
        for p in sorted(ROOT.rglob('README.md'))
        if '.venv' not in p.parts
    ],
    ids=str,
)
def test_links_and_paths(document):
    """Relative links and paths in commands exist."""
    text = (ROOT / document).read_text(encoding='utf-8')
    folder = (ROOT / document).parent
    for link in re.findall(r'\]\(([^)]+)\)', text):
        if '://' not in link:
            assert (folder / link.partition('#')[0]).exists(), link
    for path in re.findall(
        r'\b(?:tools|configs|mmvvt)/[\w./-]+\.(?:py|sh)', text
    ):
        assert (ROOT / path).is_file(), path
