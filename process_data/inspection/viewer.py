"""The interactive page of an inspected capture: one HTML file with WebGL, all data inside, no network.

Geometry is packed as little-endian float32 and bytes in base64, photographs as one JPEG with a small picture
of each view.
"""

import base64
import html
import io
import json
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from process_data.inspection.measure import Inspection, frustum, frustum_size
from process_data.inspection.page import PAGE
from process_data.inspection.picture import AXES, HELD_OUT, SPHERE, TRAINING
from utils.types import Scene

_MOST_POINTS = 60000
_THUMBNAIL = 96
"""Longer side of a view's small picture in pixels."""
_ATLAS = 4096
"""Largest texture that all machines hold."""


def viewer_page(inspection: Inspection) -> str:
    """Write the page as text."""
    scene = inspection.scene
    length = frustum_size(scene)
    number = len(scene.cameras)
    corners = np.stack([frustum(scene, view, length) for view in range(number)])
    atlas, boxes = _atlas(scene)
    step = max(1, -(-len(inspection.points) // _MOST_POINTS))
    facts: dict[str, Any] = {
        "names": scene.image_names,
        "heldOut": [view in set(scene.test_indices) for view in range(number)],
        "corners": _packed(corners.astype("<f4")),
        "boxes": boxes,
        "atlas": atlas,
        "points": _packed(inspection.points[::step].astype("<f4")),
        "pointColors": _packed(inspection.point_colors[::step]),
        "up": inspection.up.tolist(),
        "sizes": scene.cameras.size.tolist(),
        "focals": scene.cameras.intrinsics[:, 1, 1].tolist(),
        "facts": inspection.facts,
        "warnings": inspection.warnings,
        "colors": {"training": TRAINING, "heldOut": HELD_OUT, "sphere": SPHERE, "axes": AXES},
    }
    # A name may hold anything: "<" is kept from ending the script.
    text = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.replace("@TITLE@", html.escape(scene.name)).replace("@FACTS@", text)


def _packed(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _atlas(scene: Scene) -> tuple[str, list[list[float]]]:
    """Small pictures of all views in one, as a data URL, and each one's left, top, right, bottom (0..1)."""
    number = len(scene.cameras)
    columns = math.ceil(math.sqrt(number))
    cell = min(_THUMBNAIL, _ATLAS // columns)
    rows = math.ceil(number / columns)
    canvas = np.zeros((rows * cell, columns * cell, 3), np.uint8)
    boxes = []
    for view in range(number):
        picture = scene.images.image(view).numpy()
        scale = cell / max(picture.shape[:2])
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        top, left = view // columns * cell, view % columns * cell
        canvas[top : top + size[1], left : left + size[0]] = small
        edges = np.array([left, top, left + size[0], top + size[1]]) / np.tile(canvas.shape[1::-1], 2)
        boxes.append(edges.tolist())
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), boxes
