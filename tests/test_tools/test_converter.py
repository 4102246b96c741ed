"""Tests of tools/model_converters/official_to_mmvvt.py."""

import argparse

import pytest
import torch

from mmvvt.arch import resolve_arch
from mmvvt.checkpoint import official_shapes

from conftest import ROOT, run_tool

TOOL = 'tools/model_converters/official_to_mmvvt.py'


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """Training checkpoint as written by the official code."""
    shapes = official_shapes(resolve_arch('tiny'), num_classes=1000)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('official') / 'checkpoint.pth'
    torch.save(
        dict(
            model={k: 0.02 * torch.randn(s) for k, s in shapes.items()},
            optimizer={},
            lr_scheduler={},
            epoch=299,
            scaler={},
            args=argparse.Namespace(model='vvt_tiny', lr=5e-4),
        ),
        path,
    )
    return path


def test_there_and_back_and_into_the_test_tool(official, tmp_path):
    ours, back = tmp_path / 'ours.pth', tmp_path / 'back.pth'
    done = run_tool(TOOL, official, ours)
    assert done.returncode == 0, done.stdout
    assert 'architecture: tiny, 12882440 parameters, 1000 classes' in (
        done.stdout
    )
    done = run_tool(TOOL, ours, back, '--reverse')
    assert done.returncode == 0, done.stdout
    before = torch.load(official, weights_only=False)['model']
    after = torch.load(back)['model']
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)

    # test the converted file with tools/test.py, with one folder per class
    import cv2
    import numpy as np

    for name in ('n1', 'n2'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        cv2.imwrite(
            str(tmp_path / 'images' / name / '0.png'),
            np.full((300, 260, 3), 127, np.uint8),
        )
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = '{ROOT}/configs/classification/vvt-tiny_8xb128_in1k.py'
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(_delete_=True, type='CustomDataset',
                 data_root='{tmp_path}/images',
                 pipeline={{{{_base_.test_pipeline}}}}))
""")
    done = run_tool(
        'tools/test.py', config, ours, '--work-dir', tmp_path / 'work'
    )
    assert done.returncode == 0, done.stdout
    assert 'accuracy/top1' in done.stdout
    assert 'unexpected key' not in done.stdout
    assert 'missing keys' not in done.stdout


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['--arch', 'small'], 'do not match arch small'),
        (['--reverse'], 'is not a key of a VVT classifier'),
    ],
)
def test_refusals_leave_nothing(official, tmp_path, arguments, message):
    target = tmp_path / 'out.pth'
    done = run_tool(TOOL, official, target, *arguments)
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last
    assert list(tmp_path.iterdir()) == []


def test_truncated_absent_and_same(official, tmp_path):
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(official.read_bytes()[:100000])
    for source, target, message in (
        (cut, tmp_path / 'out.pth', 'truncated or not a PyTorch checkpoint'),
        (tmp_path / 'no.pth', tmp_path / 'out.pth', 'no such checkpoint file'),
        (cut, cut, 'SRC and DST are the same file'),
    ):
        done = run_tool(TOOL, source, target)
        assert done.returncode == 1
        assert message in done.stdout.strip().splitlines()[-1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.pth']
