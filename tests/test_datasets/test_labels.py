"""Tests of the validation of label values."""

import numpy as np
import pytest

from mmvvt.datasets import CheckLabels


def results(*values, **more):
    labels = np.array([values], np.uint8)
    return dict(gt_seg_map=labels, seg_map_path='a/b.png', **more)


def test_allowed_values_pass():
    given = results(0, 18, 255)
    assert CheckLabels(num_classes=19).transform(given) is given


def test_inference_has_no_labels():
    assert CheckLabels(num_classes=19).transform({}) == {}


def test_other_values_are_named():
    with pytest.raises(
        ValueError,
        match=r'a/b.png: label values \[19, 33\] are out of range: '
        r'allowed are 0 to 18 and 255 \(ignored\)$',
    ):
        CheckLabels(num_classes=19).transform(results(0, 33, 19, 255))


def test_reduced_values_are_explained():
    with pytest.raises(ValueError, match='has subtracted 1$'):
        CheckLabels(num_classes=150).transform(
            results(150, reduce_zero_label=True)
        )


@pytest.mark.parametrize('number', [0, -1, 1.5, None])
def test_bad_number(number):
    with pytest.raises(ValueError, match='num_classes must be a positive'):
        CheckLabels(num_classes=number)
