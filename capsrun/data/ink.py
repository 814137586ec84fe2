"""Tells ink from paper in a photograph or a drawing, and makes of it a digit as MNIST's were made.

Shapes: C channels, H and W pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, spatial
from torch.nn import functional as F

Pixels = NDArray[np.float32]
"""From 0 to 255; of ink, its share from 0 to 1."""

# As small as a picture is looked at for its sheet of paper, and for the shade of it.
SHEET_PX, SHADE_PX = 160, 32
# Of the picture's area.
LEAST_SHEET = 0.2
# The darkness of ink, as a share of the shade of its paper: what is paler is grain or shade.
LEAST_CONTRAST = 0.12
# Of the darkness of the lines of ruled paper, which leave something behind when taken away.
LEAST_OF_LINES = 0.6
# As many times as dark as a line: ink that covers it.
OVER_LINES = 1.6
# The share of ink that is not where a line was.
LEAST_BESIDE_LINES = 0.25
# How often the usual deviation of the paper from its shade: what differs less is its grain.
LEAST_DEVIATIONS = 7
# Of 255: noise would be a large share of darker paper under dark ink, of lighter under light ink.
DARKEST_PAPER, LIGHTEST_PAPER = 40, 127
# Of the longest side of the picture: what is shorter is a speck.
LEAST_LENGTH = 0.02
# Fewer parallel lines from side to side may be ink; paper lies no steeper.
LEAST_LINES, STEEPEST_DEG = 4, 14
# MNIST was made of ink and no ink: of its usual darkness, where one passes into the other.
NO_INK, INK = 0.35, 0.65
# Of the largest piece of ink: a smaller one is dirt.
LEAST_PIECE = 0.04
# The same of ink that does not reach the edge of the picture, as a table or a shadow does.
LEAST_INNER = 0.3
# In pixels of 20: lines of MNIST's digits are as wide, thinner ones are widened, thicker thinned.
NARROWEST, WIDEST = 2.0, 4.5


def ink_of(pixels_HWC: Pixels, dark: bool | None) -> tuple[Pixels, bool, bool] | None:
    """The share of ink (H, W) on paper of any shade; whether it is dark, and on a cut-out sheet.

    dark: whether the ink is darker than its paper; None finds it out. Returns None where there is
    no such ink: nothing but grain, shade, the edge of a table, and lines of ruled paper.
    """
    grey_HW = _contrasted(pixels_HWC)
    sheet_HW = _sheet(grey_HW)
    on_sheet = sheet_HW is not None
    if sheet_HW is not None:
        grey_HW = sheet_HW
    shade_HW = _shade(grey_HW)
    as_dark = grey_HW, shade_HW, DARKEST_PAPER
    as_light = 255 - grey_HW, 255 - shade_HW, 255 - LIGHTEST_PAPER
    darkest, lightest = (float(_darker(*each).max()) for each in (as_dark, as_light))
    if dark is None and abs(darkest - lightest) > 0.2:
        dark = darkest > lightest
    elif dark is None:  # paper between lines of ink may stand out as much, but there is less of it
        darker_HW = shade_HW - grey_HW
        dark = bool((darker_HW * np.abs(darker_HW)).sum() > 0)
    if (darkest if dark else lightest) < LEAST_CONTRAST:
        return None
    turned_HW, _, least_paper = as_dark if dark else as_light
    ink_HW = _pieces_on_paper(turned_HW, least_paper)
    return None if ink_HW is None else (ink_HW, dark, on_sheet)


def as_digit(ink_HW: Pixels, side_px: int, longest_px: int) -> Pixels:
    """Ink as a digit of MNIST (side_px, side_px): cropped, resized, centred by its mass."""
    ink_HW = ink_HW[ndimage.find_objects((ink_HW > 0.5).astype(int))[0]]
    ink_HW = _usual_width(ink_HW, longest_px)
    scale = longest_px / max(ink_HW.shape)
    height, width = (max(1, round(scale * length)) for length in ink_HW.shape)
    digit_HW = resized(torch.from_numpy(ink_HW)[None], height, width)[0].clamp(0, 1).numpy()
    top, left = (
        min(max(round(side_px / 2 - centre - 0.5), 0), side_px - length)
        for centre, length in zip(ndimage.center_of_mass(digit_HW), digit_HW.shape)
    )
    canvas_HW = np.zeros((side_px, side_px), np.float32)
    canvas_HW[top : top + height, left : left + width] = digit_HW
    return canvas_HW


def resized(pixels_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """With antialiasing."""
    size = (height, width)
    return F.interpolate(pixels_CHW[None], size=size, mode="bilinear", antialias=True)[0]


def _contrasted(pixels_HWC: Pixels) -> Pixels:
    """Grey, or the one of its colours in which the picture has much more contrast."""
    grey_HW = pixels_HWC @ np.array([0.299, 0.587, 0.114], np.float32)
    smooth = [
        ndimage.gaussian_filter(values, 1) for values in (grey_HW, *np.moveaxis(pixels_HWC, 2, 0))
    ]
    contrasts = [np.abs(values - _shade(values)).max() for values in smooth]
    best = int(np.argmax(contrasts))
    return smooth[best] if contrasts[best] > 1.5 * contrasts[0] else smooth[0]


def _small(pixels_HW: Pixels, longest_px: int) -> Pixels:
    scale = min(1, longest_px / max(pixels_HW.shape))
    height, width = (max(1, round(scale * length)) for length in pixels_HW.shape)
    return resized(torch.from_numpy(pixels_HW)[None], height, width)[0].numpy()


def _large(small_HW: Pixels, shape: tuple[int, ...]) -> Pixels:
    return resized(torch.from_numpy(small_HW)[None], *shape)[0].numpy()


def _shade(pixels_HW: Pixels) -> Pixels:
    """That of the paper around each place, of which more is paper than ink."""
    small_HW = _small(pixels_HW, SHADE_PX)
    window_px = 1 + max(small_HW.shape) // 2
    return _large(ndimage.median_filter(small_HW, window_px, mode="nearest"), pixels_HW.shape)


def _sheet(grey_HW: Pixels) -> Pixels | None:
    """The picture with its sheet of paper continued over the table it lies on; None without one."""
    small_HW = _small(grey_HW, SHEET_PX)
    # A shadow over a part of the sheet may be as dark as the table somewhere else.
    darkest, lightest = np.quantile(small_HW, (0.02, 0.98))
    levels = np.linspace(darkest, lightest, 12)[1:-1]
    found = [
        _inside(small_HW, mask_HW)
        for level in levels
        for mask_HW in (small_HW > level, small_HW < level)
    ]
    likeness, inside_HW = max(found, key=lambda each: each[0])
    if likeness == 0:
        return None
    is_sheet_HW = _large(inside_HW, grey_HW.shape) > 0.99
    nearest = ndimage.distance_transform_edt(
        ~is_sheet_HW, return_distances=False, return_indices=True
    )
    rows, columns = ndimage.find_objects(is_sheet_HW.astype(int))[0]
    return grey_HW[tuple(nearest)][rows, columns]


def _inside(small_HW: Pixels, mask_HW: NDArray[np.bool_]) -> tuple[float, Pixels]:
    """How much like a sheet of paper the mask is, 0 where not at all; 1 inside of it (H, W).

    A sheet is a convex figure that nearly fills a rectangle, has a sharp edge, and ink on it.
    """
    nothing = 0.0, small_HW
    labels_HW, count = ndimage.label(ndimage.binary_opening(mask_HW, iterations=2))
    areas = np.bincount(labels_HW.ravel(), minlength=2)[1:]
    if count == 0 or areas.max() < LEAST_SHEET * mask_HW.size:
        return nothing
    piece_HW = labels_HW == 1 + areas.argmax()
    points = np.argwhere(piece_HW)
    # What reaches three of the picture's edges may be the side of a shadow.
    borders = piece_HW[0], piece_HW[-1], piece_HW[:, 0], piece_HW[:, -1]
    if sum(border.any() for border in borders) > 2 or min(np.ptp(points, axis=0)) < 8:
        return nothing
    hull = spatial.ConvexHull(points)
    edges = np.diff(points[[*hull.vertices, hull.vertices[0]]], axis=0)
    angles = np.arctan2(edges[:, 0], edges[:, 1])
    corners = points[hull.vertices]
    sides = [
        (np.ptp(corners @ [np.cos(a), -np.sin(a)]), np.ptp(corners @ [np.sin(a), np.cos(a)]))
        for a in angles
    ]
    rectangle = min(sides, key=np.prod)
    places = np.moveaxis(np.indices(small_HW.shape), 0, -1)
    depth_HW = -(places @ hull.equations[:, :2].T + hull.equations[:, 2]).max(-1)
    around_HW = depth_HW < -1
    if around_HW.mean() < 0.03 or max(rectangle) > 3 * min(rectangle):
        return nothing
    fullness, covered = hull.volume / np.prod(rectangle), areas.max() / hull.volume
    inner, outer = ((depth_HW > 1) & (depth_HW < 4)), ((depth_HW < -1) & (depth_HW > -4))
    rim = piece_HW[inner].mean()
    if fullness < 0.85 or covered < 0.7 or rim < 0.8:
        return nothing
    shade, table = np.median(small_HW[piece_HW]), np.median(small_HW[around_HW])
    edge = abs(np.median(small_HW[inner]) - np.median(small_HW[outer]))
    if edge < 0.65 * abs(shade - table) or abs(shade - table) < 0.25 * max(shade, table):
        return nothing
    differences = np.abs(small_HW[depth_HW > 3] - shade)
    if differences.size == 0 or differences.max() < 0.15 * abs(shade - table):
        return nothing
    likeness = hull.volume * float(fullness * covered * rim) ** 4
    return likeness, (depth_HW > 2).astype(np.float32)


def _pieces_on_paper(grey_HW: Pixels, least_paper: float) -> Pixels | None:
    """The share of ink that is darker than its paper, of any shade, with ruled lines or without."""
    window_px = 1 + max(grey_HW.shape) // 3
    darkness_HW, paper_HW = _darkness(grey_HW, window_px, least_paper)
    ruled_HW = np.maximum(_ruled(darkness_HW), _ruled(darkness_HW.T).T)
    least = max(LEAST_CONTRAST, LEAST_OF_LINES * float(ruled_HW.max()))
    # What is much darker than a line is ink over it; else there is ink if there is on both sides.
    is_line_HW = (ruled_HW > 0) & (darkness_HW < OVER_LINES * ruled_HW)
    ink_HW = _pieces(np.where(is_line_HW, darkness_HW.clip(max=0), darkness_HW), least)
    if ink_HW is None:
        return None
    # Once more with a window that is just wider than the lines of the ink, and follows shadows.
    window_px = min(window_px, 5 + round(3 * _line_width(ink_HW > 0.5)))
    darkness_HW, _ = _darkness(np.where(is_line_HW, paper_HW, grey_HW), window_px, least_paper)
    bridged_HW = ndimage.grey_closing(darkness_HW, size=(9, 9))
    ink_HW = _pieces(np.where(is_line_HW, bridged_HW, darkness_HW), least)
    if ink_HW is None or ink_HW[ruled_HW == 0].sum() < LEAST_BESIDE_LINES * ink_HW.sum():
        return None
    return ink_HW


def _darkness(grey_HW: Pixels, window_px: int, least_paper: float) -> tuple[Pixels, Pixels]:
    """How much darker each place is than its paper, as a share of the paper's shade; the shade."""
    paper_HW = ndimage.grey_closing(grey_HW, size=(window_px, window_px), mode="nearest")
    darkness_HW = _darker(grey_HW, paper_HW, least_paper)
    return darkness_HW - np.median(darkness_HW), paper_HW


def _darker(grey_HW: Pixels, paper_HW: Pixels, least_paper: float) -> Pixels:
    return (paper_HW - grey_HW) / paper_HW.clip(min=least_paper)


def _ruled(darkness_HW: Pixels) -> Pixels:
    """The darkness of the lines of ruled paper, from the left to the right; 0 elsewhere."""
    height, width = darkness_HW.shape
    nothing = np.zeros_like(darkness_HW)
    if min(height, width) < 8 * LEAST_LINES:
        return nothing

    def along(slope: float, columns: NDArray[np.int_], beyond: int = 0) -> Pixels:
        rows = np.arange(-beyond, height + beyond)[:, None]
        rows = rows + np.round(slope * (columns - width // 2)).astype(int)
        values = darkness_HW[rows.clip(0, height - 1), columns]
        return np.where((rows >= 0) & (rows < height), values, np.nan) if beyond else values

    # The slope at which the lines are sharpest, first roughly.
    few = np.linspace(0, width - 1, 48).astype(int)
    slope = 0.0
    for reach_deg, step_deg in ((STEEPEST_DEG, 0.4), (0.4, 0.1)):
        angles_deg = np.rad2deg(np.arctan(slope)) + np.arange(-reach_deg, reach_deg, step_deg)
        slopes = np.tan(np.deg2rad(angles_deg))
        profiles = [along(each, few).clip(-0.3, 0.3).mean(1) for each in slopes]
        slope = float(slopes[np.argmax([np.diff(profile).std() for profile in profiles])])

    # What most of a line has, as far as it is in the picture.
    beyond = 1 + int(abs(slope) * width / 2)
    sorted_HW = np.sort(along(slope, np.arange(0, width, 2), beyond), axis=1)
    place_H = (0.4 * np.isfinite(sorted_HW).sum(1)).astype(int)
    profile_H = np.nan_to_num(np.take_along_axis(sorted_HW, place_H[:, None], 1)[:, 0])
    profile_H -= ndimage.grey_opening(profile_H, size=1 + max(6, height // 50))
    lines_H = profile_H > max(0.03, 6 * np.median(np.abs(profile_H)))
    if ndimage.label(lines_H)[1] < LEAST_LINES:
        return nothing
    strength_H = ndimage.maximum_filter1d(np.where(lines_H, profile_H, 0), 5)
    rows = np.arange(height)[:, None] - np.round(slope * (np.arange(width) - width // 2)).astype(
        int
    )
    return strength_H[(rows + beyond).clip(0, len(strength_H) - 1)].astype(np.float32)


def _line_width(ink_HW: NDArray[np.bool_]) -> float:
    """In pixels: in a line of this width the mean distance to its edge is a quarter of it."""
    return (
        4 * float(ndimage.distance_transform_edt(np.pad(ink_HW, 1))[1:-1, 1:-1][ink_HW].mean()) - 1
    )


def _pieces(darkness_HW: Pixels, least: float) -> Pixels | None:
    """The share of ink, without specks; None where there is none."""
    level = np.median(darkness_HW[darkness_HW >= 0.45 * darkness_HW.max()])
    usual = 1.4826 * np.median(np.abs(darkness_HW))
    if level < max(least, LEAST_DEVIATIONS * usual):
        return None
    ink_HW = ((darkness_HW / level - NO_INK) / (INK - NO_INK)).clip(0, 1)
    labels_HW, count = ndimage.label(ink_HW > 0.5, np.ones((3, 3)))
    sums = ndimage.sum_labels(ink_HW, labels_HW, np.arange(count + 1))
    sums[0] = 0
    inner = np.where(_at_edge(labels_HW, 0), 0, sums)
    if inner.max() > LEAST_INNER * sums.max():
        sums = inner
    else:
        sums = np.where(_at_edge(labels_HW, 0.7), 0, sums)
    keep = sums > LEAST_PIECE * sums.max()
    if not keep.any():
        return None
    kept_HW = keep[labels_HW]
    rows, columns = ndimage.find_objects(kept_HW.astype(int))[0]
    if max(rows.stop - rows.start, columns.stop - columns.start) < LEAST_LENGTH * max(ink_HW.shape):
        return None
    return (ink_HW * ndimage.binary_dilation(kept_HW, iterations=2)).astype(np.float32)


def _at_edge(labels_HW: NDArray[np.int_], share: float) -> NDArray[np.bool_]:
    """Which pieces (by label) reach the picture's edge along more than a share of their length.

    So do the table beside a sheet, shadows and frames; an image that is cut tightly is none.
    """
    edges = labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]
    boxes = ndimage.find_objects(labels_HW)
    touching = np.bincount(np.concatenate(edges), minlength=1 + len(boxes))
    lengths = [[side.stop - side.start for side in box] for box in boxes]
    longest = np.array([0, *map(max, lengths)])
    is_tight = np.array([False, *(min(np.divide(box, labels_HW.shape)) > 0.6 for box in lengths)])
    is_frame = touching > 2.5 * longest
    return (touching > share * longest) & (is_frame | ~is_tight)


def _usual_width(ink_HW: Pixels, longest_px: int) -> Pixels:
    """With lines as wide as MNIST's, where they are much thinner or thicker."""
    unit_px = max(ink_HW.shape) / longest_px
    width = _line_width(ink_HW > 0.5) / unit_px
    grown_px = (np.clip(width, NARROWEST, WIDEST) - width) / 2 * unit_px
    if abs(grown_px) < 0.5:
        return ink_HW
    padded_HW = np.pad(ink_HW > 0.5, int(max(0, grown_px)) + 2)
    depth_HW = ndimage.distance_transform_edt(padded_HW) - ndimage.distance_transform_edt(
        ~padded_HW
    )
    return (depth_HW + grown_px + 0.5).clip(0, 1).astype(np.float32)
