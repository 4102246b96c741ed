"""Validation of masks in COCO files, which pycocotools does not check.

pycocotools reads invalid coordinates and run lengths as they are. The process
then crashes, or the mask contains whatever is in memory.
"""

from typing import Any, List, Optional

import numpy as np

MAX_COORDINATE = 1e5
MAX_PIXELS = 1e9


def find_mask_fault(mask: Any) -> Optional[str]:
    """Check a mask as it is stored in a COCO file.

    Args:
        mask (list | dict): Polygons, each a list ``[x1, y1, x2, y2, ...]``,
            or run lengths with the keys ``size`` (height and width) and
            ``counts`` (numbers, or their compressed string).

    Returns:
        str | None: What is wrong with the mask, None if it is valid.
    """
    try:
        if isinstance(mask, dict):
            return _find_run_length_fault(mask)
        for polygon in mask:
            # min and max raise TypeError for None, text and nested lists.
            if not (
                isinstance(polygon, list)
                and -MAX_COORDINATE < min(polygon, default=0)
                and max(polygon, default=0) < MAX_COORDINATE
            ):
                return 'polygons must be lists of coordinates [x, y, ...]'
    except (TypeError, ValueError, OverflowError):
        return 'it must be polygons [[x, y, ...]] or run lengths'
    return None


def _find_run_length_fault(mask: dict) -> Optional[str]:
    height, width = mask['size'] if 'size' in mask else (0, 0)
    counts = mask.get('counts')
    if isinstance(counts, str):
        counts = _uncompress(counts)
    if not (isinstance(counts, list) and 0 < height * width < MAX_PIXELS):
        return "run lengths must have 'counts' and 'size', [height, width]"
    if min(counts, default=0) < 0 or sum(map(int, counts)) != height * width:
        return f'the run lengths do not add up to {height} x {width} pixels'
    return None


def _uncompress(text: str) -> List[int]:
    """Return the run lengths of a compressed string.

    Each number is stored in groups of 5 bits, the lowest first, with a sixth
    bit if more groups follow. From the fourth number on, the difference to
    the number before the previous one is stored.
    """
    groups = np.frombuffer(text.encode('ascii'), np.uint8).astype(np.int64)
    groups -= ord('0')
    last = np.flatnonzero(groups & 32 == 0)
    if not last.size or last[-1] != groups.size - 1:
        raise ValueError('the last number is incomplete')
    first = np.append(0, last[:-1] + 1)
    place = np.arange(groups.size) - np.repeat(first, last - first + 1)
    if place.max() > 6:
        raise ValueError('a number has more than 32 bits')
    numbers = np.add.reduceat((groups & 31) << 5 * place, first)
    negative = (groups[last] & 16) // 16
    numbers -= negative << 5 * (place[last] + 1)
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers.tolist()
