"""The benchmark refuses to time two sides that differ."""

import pytest
import torch

from mmvvt.analysis.benchmark import alternate, check_same, parse_size


def test_differing_sides_are_not_timed():
    image = torch.randn(1, 3, 4, 4)
    same = check_same(lambda x: (x, 2 * x), lambda x: (x, 2 * x), image, 1e-6)
    assert same == 0.
    with pytest.raises(AssertionError, match='the two sides differ by'):
        check_same(lambda x: (x, x), lambda x: (x, 1.1 * x), image, 1e-3)
    with pytest.raises(AssertionError, match='differ by nan'):
        check_same(lambda x: (x * torch.nan, ), lambda x: (x, ), image, 1e-3)


def test_sides_take_turns():
    order = []
    timings = alternate([lambda: order.append('a'), lambda: order.append('b')],
                        runs=3, warmup=1)
    assert order == ['a', 'b'] * 4
    assert all(0 <= t.low <= t.median <= t.high for t in timings)


@pytest.mark.parametrize('text', ['224', '4x', 'x224', '4x224x3', 'axb'])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match='a size is BATCHxSIDE'):
        parse_size(text)
    assert parse_size('4x224') == (4, 224)
