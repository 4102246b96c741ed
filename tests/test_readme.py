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
            assert (folder / link).exists(), link
    for path in re.findall(
        r'\b(?:tools|configs|mmvvt)/[\w./-]+\.(?:py|sh)', text
    ):
        assert (ROOT / path).is_file(), path
