"""The rasteriser, against pixels counted by hand and rays met by hand."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from utils.raster import contact_sheet, render_mesh
from utils.types import TriangleMesh

FRONT = np.hstack([np.eye(3), np.zeros((3, 1))])


def intrinsics(focal: float, size: int) -> np.ndarray:
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


def triangle(depth: float = 2.0) -> TriangleMesh:
    vertices = np.array([[0.0, 0, depth], [4, 0, depth], [0, 4, depth]])
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    return TriangleMesh(vertices, np.array([[0, 1, 2]]), colors=colors)


def ball(radius: float) -> TriangleMesh:
    made = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    return TriangleMesh(np.asarray(made.vertices) + np.array([0, 0, 3.0]), np.asarray(made.faces, np.int64))


def test_pixels_whose_centres_are_covered():
    # One unit is one pixel; centres with x + y <= 4 are covered: 4 + 3 + 2 + 1 of them (the diagonal's
    # included).
    view = render_mesh(triangle(), FRONT, np.eye(3), (6, 5), orthographic=True)
    expected = np.array([[j + i + 1 <= 4 for j in range(6)] for i in range(5)])
    assert np.array_equal(view.mask, expected)
    np.testing.assert_allclose(view.depth[expected], 2.0)
    assert not view.depth[~expected].any()
    assert view.color is not None
    np.testing.assert_allclose(view.color[0, 0], [0.75, 0.125, 0.125], atol=1e-6)
    np.testing.assert_allclose(np.abs(view.normal[0, 0]), [0, 0, 1])


def test_nearest_face_wins_in_either_order():
    near, far = triangle(1.0), triangle(2.0)
    for first, second, index in ((near, far, 0), (far, near, 1)):
        both = TriangleMesh(
            np.vstack([first.vertices, second.vertices]), np.vstack([first.faces, second.faces + 3])
        )
        view = render_mesh(both, FRONT, np.eye(3), (5, 5), orthographic=True)
        assert view.face_indices[0, 0] == index
        assert view.depth[0, 0] == 1.0


def test_sphere_in_perspective_against_rays():
    size, radius = 64, 1.0
    view = render_mesh(ball(radius), FRONT, intrinsics(60.0, size), (size, size))
    ticks = (np.arange(size) + 0.5 - size / 2) / 60.0
    rays = np.stack([*np.meshgrid(ticks, ticks), np.ones((size, size))], axis=-1)
    # |t d - (0, 0, 3)|^2 = r^2
    a, b, c = (rays**2).sum(axis=-1), -2 * 3.0 * rays[..., 2], 9.0 - radius**2
    disc = b * b - 4 * a * c
    hit = disc > 0
    assert (hit != view.mask).mean() < 0.01
    both = (disc > 0.5) & view.mask
    depth = (-b - np.sqrt(np.maximum(disc, 0))) / (2 * a)
    assert np.abs(view.depth - depth)[both].max() < 0.01
    normal = (rays * depth[..., None] - [0, 0, 3.0]) / radius
    assert np.abs(view.normal - normal)[both].max() < 0.03


def test_attributes_are_perspective_correct():
    # A square going away from 1 to 3: half way across it on the plane is depth 2.
    vertices = np.array([[-1.0, -1, 1], [1, -1, 3], [1, 1, 3], [-1, 1, 1]])
    colors = np.array([[0, 0, 0], [255] * 3, [255] * 3, [0, 0, 0]], np.uint8)
    square = TriangleMesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), colors=colors)
    view = render_mesh(square, FRONT, intrinsics(100.0, 101), (101, 101))
    row = view.mask[50]
    assert view.color is not None
    np.testing.assert_allclose(view.color[50, row, 0], (view.depth[50, row] - 1) / 2, atol=1e-5)
    x = (np.arange(101) + 0.5 - 50.5) / 100.0
    np.testing.assert_allclose(view.depth[50, row], (2 / (1 - x))[row], rtol=1e-5)


def test_poses_move_the_camera():
    turned = np.array([[0.0, 0, 1, -5], [0, 1, 0, 0], [-1, 0, 0, 3]])  # Looks along +x.
    view = render_mesh(ball(0.5), turned, intrinsics(50.0, 32), (32, 32))
    assert view.depth[16, 16] == pytest.approx(4.5, abs=0.02)
    np.testing.assert_allclose(view.normal[16, 16], [-1, 0, 0], atol=0.12)


def test_faces_behind_the_camera_and_far_outside_are_harmless():
    vertices = np.array([[0.0, 0, -1], [4, 0, 1], [0, 4, 1], [1e12, 0, 1], [0, 1e12, 1], [-1e12, -1e12, 1]])
    view = render_mesh(TriangleMesh(vertices, np.array([[0, 1, 2], [3, 4, 5]])), FRONT, np.eye(3), (4, 4))
    assert (view.face_indices == 1).all()


def test_contact_sheet_shows_six_sides():
    mesh = ball(0.3)
    sheet = contact_sheet(mesh, 32)
    assert sheet.shape == (32, 192, 3)
    assert sheet[0, 0].tolist() == [255, 255, 255]
    for side in range(6):
        picture = sheet[:, 32 * side : 32 * side + 32]
        middle, rim = picture[16, 16].mean(), picture[16, 2].mean()
        assert middle > rim + 40
        assert np.ptp(picture[16, 16].astype(int)) < 20  # Grey: the front is seen.
    inside_out = contact_sheet(replace(mesh, faces=np.ascontiguousarray(mesh.faces[:, ::-1])), 32)
    assert inside_out[16, 16, 0] > inside_out[16, 16, 2] + 60


def test_contact_sheet_sides_are_where_they_say():
    centre, colors = ball(0.5).vertices - [0, 0, 3.0], np.full((2562, 3), 10, np.uint8)
    colors[centre[:, 0] > 0.2, 0] = 250  # Red towards +x, green towards +y, blue towards +z.
    colors[centre[:, 1] > 0.2, 1] = 250
    colors[centre[:, 2] > 0.2, 2] = 250
    painted = contact_sheet(replace(ball(0.5), colors=colors), 32)[32:]
    seen = [painted[16, 32 * side + 16].tolist() for side in range(6)]
    assert [int(np.argmax(c)) if max(c) > 200 else -1 for c in seen] == [0, -1, 1, -1, 2, -1]
    assert painted[6, 16, 2] > 200  # From +x, z is up ...
    assert painted[16, 26, 1] > 200  # ... and y to the right.
