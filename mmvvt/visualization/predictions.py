"""A picture of what a model says of one image.

Everything is drawn at a size that can be read: see :func:`fit`.
"""

import colorsys
import math
from typing import Optional, Sequence, Tuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Colour = Tuple[int, int, int]

MIN_SIDE, MAX_SIDE = 640, 1600  # of a picture's long side, in pixels
DPI = 100
MIN_ROWS = 8  # of a legend beside a low image
FIRST, OTHER, TEXT, MUTED = '#0969da', '#a8b9cc', '#1f2328', '#656d76'


def fit(image: np.ndarray) -> np.ndarray:
    """Bring an image to a size at which names and lines can be read.

    A long side of more than 1600 pixels is shrunk to that; a short one is
    enlarged by the whole factor that brings it to 640 or more, so that its
    pixels stay what they are.

    Args:
        image (np.ndarray): ``(H, W)`` or ``(H, W, 3)``, uint8.

    Returns:
        np.ndarray: The image at its new size.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    if side > MAX_SIDE:
        size = (
            max(width * MAX_SIDE // side, 1),
            max(height * MAX_SIDE // side, 1),
        )
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    factor = math.ceil(MIN_SIDE / side)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _like(labels: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A label map or mask at the size of a picture, values unmixed."""
    height, width = picture.shape[:2]
    return cv2.resize(
        labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )


def distinct_colour(label: int) -> Colour:
    """A colour for a class that brings none.

    Args:
        label (int): The class.

    Returns:
        tuple[int, int, int]: RGB. Hues are a golden section apart, so that
        neighbours differ.
    """
    hue = label * 0.618034 % 1
    value = (0.95, 0.7)[label // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _figure(width: int, height: int) -> Figure:
    # A hundredth more: widths such as 7.68 inches must not round down.
    return Figure(((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)


def _pixels(figure: Figure) -> np.ndarray:
    """Draw a figure as ``(H, W, 3)``, uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _pixel_axis(figure: Figure, width: int, height: int):
    """An axis over the whole figure, in pixels from the upper left corner."""
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis('off')
    axis.patch.set_visible(False)
    return axis


def _points(picture: np.ndarray) -> float:
    """A font size that suits a picture's long side."""
    return max(picture.shape[:2]) / 68


def _fraction(colour: Colour) -> Tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)


def _shorten(name: str, length: int) -> str:
    if len(name) <= length:
        return name
    return name[: length - 1].rstrip(' ,') + '…'


# -- one for each task --------------------------------------------------------


def draw_classification(
    image: np.ndarray, names: Sequence[str], scores: Sequence[float]
) -> np.ndarray:
    """Draw an image beside a bar for each of its likeliest classes.

    Args:
        image (np.ndarray): ``(H, W, 3)``, uint8, RGB.
        names (Sequence[str]): Of the classes, the likeliest first.
        scores (Sequence[float]): Their probabilities.

    Returns:
        np.ndarray: ``(480, 960, 3)``, uint8, RGB.
    """
    figure = _figure(960, 480)
    axis = figure.add_axes((0.02, 0.04, 0.46, 0.92))
    axis.imshow(fit(image))
    axis.axis('off')

    axis = figure.add_axes((0.53, 0.08, 0.37, 0.84))
    places = np.arange(len(names))
    colours = [FIRST] + [OTHER] * (len(names) - 1)
    axis.barh(places, np.ones(len(names)), 0.3, color='#eef1f4')
    axis.barh(places, scores, 0.3, color=colours)
    for place, name, score in zip(places, names, scores):
        style = dict(
            color=TEXT,
            parse_math=False,
            fontsize=13,
            fontweight='normal' if place else 'bold',
        )
        axis.text(0, place - 0.24, _shorten(name, 36), va='bottom', **style)
        axis.text(1.03, place, f'{score:.1%}', va='center', **style)
    # Five rows, whatever the number of classes; the first one on top.
    axis.set(xlim=(0, 1), ylim=(4.5, -0.7))
    axis.axis('off')
    return _pixels(figure)


def draw_segmentation(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour],
    legend: Sequence[Tuple[int, str, float]],
) -> np.ndarray:
    """Colour an image by class, with a legend at its right.

    Args:
        image (np.ndarray): ``(H, W, 3)``, uint8, RGB.
        labels (np.ndarray): ``(H, W)``, a class a pixel.
        palette (Sequence[tuple[int, int, int]]): RGB by class.
        legend (Sequence[tuple[int, str, float]]): Label, name and share of
            the pixels of each class present, the largest first.

    Returns:
        np.ndarray: ``(H', W', 3)``, uint8, RGB: the image as :func:`fit`
        brings it, and the legend.
    """
    picture = fit(image)
    height, width = picture.shape[:2]
    labels = _like(labels.astype(np.uint16), picture)
    colours = np.asarray(palette, np.uint8)[labels]
    picture = cv2.addWeighted(picture, 0.45, colours, 0.55, 0)
    # A dark line where the class changes.
    edge = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3)))
    picture[edge > 0] //= 2

    points = _points(picture)
    line = round(points * DPI / 72 * 1.9)
    panel, rows = 15 * line, max(height // line - 1, MIN_ROWS)
    shown = [(name, share, palette[label]) for label, name, share in legend]
    if len(shown) > rows:
        rest = shown[rows - 1 :]
        total = sum(share for _, share, _ in rest)
        shown[rows - 1 :] = [(f'{len(rest)} more', total, None)]

    total_height = max(height, (len(shown) + 1) * line)
    figure = _figure(width + panel, total_height)
    figure.figimage(picture, 0, total_height - height, zorder=-1)
    axis = _pixel_axis(figure, width + panel, total_height)
    style = dict(va='center', fontsize=points, color=TEXT, parse_math=False)
    for row, (name, share, colour) in enumerate(shown):
        middle = (row + 1) * line
        if colour is not None:
            axis.add_patch(
                Rectangle(
                    (width + 0.6 * line, middle - 0.3 * line),
                    0.6 * line,
                    0.6 * line,
                    facecolor=_fraction(colour),
                    edgecolor=MUTED,
                    linewidth=points / 15,
                )
            )
        axis.text(width + 1.6 * line, middle, _shorten(name, 22), **style)
        axis.text(
            width + panel - 0.6 * line,
            middle,
            f'{share:.1%}',
            ha='right',
            **style,
        )
    return _pixels(figure)


def draw_detection(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: Optional[Sequence[float]],
    colours: Sequence[Colour],
    masks: Optional[np.ndarray] = None,
    text_scale: float = 1.0,
) -> np.ndarray:
    """Draw boxes, and masks if there are any, with names and scores.

    Args:
        image (np.ndarray): ``(H, W, 3)``, uint8, RGB.
        boxes (np.ndarray): ``(n, 4)``: left, top, right, bottom, in pixels.
        names (Sequence[str]): Class of each box.
        scores (Sequence[float], optional): Score of each, the highest first:
            the first box is drawn on top. None for ground truth.
        colours (Sequence[tuple[int, int, int]]): RGB of each.
        masks (np.ndarray, optional): Boolean ``(n, H, W)``. Defaults to None.
        text_scale (float): Factor of the size of names, scores and lines, for
            a picture that will be shown smaller. Defaults to 1.

    Returns:
        np.ndarray: ``(H', W', 3)``, uint8, RGB, at the size of :func:`fit`.
    """
    picture = np.ascontiguousarray(fit(image))
    height, width = picture.shape[:2]
    points = text_scale * _points(picture)
    stroke = max(round(points / 5), 1)
    for mask, colour in reversed(
        list(zip([] if masks is None else masks, colours))
    ):
        mask = _like(mask.astype(np.uint8), picture)
        inside = mask > 0
        picture[inside] = (
            0.55 * picture[inside] + 0.45 * np.array(colour)
        ).astype(np.uint8)
        outlines, _ = cv2.findContours(
            mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(picture, outlines, -1, colour, stroke, cv2.LINE_AA)

    figure = _figure(width, height)
    figure.figimage(picture, zorder=-1)
    axis = _pixel_axis(figure, width, height)
    renderer = FigureCanvasAgg(figure).get_renderer()
    scale = np.tile([width / image.shape[1], height / image.shape[0]], 2)
    for i in reversed(range(len(names))):
        left, top, right, bottom = np.asarray(boxes[i]) * scale
        colour = _fraction(colours[i])
        axis.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colour,
                linewidth=points / 6,
            )
        )
        # Rec. 601 weights: black on what the eye sees as bright
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 0.55
        text = _shorten(names[i], 24)
        if scores is not None:
            text += f' {scores[i]:.2f}'
        tag = axis.text(
            left,
            top,
            text,
            va='bottom',
            parse_math=False,
            fontsize=points,
            color='black' if bright else 'white',
            bbox=dict(facecolor=colour, edgecolor='none', pad=points / 8),
        )
        # Moved inside where it would leave the picture.
        extent = tag.get_window_extent(renderer)
        tag.set_position(
            (max(min(left, width - extent.width), 0), max(top, extent.height))
        )
    return _pixels(figure)
