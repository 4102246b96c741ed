"""The tools of mmpretrain support the configs of this project."""

from pathlib import Path

import cv2
import mmpretrain
import pytest
import torch

from conftest import ROOT, run_tool

TOOLS = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
DEMO = ROOT / 'configs' / 'demo' / 'vvt-nano_digits.py'
CONFIGS = sorted((ROOT / 'configs' / 'classification').glob('*.py'))

pytestmark = pytest.mark.skipif(
    not TOOLS.is_dir(), reason='this mmpretrain was installed without tools'
)


@pytest.mark.parametrize(
    'config', [DEMO, CONFIGS[0], CONFIGS[-1]], ids=lambda p: p.stem
)
def test_vis_scheduler(config, tmp_path):
    """The tool replaces the data loader by a list without a sampler."""
    picture = tmp_path / 'lr.png'
    done = run_tool(
        TOOLS / 'visualization' / 'vis_scheduler.py',
        config,
        '--not-show',
        '--save-path',
        picture,
        '--dataset-size',
        4096,
        '--cfg-options',
        f'work_dir={tmp_path}',
        env={'MPLBACKEND': 'Agg'},
    )
    assert done.returncode == 0, done.stdout
    assert cv2.imread(str(picture)).std() > 5


def test_train(digits_root, tmp_path):
    """The tool sets persistent_workers if a config does not."""
    done = run_tool(
        TOOLS / 'train.py',
        DEMO,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'train_dataloader.dataset.indices=128',
        *(
            f'{split}_dataloader.dataset.data_root={digits_root}'
            for split in ('train', 'val', 'test')
        ),
    )
    assert done.returncode == 0, done.stdout
    state = torch.load(tmp_path / 'epoch_1.pth')['state_dict']
    assert all(t.isfinite().all() for t in state.values())
