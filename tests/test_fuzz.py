"""Damaged and hostile files end in one-line errors."""

import pytest

from fuzz import GROUPS, run_cases, table

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# Includes a file that would run code if predictions were unpickled as usual.
CASES = 240  # ``make fuzz`` runs 10 000


def test_damaged_and_hostile_files():
    results = run_cases(seed=0, cases=CASES)
    print(table(results))
    assert sorted(results) == list(range(CASES))
    failed = {i: r for i, r in results.items() if r[1] == 'failed'}
    assert not failed, 'repeat with tests/fuzz.py --seed 0 --case NUMBER'
    # Each reader accepts some files and refuses others.
    for group in {group for group, *_ in GROUPS}:
        outcomes = {o for k, o, _ in results.values() if k.startswith(group)}
        assert {'accepted'} < outcomes, group
