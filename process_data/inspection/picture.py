"""The picture of an inspected capture: cameras from above and from the side, photographs with overlays."""

import textwrap

import cv2
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from process_data.inspection.measure import Inspection, Residuals, frustum, frustum_size
from utils.lens import project
from utils.types import Scene

Color = tuple[int, int, int]

TRAINING: Color = (31, 95, 191)
HELD_OUT: Color = (235, 120, 20)
SPHERE: Color = (0, 160, 150)
AXES: tuple[Color, ...] = ((214, 48, 49), (38, 160, 65), (41, 98, 255))
_MASK: Color = (255, 214, 10)
_INK: Color = (32, 36, 42)
_FAINT: Color = (120, 128, 138)
_WARNING: Color = (196, 30, 30)
_GOOD: Color = (20, 130, 60)
_PAPER: Color = (255, 255, 255)
_PANEL: Color = (246, 247, 249)

_WIDTH, _MARGIN = 1800, 24
_DETAIL = 2
"""Everything is drawn this many times as large and averaged down, which smooths lines."""
_MAP_SIZE = 610
_ERROR_STEPS: tuple[tuple[float, Color], ...] = (
    (2.0, (46, 204, 64)),
    (5.0, (255, 200, 0)),
    (np.inf, (255, 48, 48)),
)
"""Reprojection errors in pixels of an 800-pixel picture up to which a colour stands for."""


class _Canvas:
    """A picture in the making, in units of the finished picture's pixels."""

    def __init__(self, width: int, height: int, color: Color = _PAPER) -> None:
        self.image = Image.new("RGB", (width * _DETAIL, height * _DETAIL), color)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Float64[np.ndarray, "K 2"], color: Color, width: int | float = 1) -> None:
        if np.isfinite(points).all():
            flat = [tuple(point) for point in (points * _DETAIL).tolist()]
            self.draw.line(flat, color, max(1, round(width * _DETAIL)), joint="curve")

    def ring(
        self, at: Float64[np.ndarray, " 2"], radius: int | float, color: Color, width: int | float = 1
    ) -> None:
        self.draw.ellipse(self._box(at, radius), outline=color, width=max(1, round(width * _DETAIL)))

    def disc(self, at: Float64[np.ndarray, " 2"], radius: int | float, color: Color) -> None:
        self.draw.ellipse(self._box(at, radius), fill=color)

    def text(
        self,
        at: tuple[int | float, int | float],
        text: str,
        color: Color = _INK,
        size: int | float = 16,
        anchor: str = "la",
    ) -> None:
        font = ImageFont.load_default(size * _DETAIL)
        self.draw.text((at[0] * _DETAIL, at[1] * _DETAIL), text, color, font, anchor=anchor)

    def label(self, at: Float64[np.ndarray, " 2"], text: str, color: Color, size: int | float = 15) -> None:
        """Text with a white outline, legible on anything."""
        font = ImageFont.load_default(size * _DETAIL)
        self.draw.text(
            (at[0] * _DETAIL, at[1] * _DETAIL),
            text,
            color,
            font,
            "mm",
            stroke_width=2 * _DETAIL,
            stroke_fill=_PAPER,
        )

    def paste(self, picture: UInt8[np.ndarray, "H W 3"], left: int, top: int) -> None:
        """Put in a picture that is already at the detailed size."""
        self.image.paste(Image.fromarray(picture), (left * _DETAIL, top * _DETAIL))

    def put(self, other: "_Canvas", left: int, top: int) -> None:
        self.image.paste(other.image, (left * _DETAIL, top * _DETAIL))

    def finished(self) -> UInt8[np.ndarray, "H W 3"]:
        return np.array(self.image.reduce(_DETAIL))

    @staticmethod
    def _box(at: Float64[np.ndarray, " 2"], radius: int | float) -> list[float]:
        low, high = (at - radius) * _DETAIL, (at + radius) * _DETAIL
        return [*low.tolist(), *high.tolist()]


def draw_inspection(inspection: Inspection) -> UInt8[np.ndarray, "H W 3"]:
    """Draw the overview: two maps and the findings above, photographs with overlays below."""
    scene = inspection.scene
    photos = [_photo(inspection, view) for view in inspection.shown]
    aspects = [photo.image.width / photo.image.height for photo in photos]
    maps_top = 2 * _MARGIN + 30
    photos_top = maps_top + _MAP_SIZE + _MARGIN
    rows, height = _arrange(photos, 6 if float(np.median(aspects)) < 0.8 else 3)
    canvas = _Canvas(_WIDTH, photos_top + height + 64)
    canvas.text((_MARGIN, _MARGIN - 4), scene.name, size=30)
    canvas.text(
        (_WIDTH - _MARGIN, _MARGIN + 6),
        "scene frame: the unit sphere is what will be trained",
        _FAINT,
        16,
        "ra",
    )

    horizontal, across, up = _map_axes(inspection)
    canvas.put(_map(inspection, np.stack([horizontal, across]), "from above"), _MARGIN, maps_top)
    side = _map(inspection, np.stack([horizontal, up]), "from the side")
    canvas.put(side, 2 * _MARGIN + _MAP_SIZE, maps_top)
    _findings(canvas, inspection, 3 * _MARGIN + 2 * _MAP_SIZE, maps_top)

    for photo, (left, top) in zip(photos, rows, strict=True):
        canvas.put(photo, left, photos_top + top)
    _legend(canvas, photos_top + height + 16, inspection)
    return canvas.finished()


# ----------------------------------------------------------------------------------------------------------
# maps


def _map_axes(
    inspection: Inspection,
) -> tuple[Float64[np.ndarray, " 3"], Float64[np.ndarray, " 3"], Float64[np.ndarray, " 3"]]:
    """Right, away and up for the maps: up as the cameras have it, right along the levelest scene axis."""
    up = inspection.up
    axis = np.eye(3)[np.argmin(np.abs(up))]
    right = axis - (axis @ up) * up
    right /= np.linalg.norm(right)
    return right, np.cross(up, right), up


def _map(inspection: Inspection, axes: Float64[np.ndarray, "2 3"], title: str) -> _Canvas:
    """An orthographic picture of cameras, points and sphere; ``axes`` point right and up on it."""
    scene = inspection.scene
    canvas = _Canvas(_MAP_SIZE, _MAP_SIZE, _PANEL)
    centers = scene.cameras.c2w[:, :, 3].double().numpy()
    length = frustum_size(scene)
    reach = 1.08 * max(1.05, float(np.abs(centers @ axes.T).max()) + length)
    zoom = _MAP_SIZE / 2 / reach

    def place(positions: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 2"]:
        flat = positions @ axes.T
        return _MAP_SIZE / 2 + zoom * np.stack([flat[:, 0], -flat[:, 1]], axis=1)

    _scatter(canvas, place(inspection.points), inspection.point_colors)
    middle = np.full(2, _MAP_SIZE / 2)
    canvas.ring(middle, zoom, SPHERE, 2)
    held_out = set(scene.test_indices)
    for view in range(len(scene.cameras)):
        color = HELD_OUT if view in held_out else TRAINING
        corners = place(frustum(scene, view, length))
        for corner in corners[1:]:
            canvas.line(np.stack([corners[0], corner]), color, 1)
        canvas.line(corners[[1, 2, 3, 4, 1]], color, 1.5)
    for row, (name, color) in enumerate(zip("xyz", AXES, strict=True)):
        tip = place(0.6 * np.eye(3)[row : row + 1])[0]
        # An axis that points at the viewer has no length here.
        if np.linalg.norm(tip - middle) > 10:
            canvas.line(np.stack([middle, tip]), color, 3)
            canvas.label(tip + 12 * (tip - middle) / np.linalg.norm(tip - middle), name, color)
    last = len(centers) - 1
    for view in dict.fromkeys((0, last)):
        at = place(centers[view : view + 1])[0]
        away = (at - middle) / max(1e-9, float(np.linalg.norm(at - middle)))
        canvas.disc(at, 3.5, _INK)
        canvas.label(np.clip(at + 15 * away, 12, _MAP_SIZE - 12), str(view), _INK, 16)
    canvas.text((14, 10), title, size=18)
    if title == "from the side":
        canvas.line(np.array([[_MAP_SIZE - 28.0, 60.0], [_MAP_SIZE - 28.0, 22.0]]), _INK, 2)
        tip_at = _MAP_SIZE - 28.0
        canvas.line(np.array([[tip_at - 6, 31.0], [tip_at, 21.0], [tip_at + 6, 31.0]]), _INK, 2)
        canvas.text((tip_at, 64), "up", size=15, anchor="ma")
    return canvas


def _scatter(canvas: _Canvas, places: Float64[np.ndarray, "P 2"], colors: UInt8[np.ndarray, "P 3"]) -> None:
    """Draw points as dots, in bulk."""
    pixels = np.array(canvas.image)
    height, width = pixels.shape[:2]
    size = 6 if len(places) < 3000 else 3 if len(places) < 20000 else 2
    corner = np.nan_to_num(places * _DETAIL - size / 2, nan=-1e6).clip(-1e6, 1e6).astype(np.int64)
    inside = (corner >= 0).all(axis=1) & (corner[:, 0] < width - size) & (corner[:, 1] < height - size)
    for row in range(size):
        for column in range(size):
            pixels[corner[inside, 1] + row, corner[inside, 0] + column] = colors[inside]
    canvas.image.paste(Image.fromarray(pixels))


# ----------------------------------------------------------------------------------------------------------
# photographs


def _arrange(photos: list[_Canvas], columns: int) -> tuple[list[tuple[int, int]], int]:
    """Corners of the photographs in rows, and the height of all."""
    columns = min(columns, len(photos)) if len(photos) > 2 else 3
    step = (_WIDTH - _MARGIN) // columns
    corners, top = [], 0
    for start in range(0, len(photos), columns):
        row = photos[start : start + columns]
        tallest = max(photo.image.height for photo in row) // _DETAIL
        corners += [(_MARGIN + column * step, top) for column in range(len(row))]
        top += tallest + _MARGIN
    return corners, top


def _photo(inspection: Inspection, view: int) -> _Canvas:
    """One photograph with what should lie on it."""
    scene = inspection.scene
    width, height = scene.cameras.size[view].tolist()
    column = (_WIDTH - _MARGIN) // (6 if width < 0.8 * height else 3) - _MARGIN
    zoom = min(column / width, 640 / height)
    shown = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    canvas = _Canvas(shown[0], shown[1] + 30)
    method = cv2.INTER_AREA if zoom * _DETAIL < 1 else cv2.INTER_CUBIC
    picture = scene.images.image(view).numpy()
    canvas.paste(cv2.resize(picture, (shown[0] * _DETAIL, shown[1] * _DETAIL), interpolation=method), 0, 0)
    if scene.masks is not None:
        mask = cv2.resize(scene.masks.image(view).numpy(), (shown[0] * _DETAIL, shown[1] * _DETAIL))
        outlines, _ = cv2.findContours((mask >= 128).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        for outline in outlines:
            closed = np.concatenate([outline[:, 0], outline[:1, 0]]).astype(np.float64) / _DETAIL
            canvas.line(closed, _MASK, 1.5)
    _draw_sphere(canvas, scene, view, zoom)
    if scene.points is not None:
        _draw_points(canvas, scene, view, zoom)
    residuals = inspection.residuals.get(view)
    if residuals is not None:
        _draw_residuals(canvas, residuals, zoom, 800 / max(width, height))
    _draw_axes(canvas, scene, view, zoom)
    # Overlays may run over the picture's edge; the caption's strip is cleared of them.
    canvas.draw.rectangle([0, shown[1] * _DETAIL, canvas.image.width, canvas.image.height], fill=_PAPER)
    name = textwrap.shorten(scene.image_names[view], 34, placeholder="...")
    role = "held out" if view in scene.test_indices else "training"
    canvas.text((0, shown[1] + 5), f"{view}  {name}", _INK if role == "training" else HELD_OUT, 15)
    if residuals is not None and len(residuals.observed) and shown[0] > 400:
        error = float(np.median(residuals.errors))
        words = f"median {error:.2f} px" if np.isfinite(error) else "points behind the camera"
        canvas.text((shown[0], shown[1] + 5), words, _FAINT, 15, "ra")
    return canvas


def _visible_runs(
    scene: Scene, view: int, path: Float64[np.ndarray, "K 3"], zoom: float
) -> list[Float64[np.ndarray, "_ 2"]]:
    """The parts of a path that a picture shows, in drawn pixels."""
    pixels, _, shown = project(scene.cameras, view, torch.from_numpy(path).float())
    places, is_shown = pixels.double().numpy() * zoom, shown.numpy()
    cuts = np.flatnonzero(np.diff(is_shown.astype(np.int8))) + 1
    parts = np.split(np.arange(len(path)), cuts)
    return [places[part] for part in parts if is_shown[part[0]] and len(part) > 1]


def sphere_outline(center: Float64[np.ndarray, " 3"]) -> Float64[np.ndarray, "K 3"]:
    """The circle in which a cone from a camera outside the unit sphere touches it, closed.

    Its points p lie on the sphere and at right angles to the line of sight: p . c = 1 for a camera at c.
    """
    distance = float(np.linalg.norm(center))
    axis = center / distance
    first = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
    first /= np.linalg.norm(first)
    angle = np.linspace(0.0, 2.0 * np.pi, 721)[:, None]
    radius = np.sqrt(1.0 - 1.0 / distance**2)
    return axis / distance + radius * (np.cos(angle) * first + np.sin(angle) * np.cross(axis, first))


def _draw_sphere(canvas: _Canvas, scene: Scene, view: int, zoom: float) -> None:
    center = scene.cameras.c2w[view, :, 3].double().numpy()
    if np.linalg.norm(center) <= 1.0:
        canvas.label(np.array([130.0, 20.0]), "camera inside the unit sphere", SPHERE)
        return
    for run in _visible_runs(scene, view, sphere_outline(center), zoom):
        canvas.line(run, _PAPER, 4)
        canvas.line(run, SPHERE, 2.2)


def _draw_axes(canvas: _Canvas, scene: Scene, view: int, zoom: float) -> None:
    """The scene's axes at its centre, a third of the sphere's radius long."""
    for row, (name, color) in enumerate(zip("xyz", AXES, strict=True)):
        path = np.linspace(0.0, 1.0 / 3.0, 17)[:, None] * np.eye(3)[row]
        for run in _visible_runs(scene, view, path, zoom):
            canvas.line(run, _PAPER, 5)
            canvas.line(run, color, 3)
            canvas.label(run[-1], name, color, 14)


def _draw_points(canvas: _Canvas, scene: Scene, view: int, zoom: float) -> None:
    """The capture's points that the view observes (or all in frame), coloured by reprojection error."""
    points = scene.points
    assert points is not None
    observed = points.observations[points.observations[:, 1] == view, 0]
    chosen = observed if len(points.observations) else np.arange(len(points))
    chosen = chosen[:: max(1, len(chosen) // 500)]
    pixels, _, shown = project(scene.cameras, view, torch.from_numpy(points.positions[chosen]).float())
    for at, point, is_shown in zip(pixels.double().numpy() * zoom, chosen, shown.tolist(), strict=True):
        if is_shown:
            canvas.disc(at, 2.2, _PAPER)
            canvas.disc(at, 1.6, _error_color(float(points.errors[point])))


def _draw_residuals(canvas: _Canvas, residuals: Residuals, zoom: float, shrink: float) -> None:
    """Rings around features, and lines to where two other views say that they should be."""
    step = max(1, len(residuals.observed) // 150)
    for observed, reprojected, error in zip(
        residuals.observed[::step], residuals.reprojected[::step], residuals.errors[::step], strict=True
    ):
        color = _error_color(float(error) * shrink)
        canvas.line(np.stack([observed, reprojected]) * zoom, color, 1.2)
        canvas.ring(observed * zoom, 4.5, _INK, 2.5)
        canvas.ring(observed * zoom, 4, color, 1.5)


def _error_color(error: float) -> Color:
    # NaN, an error that is not known, is below no limit and has a colour of its own.
    return next((color for limit, color in _ERROR_STEPS if error <= limit), (90, 200, 255))


# ----------------------------------------------------------------------------------------------------------
# words


def _findings(canvas: _Canvas, inspection: Inspection, left: int, top: int) -> None:
    """Warnings, facts and the table of conventions beside the maps."""
    width = _WIDTH - _MARGIN - left
    letters = int(width / 8.6)

    def paragraph(text: str, color: Color) -> None:
        nonlocal top
        for number, line in enumerate(textwrap.wrap(text, letters, break_long_words=True)):
            canvas.text((left if number == 0 else left + 12, top), line, color, 17)
            top += 23
        top += 3

    for warning in inspection.warnings:
        paragraph(f"! {warning}", _WARNING)
    for fact in inspection.facts:
        paragraph(fact, _GOOD if fact.startswith("poses fit") else _INK)
    top += 12
    canvas.text((left, top), "poses read", _FAINT, 15)
    canvas.text((left + width - 70, top), "rays that meet", _FAINT, 15, "ra")
    canvas.text((left + width, top), "median", _FAINT, 15, "ra")
    for score in inspection.report.scores:
        top += 22
        color = _INK if score.share > 0.4 else _FAINT
        canvas.text((left, top), score.name, color, 15)
        canvas.text((left + width - 70, top), f"{100 * score.share:.0f} %", color, 15, "ra")
        canvas.text((left + width, top), f"{score.median_error:.1f} px", color, 15, "ra")


def _legend(canvas: _Canvas, top: int, inspection: Inspection) -> None:
    """What the colours mean, in one line at the bottom."""
    entries: list[tuple[str, Color]] = [("training view", TRAINING), ("held-out view", HELD_OUT)]
    entries.append(("unit sphere", SPHERE))
    if inspection.scene.masks is not None:
        entries.append(("mask", _MASK))
    low, high = _ERROR_STEPS[0], _ERROR_STEPS[1]
    entries += [
        (f"reprojection error up to {low[0]:.0f} px", low[1]),
        (f"up to {high[0]:.0f} px", high[1]),
        ("more (in a picture of 800 px)", _ERROR_STEPS[2][1]),
    ]
    left = float(_MARGIN)
    for text, color in entries:
        canvas.disc(np.array([left + 7, top + 10]), 6, color)
        canvas.text((left + 20, top), text, _INK, 16)
        left += 20 + canvas.draw.textlength(text, ImageFont.load_default(16 * _DETAIL)) / _DETAIL + 26
    note = "ring: a feature; line: to where two other views see it"
    if inspection.scene.points is not None:
        note += "; dot: the capture's points"
    canvas.text((left, top), note, _FAINT, 16)
