"""Tests of curves and sheets drawn from the files of the tools."""

import json

import cv2
import numpy as np
import pytest

from mmvvt.visualization.curves import curves, plot_curves, read_scalars
from mmvvt.visualization.sheets import (
    choose_samples,
    draw_classification_sheet,
)


def log(folder, stamp, records):
    path = folder / stamp / 'vis_data'
    path.mkdir(parents=True)
    (path / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))


def step(epoch, iteration, loss):
    return dict(epoch=epoch, iter=iteration, loss=loss)


def test_curves_of_a_resumed_run(tmp_path):
    log(tmp_path, '20260101_000000', [
        step(1, 1, 4.), step(1, 2, 2.), dict(top1=50., step=1), step(2, 3, 9.)
    ])  # yapf: disable
    log(tmp_path, '20260101_000100', [
        step(2, 3, 1.), step(2, 4, 2.), dict(top1=75., step=2)
    ])  # yapf: disable
    (tmp_path / '20260101_000200').mkdir()  # test runs have no training log
    found = curves(read_scalars(str(tmp_path)), 'top1')
    assert found['loss'] == ([1, 2], [3.0, 1.5])  # 9: interrupted
    assert found['top1'] == ([1, 2], [50.0, 75.0])
    plot_curves(str(tmp_path), 'top1', 'top-1', str(tmp_path / 'c.png'))
    assert cv2.imread(str(tmp_path / 'c.png')).std() > 5


def test_a_new_run_replaces_the_old_one(tmp_path):
    log(tmp_path, '1', [step(1, 1, 4.0), step(2, 2, 3.0)])
    log(tmp_path, '2', [step(1, 1, 5.0)])
    assert curves(read_scalars(str(tmp_path)), 'x')['loss'] == ([1], [5.0])


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='no training log in'):
        read_scalars(str(tmp_path))


def sample(i, true, predicted, path=''):
    score = np.eye(10)[predicted] * 0.9
    return dict(
        img_path=path, gt_label=true, pred_label=predicted, pred_score=score
    )


def test_wrong_ones_come_first_and_the_rest_is_spread():
    samples = [sample(i, i // 10, i // 10) for i in range(100)]
    samples[55] = sample(55, 5, 3)
    chosen = choose_samples(samples, 11)
    assert chosen[0] is samples[55]
    assert {s['gt_label'] for s in chosen[1:]} == set(range(10))
    assert len(choose_samples(samples[:3], 11)) == 3


def test_sheet(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((8, 8), 200, np.uint8))
    path = str(tmp_path / 'a.png')
    samples = [sample(0, 1, 1, path), sample(1, 2, 7, path)]
    out = tmp_path / 'sheet.png'
    draw_classification_sheet(
        samples, '0123456789', 'title', str(out), columns=2, rows=1
    )
    picture = cv2.imread(str(out)).astype(int)
    blue, green, red = picture[..., 0], picture[..., 1], picture[..., 2]
    assert ((red - green > 60) & (red - blue > 60)).any()  # wrong
    assert ((green - red > 60) & (green - blue > 30)).any()  # correct
