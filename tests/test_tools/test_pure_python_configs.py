"""All tools accept pure Python configs without a default scope."""

import json

import cv2
import pytest

from mmvvt.datasets import write_digit_scenes

from conftest import ROOT, photograph, run_tool

DEMOS = ROOT / 'configs' / 'demo'
# Train, test and predict in one process.
SCRIPT = """
import runpy, sys

def run(tool, *arguments):
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name='__main__')

root, config, work_dir, image, checkpoint, *settings = sys.argv[1:]
options = ['--work-dir', work_dir, '--cfg-options', *settings]
run(f'{root}/tools/train.py', config, '--amp', *options)
run(f'{root}/tools/test.py', config, checkpoint, '--show-dir',
    f'{work_dir}/shown', '--out', f'{work_dir}/test.pkl', *options)
run(f'{root}/tools/infer.py', image, config, checkpoint, '--out-dir',
    f'{work_dir}/out', '--cfg-options', *settings)
"""


def indices(number):
    return [
        f'{split}_dataloader.dataset.indices={number}'
        for split in ('train', 'val', 'test')
    ]


@pytest.mark.parametrize(
    'name,settings,checkpoint,report',
    [
        (
            'vvt_nano_digits',
            ['train_cfg.max_epochs=1', *indices(70)],
            'epoch_1.pth',
            None,
        ),
        (
            'vvt_nano_fpn_digit_scenes',
            ['train_cfg.max_iters=2'],
            'iter_2.pth',
            'report_segmentation.py',
        ),
        (
            'retinanet_vvt_nano_digit_scenes',
            ['train_cfg.max_iters=2'],
            'iter_2.pth',
            'report_detection.py',
        ),
    ],
)
def test_train_test_infer(name, settings, checkpoint, report, tmp_path):
    if 'digits' not in name:
        pytest.importorskip('mmdet' if 'retinanet' in name else 'mmseg')
        pytest.importorskip('mmcv._ext')
        root = tmp_path / 'scenes'
        write_digit_scenes(str(root), 8, 4)
        settings = settings + [
            f'{split}_dataloader.dataset.data_root={root}'
            for split in ('train', 'val', 'test')
        ]
        if 'retinanet' in name:
            file = root / 'instances_validation.json'
            settings += [
                f'{split}_evaluator.ann_file={file}'
                for split in ('val', 'test')
            ]
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    image = tmp_path / 'photo.png'
    cv2.imwrite(str(image), photograph(96, 120))
    config, out = DEMOS / f'{name}.py', tmp_path / 'work'
    weights = out / checkpoint
    done = run_tool(script, ROOT, config, out, image, weights, *settings)
    assert done.returncode == 0, done.stdout[-3000:]
    assert any((out / 'shown').rglob('*.png')) or any(
        (out / 'shown').rglob('*.jpg')
    )
    results = json.loads((out / 'out' / 'results.json').read_text())
    assert len(results['images']) == 1 and not results['skipped']
    if report is not None:
        done = run_tool(
            ROOT / 'tools' / 'analysis_tools' / report,
            config,
            out / 'test.pkl',
            out / 'sheet.png',
            '--checkpoint',
            weights,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert (out / 'sheet.png').stat().st_size > 1000


def test_same_network_as_the_text_config():
    from mmengine.config import Config

    for pure, text in (
        ('vvt_nano_digits', 'vvt-nano_digits'),
        ('vvt_nano_fpn_digit_scenes', 'vvt-nano_fpn_digit-scenes'),
        ('retinanet_vvt_nano_digit_scenes', 'retinanet_vvt-nano_digit-scenes'),
    ):
        a, b = (
            Config.fromfile(DEMOS / f'{name}.py').model.backbone
            for name in (pure, text)
        )
        assert a.arch == b.arch
        assert a.get('out_indices') == b.get('out_indices')
