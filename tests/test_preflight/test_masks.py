"""Masks with which pycocotools would crash or read wrong memory."""

import numpy as np
import pytest

from mmvvt.preflight.masks import find_mask_fault

mask_utils = pytest.importorskip('pycocotools.mask')


@pytest.mark.parametrize('rows', [1, 7, 64])
@pytest.mark.parametrize('share', [0.0, 0.02, 0.5, 1.0])
def test_all_run_lengths_of_pycocotools_are_valid(rows, share):
    rng = np.random.default_rng(rows)
    mask = np.asfortranarray(rng.random((rows, 50)) < share).astype(np.uint8)
    compressed = mask_utils.encode(mask)
    compressed['counts'] = compressed['counts'].decode()
    assert find_mask_fault(compressed) is None
    # and as numbers: column by column, starting with zeros
    flat = mask.T.ravel()
    ends = [*np.flatnonzero(np.diff(flat, prepend=0)), flat.size]
    counts = np.diff(ends, prepend=0).tolist()
    assert find_mask_fault(dict(counts=counts, size=[rows, 50])) is None


@pytest.mark.parametrize('polygons', [[[1, 2, 3, 4, 5, 6.5]], [[0, 0]], [[]]])
def test_polygons(polygons):
    assert find_mask_fault(polygons) is None


@pytest.mark.parametrize(
    'mask',
    [
        [1, 2, 3, 4, 5, 6],  # without the outer list
        [[1, 2, 3, None, 5, 6]],
        [[1, 2, 3, float('inf'), 5, 6]],
        [[1, 2, 3, 1e300, 5, 6]],
        [['a', 'b']],
        [{}],
        'text',
        5,
        {},
        dict(counts=[1], size=[4, 6]),  # covers only one pixel
        dict(counts=[30], size=[4, 6]),
        dict(counts=[-1, 25], size=[4, 6]),
        dict(counts=[2.5, 21.5], size=[4, 6]),
        dict(counts='P', size=[4, 6]),
        dict(counts='é', size=[4, 6]),
        dict(counts='PP15', size=[4, 6]),
        dict(counts=[10**12], size=[10**6, 10**6]),
        dict(counts=[24]),
        dict(counts=[24], size=24),
        dict(counts=None, size=[4, 6]),
    ],
)
def test_invalid_masks(mask):
    assert find_mask_fault(mask) is not None
