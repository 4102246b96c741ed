"""Tests of pictures of the predictions for one image."""

import cv2
import numpy as np
import pytest

from mmvvt.visualization.predictions import (
    MAX_SIDE,
    distinct_colour,
    draw_classification,
    draw_detection,
    draw_segmentation,
    fit,
)

RED, GREEN = (255, 0, 0), (0, 200, 0)


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def is_near(picture, colour, tolerance=8):
    """Return the mask ``(H, W)`` of the pixels close to a colour."""
    return (abs(picture.astype(int) - colour) <= tolerance).all(axis=2)


@pytest.mark.parametrize(
    'size, expected',
    [
        ((8, 8), (640, 640)),
        ((100, 300), (300, 900)),
        ((640, 20), (640, 20)),
        ((1200, 1600), (1200, 1600)),
        ((1000, 4000), (400, MAX_SIDE)),
        ((2, 9000), (1, MAX_SIDE)),
    ],
)
def test_size(size, expected):
    assert fit(grey(*size)).shape == (*expected, 3)


def test_small_images_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert (fit(image)[40::80, 40::80] == image).all()


def test_colours_differ():
    colours = {distinct_colour(label) for label in range(100)}
    assert len(colours) == 100
    near = [
        np.abs(np.subtract(distinct_colour(i), distinct_colour(i + 1))).sum()
        for i in range(100)
    ]
    assert min(near) > 100


def test_bars_are_as_long_as_the_scores():
    picture = draw_classification(grey(60, 60, 0), ['a', 'b'], [0.75, 0.25])
    assert picture.shape == (480, 960, 3)
    first = is_near(picture, (9, 105, 218)).any(axis=0).sum()
    other = is_near(picture, (168, 185, 204)).any(axis=0).sum()
    assert first == pytest.approx(3 * other, rel=0.03)
    assert is_near(picture[:, :470], (0, 0, 0)).mean() > 0.5  # the image


@pytest.mark.parametrize(
    'names', [['$a_b$', 'a' * 200, 'two words ' * 20], ['naïve café']]
)
def test_odd_names(names):
    scores = [0.5] * len(names)
    picture = draw_classification(grey(9, 9), names, scores)
    assert picture[:, 900:].min() < 128  # the score is still visible
    boxes = np.array([[0, 0, 9, 9]] * len(names))
    draw_detection(grey(9, 9), boxes, names, scores, [RED] * len(names))


def test_overlay_and_legend():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 48:] = 2
    picture = draw_segmentation(
        grey(64, 64),
        labels,
        [RED, (1, 2, 3), GREEN],
        [(0, 'sky', 0.75), (2, 'tree', 0.25)],
    )
    assert picture.shape[0] == 640 and picture.shape[1] > 800
    overlay, legend = picture[:, :640], picture[:, 640:]
    for colour, share in ((RED, 0.75), (GREEN, 0.25)):
        mixed = 0.45 * 100 + 0.55 * np.array(colour)
        assert is_near(overlay, mixed).mean() == pytest.approx(share, abs=0.01)
        assert is_near(legend, colour).sum() > 50
    assert not is_near(legend, (1, 2, 3)).any()  # colour of an absent class


def test_legend_of_many_classes_beside_a_low_image():
    labels = np.arange(150, dtype=np.uint8)[None].repeat(4, axis=0)
    palette = [distinct_colour(label) for label in range(150)]
    legend = [(label, f'class {label}', 1 / 150) for label in range(150)]
    picture = draw_segmentation(
        labels[..., None].repeat(3, 2), labels, palette, legend
    )
    assert 100 < picture.shape[0] < 400
    # The image is at the top; the legend has seven classes and one more line.
    assert is_near(picture[:20, :750], (255, 255, 255)).mean() < 0.01
    assert is_near(picture[20:, :750], (255, 255, 255)).all()
    lines = (picture[:, 750:].min(axis=(1, 2)) < 200).astype(int)
    assert (np.diff(lines) == 1).sum() == 8


def test_boxes_and_masks_are_in_their_places():
    image = grey(100, 200)
    masks = np.zeros((2, 100, 200), bool)
    masks[0, 40:60, 20:60] = True
    boxes = np.array([[20, 40, 60, 60], [150, 0, 200, 30]], float)
    picture = draw_detection(
        image, boxes, ['cat', 'dog'], [0.9, 0.5], [RED, GREEN], masks
    )
    assert picture.shape == (400, 800, 3)  # enlarged by a factor of four
    tinted = is_near(picture, 0.55 * 100 + 0.45 * np.array(RED))
    rows, columns = np.nonzero(tinted)
    assert abs(rows.min() - 160) < 8 and abs(rows.max() - 240) < 8
    assert abs(columns.min() - 80) < 8 and abs(columns.max() - 240) < 8
    rows, columns = np.nonzero(is_near(picture, GREEN))
    assert rows.min() < 5 and abs(rows.max() - 120) < 5  # label inside
    assert columns.max() > 795 and abs(columns.min() - 600) < 5


def test_nothing_found_leaves_the_image():
    image = cv2.randu(np.empty((300, 700, 3), np.uint8), 0, 256)
    for masks in (None, np.zeros((0, 300, 700), bool)):
        picture = draw_detection(image, np.zeros((0, 4)), [], [], [], masks)
        assert (picture == image).all()
