"""Tests of the detection demos on a few scenes."""

import cv2
import mmengine
import numpy as np
import pytest
import torch

from mmvvt.datasets import write_digit_scenes

from conftest import ROOT, run_tool

pytest.importorskip('mmdet')
decode = pytest.importorskip('pycocotools.mask').decode

DEMOS = ROOT / 'configs' / 'demo'
# Options with which an untrained detector finds objects
DETECTORS = {
    'retinanet': 'model.test_cfg.score_thr=0.',
    'mask-rcnn': 'model.test_cfg.rcnn.score_thr=0.',
}
STEPS = [
    'model.backbone.init_cfg=None',
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]


def config_of(detector):
    return DEMOS / f'{detector}_vvt-nano_digit-scenes.py'


def roots(root):
    options = [
        f'{loader}_dataloader.dataset.data_root={root}'
        for loader in ('train', 'val', 'test')
    ]
    return options + [
        f'{split}_evaluator.ann_file={root}/instances_validation.json'
        for split in ('val', 'test')
    ]


@pytest.fixture(scope='module', params=DETECTORS)
def tested(request, tmp_path_factory):
    """Predictions of a detector after two training steps."""
    work_dir = tmp_path_factory.mktemp(request.param)
    root = work_dir / 'digit-scenes'
    write_digit_scenes(str(root), 4, 4)
    config = config_of(request.param)
    options = [DETECTORS[request.param], *roots(root)]
    done = run_tool(
        'tools/train.py',
        config,
        '--work-dir',
        work_dir,
        '--cfg-options',
        *STEPS,
        *options,
    )
    assert done.returncode == 0, done.stdout
    out = work_dir / 'test.pkl'
    done = run_tool(
        'tools/test.py',
        config,
        work_dir / 'iter_2.pth',
        '--work-dir',
        work_dir,
        '--out',
        out,
        '--cfg-options',
        'model.backbone.init_cfg=None',
        *options,
    )
    assert done.returncode == 0, done.stdout
    assert 'coco/bbox_mAP_50' in done.stdout
    assert ('coco/segm_mAP' in done.stdout) == (request.param == 'mask-rcnn')
    return config, root, out


def test_predictions_and_truth(tested):
    """Predictions have boxes and RLE masks; the ground truth is correct."""
    config, root, out = tested
    predictions = mmengine.load(out)
    assert len(predictions) == 4
    masked = 'mask-rcnn' in config.name
    for sample in predictions:
        truth, found = sample['gt_instances'], sample['pred_instances']
        assert tuple(truth['bboxes'].shape) == (len(truth['labels']), 4)
        assert len(found['scores']) == len(found['bboxes']) > 0
        assert ('masks' in found) == masked
        for mask in [*truth['masks'], *found.get('masks', [])]:
            assert decode(mask).shape == (128, 128)

        path = sample['img_path'].replace('images', 'annotations')
        labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        drawn = np.full_like(labels, 10)
        for mask, label in zip(truth['masks'], truth['labels']):
            drawn[decode(mask) > 0] = label
        assert (drawn == labels).all()


def test_sheet(tested, tmp_path):
    config, _, out = tested
    sheet = tmp_path / 'sheet.png'
    done = run_tool(
        'tools/analysis_tools/report_detection.py',
        config,
        out,
        sheet,
        '--score-thr',
        '0',
    )
    assert done.returncode == 0, done.stdout
    image = cv2.imread(str(sheet))
    assert image.shape[1] > 600 and len(np.unique(image)) > 50


@pytest.mark.parametrize('scores', [[0.9, 0.4], [0.4, 0.9]])
def test_likeliest_box_lies_on_top(scores, tmp_path):
    from mmvvt.visualization import draw_detection_sheet

    image = tmp_path / 'image.png'
    cv2.imwrite(str(image), np.full((64, 64, 3), 255, np.uint8))
    boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]] * 2)
    sample = dict(
        img_path=str(image),
        gt_instances=dict(bboxes=boxes[:0], labels=torch.zeros(0).long()),
        pred_instances=dict(
            bboxes=boxes,
            labels=torch.tensor([0, 1]),
            scores=torch.tensor(scores),
        ),
    )
    sheet = tmp_path / 'sheet.png'
    draw_detection_sheet(
        [sample], ['a', 'b'], [[255, 0, 0], [0, 0, 255]], '', 0.3, str(sheet)
    )
    drawn = cv2.imread(str(sheet)).astype(int)  # (H, W, 3), BGR
    red = ((drawn[..., 2] > 200) & (drawn[..., :2].max(-1) < 60)).sum()
    blue = ((drawn[..., 0] > 200) & (drawn[..., 1:].max(-1) < 60)).sum()
    assert (red > 2 * blue) == (scores[0] > scores[1])


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['none.pkl'], 'error: no such file: none.pkl'),
        (
            [__file__, '--score-thr', '2'],
            'error: --score-thr must be between 0 and 1, got 2.0',
        ),
    ],
)
def test_sheet_of_bad_input(arguments, message, tmp_path):
    path, *options = arguments
    done = run_tool(
        'tools/analysis_tools/report_detection.py',
        config_of('retinanet'),
        path,
        tmp_path / 'sheet.png',
        *options,
    )
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == message


def test_scenes_are_written_where_absent(tmp_path, monkeypatch):
    from mmvvt.datasets import digit_scenes_coco

    monkeypatch.setattr(
        digit_scenes_coco,
        'write_digit_scenes',
        lambda root: write_digit_scenes(root, 3, 2),
    )
    root = tmp_path / 'scenes'
    dataset = digit_scenes_coco.DigitScenesCoco(
        str(root),
        ann_file='instances_training.json',
        data_prefix=dict(img='images/training'),
    )
    assert len(dataset) == 3
    info = dataset.get_data_info(0)
    assert (root / 'images' / 'training' / '00000.png').samefile(
        info['img_path']
    )
    assert all(0 <= i['bbox_label'] <= 9 for i in info['instances'])
