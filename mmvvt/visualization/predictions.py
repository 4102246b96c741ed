"""Visualization of the predictions for one image.

Images are resized before drawing so that text is legible, see :func:`fit`.
"""

import colorsys
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Colour = Tuple[int, int, int]

MIN_SIDE, MAX_SIDE = 640, 1600  # limits of the long side, in pixels
DPI = 100
MIN_ROWS = 8  # minimum number of rows of a legend
FIRST, OTHER, TEXT, MUTED = '#0969da', '#a8b9cc', '#1f2328', '#656d76'


def fit(image: np.ndarray) -> np.ndarray:
    """Resize an image so that text and lines drawn on it are legible.

    An image whose long side exceeds 1600 pixels is downsampled to 1600
    pixels. An image whose long side is below 640 pixels is enlarged by the
    smallest integer factor that reaches 640 pixels, by repeating pixels.

    Args:
        image (np.ndarray): Image of shape ``(H, W)`` or ``(H, W, 3)``, uint8.

    Returns:
        np.ndarray: The resized image.
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
    """Resize a label map or mask to a picture, by nearest neighbour."""
    height, width = picture.shape[:2]
    return cv2.resize(
        labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )


def distinct_colour(label: int) -> Colour:
    """Return a colour for a class that has none in the palette.

    Args:
        label (int): Class index.

    Returns:
        tuple[int, int, int]: RGB colour. Hues are spaced by the golden ratio,
        so that consecutive classes have clearly different colours.
    """
    hue = label * 0.618034 % 1
    value = (0.95, 0.7)[label // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _figure(width: int, height: int) -> Figure:
    # Add 0.01 pixel: the size in inches must not be rounded down.
    return Figure(((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)


def _pixels(figure: Figure) -> np.ndarray:
    """Render a figure as an RGB array of shape ``(H, W, 3)``, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _pixel_axis(figure: Figure, width: int, height: int):
    """Add axes that cover the figure, in pixels from the upper left."""
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis('off')
    axis.patch.set_visible(False)
    return axis


def _points(picture: np.ndarray) -> float:
    """Font size in points, proportional to the long side."""
    return max(picture.shape[:2]) / 68


def _fraction(colour: Colour) -> Tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)


def shorten(name: str, length: int) -> str:
    """Shorten a name for a picture.

    Args:
        name (str): The name.
        length (int): Maximum number of characters.

    Returns:
        str: The name; a longer one ends with an ellipsis.
    """
    if len(name) <= length:
        return name
    return name[: length - 1].rstrip(' ,') + '…'


# -- one function for each task -----------------------------------------------


def draw_classification(
    image: np.ndarray, names: Sequence[str], scores: Sequence[float]
) -> np.ndarray:
    """Draw an image and a bar chart of its top class scores.

    Args:
        image (np.ndarray): RGB image of shape ``(H, W, 3)``, uint8.
        names (Sequence[str]): Class names in descending order of score.
        scores (Sequence[float]): Probabilities of the classes.

    Returns:
        np.ndarray: RGB image of shape ``(480, 960, 3)``, uint8.
    """
    figure = _figure(960, 480)
    axis = figure.add_axes((0.02, 0.04, 0.46, 0.92))
    axis.imshow(fit(image))
    axis.axis('off')

    axis = figure.add_axes((0.53, 0.08, 0.37, 0.84))
    places = range(len(names))
    colours = [FIRST] + [OTHER] * (len(names) - 1)
    axis.barh(places, np.ones(len(names)), 0.3, color='#eef1f4')
    axis.barh(places, scores, 0.3, color=colours)
    for place, name, score in zip(places, names, scores):
        style: Dict[str, Any] = dict(
            color=TEXT,
            parse_math=False,
            fontsize=13,
            fontweight='normal' if place else 'bold',
        )
        axis.text(0, place - 0.24, shorten(name, 36), va='bottom', **style)
        axis.text(1.03, place, f'{score:.1%}', va='center', **style)
    # Always leave room for five rows; the first row is at the top.
    axis.set(xlim=(0, 1), ylim=(4.5, -0.7))
    axis.axis('off')
    return _pixels(figure)


def draw_segmentation(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour],
    legend: Sequence[Tuple[int, str, float]],
) -> np.ndarray:
    """Overlay a segmentation map on an image, with a legend on the right.

    Args:
        image (np.ndarray): RGB image of shape ``(H, W, 3)``, uint8.
        labels (np.ndarray): Segmentation map of shape ``(H, W)``: the class
            index of each pixel.
        palette (Sequence[tuple[int, int, int]]): RGB colour of each class.
        legend (Sequence[tuple[int, str, float]]): Class index, name and
            fraction of the pixels of each class in the map, in descending
            order of the fraction.

    Returns:
        np.ndarray: RGB image of shape ``(H', W', 3)``, uint8: the image
        resized by :func:`fit`, and the legend.
    """
    picture = fit(image)
    height, width = picture.shape[:2]
    labels = _like(labels.astype(np.uint16), picture)
    colours = np.asarray(palette, np.uint8)[labels]
    picture = cv2.addWeighted(picture, 0.45, colours, 0.55, 0)
    # Darken the boundaries between classes.
    edge = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3)))
    picture[edge > 0] //= 2

    points = _points(picture)
    line = round(points * DPI / 72 * 1.9)
    panel, rows = 15 * line, max(height // line - 1, MIN_ROWS)
    shown: List[Tuple[str, float, Optional[Colour]]] = [
        (name, share, palette[label]) for label, name, share in legend
    ]
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
        axis.text(width + 1.6 * line, middle, shorten(name, 22), **style)
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
    """Draw bounding boxes and optional masks with class names and scores.

    Args:
        image (np.ndarray): RGB image of shape ``(H, W, 3)``, uint8.
        boxes (np.ndarray): Boxes of shape ``(n, 4)`` as (left, top, right,
            bottom), in pixels.
        names (Sequence[str]): Class name of each box.
        scores (Sequence[float], optional): Scores in descending order; the
            first box is drawn on top. None for ground truth.
        colours (Sequence[tuple[int, int, int]]): RGB colour of each box.
        masks (np.ndarray, optional): Boolean masks of shape ``(n, H, W)``.
            Defaults to None.
        text_scale (float): Scale factor of text and line width, for images
            that are displayed at a reduced size. Defaults to 1.

    Returns:
        np.ndarray: RGB image of shape ``(H', W', 3)``, uint8, resized by
        :func:`fit`.
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
        # Black text on bright colours, by the luma of Rec. 601.
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 0.55
        text = shorten(names[i], 24)
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
        # Keep the text inside the picture.
        extent = tag.get_window_extent(renderer)
        tag.set_position(
            (max(min(left, width - extent.width), 0), max(top, extent.height))
        )
    return _pixels(figure)
