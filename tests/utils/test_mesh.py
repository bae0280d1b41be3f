"""Meshes: cleaning, transforms, reports and files, on shapes whose numbers are known."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from utils.errors import DataError, ExportError
from utils.mesh import (
    drop_shells,
    face_areas_and_normals,
    keep_largest_components,
    linear_from_srgb,
    read_mesh,
    sample_surface,
    srgb_from_linear,
    transform_mesh,
    vertex_normals,
    write_mesh,
    y_up_from,
)
from utils.mesh_report import mesh_report
from utils.types import TriangleMesh

TETRAHEDRON = TriangleMesh(
    np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


def ball(
    subdivisions: int = 2, radius: float = 1.0, centre: tuple[float, float, float] = (0, 0, 0)
) -> TriangleMesh:
    made = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return TriangleMesh(np.asarray(made.vertices) + np.array(centre), np.asarray(made.faces, np.int64))


def union(*meshes: TriangleMesh) -> TriangleMesh:
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=False)]
    return TriangleMesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


@pytest.fixture
def painted() -> TriangleMesh:
    mesh = ball(1, 2.0, (1, 2, 3))
    colors = np.random.default_rng(0).integers(0, 256, mesh.vertices.shape).astype(np.uint8)
    return replace(mesh, normals=vertex_normals(mesh), colors=colors)


def test_tetrahedron_by_hand():
    report = mesh_report(TETRAHEDRON)
    assert report["volume"] == pytest.approx(1 / 6)
    assert report["area"] == pytest.approx(1.5 + 3**0.5 / 2)
    assert (report["vertices"], report["faces"], report["components"], report["euler_number"]) == (4, 4, 1, 2)
    assert report["watertight"] is True
    assert report["bounds"] == [[0, 0, 0], [1, 1, 1]]
    json.dumps(report)


def test_report_counts_holes_and_bad_edges():
    opened = replace(TETRAHEDRON, faces=TETRAHEDRON.faces[1:])
    assert mesh_report(opened)["boundary_edges"] == 3
    assert mesh_report(opened)["watertight"] is False
    doubled = replace(TETRAHEDRON, faces=np.vstack([TETRAHEDRON.faces, TETRAHEDRON.faces[:1]]))
    assert mesh_report(doubled)["nonmanifold_edges"] == 3
    empty = TriangleMesh(np.empty((0, 3)), np.empty((0, 3), np.int64))
    assert mesh_report(empty)["watertight"] is False


def test_normals_of_a_sphere_point_out():
    mesh = ball(3, 0.7, (5, 0, 0))
    np.testing.assert_allclose(vertex_normals(mesh), (mesh.vertices - [5, 0, 0]) / 0.7, atol=0.02)
    loose = replace(mesh, vertices=np.vstack([mesh.vertices, [[9.0, 9, 9]]]))
    assert np.linalg.norm(vertex_normals(loose), axis=1) == pytest.approx(1.0)


def test_largest_components_are_kept_with_their_attributes():
    small = [ball(1, 0.1, (x, 3.0, 0.0)) for x in range(5)]
    mesh = union(*small[:2], ball(2), *small[2:])
    colors = np.repeat(np.arange(len(mesh.vertices))[:, None] % 251, 3, axis=1).astype(np.uint8)
    mesh = replace(mesh, colors=colors)
    kept = keep_largest_components(mesh)
    start = 2 * len(small[0].vertices)
    assert np.array_equal(kept.vertices, ball(2).vertices)
    assert np.array_equal(kept.faces, ball(2).faces)
    assert kept.colors is not None
    assert np.array_equal(kept.colors, colors[start : start + len(kept.vertices)])
    assert len(keep_largest_components(mesh, num=3).faces) == 320 + 2 * 80
    assert len(keep_largest_components(mesh, num=0).faces) == len(mesh.faces)
    assert len(keep_largest_components(mesh, num=0, min_faces=81).faces) == 320
    with pytest.raises(ExportError, match=r"min_faces.*320"):
        keep_largest_components(mesh, min_faces=321)
    with pytest.raises(ExportError):
        keep_largest_components(TriangleMesh(np.empty((0, 3)), np.empty((0, 3), np.int64)))


def test_shells_go_unless_nothing_else_is_there():
    shell, inner = ball(3, 0.995), ball(2, 0.5)
    assert len(drop_shells(union(shell, inner)).faces) == len(inner.faces)
    assert len(drop_shells(shell).faces) == len(shell.faces)
    assert len(drop_shells(inner).faces) == len(inner.faces)


def test_transform_scales_turns_and_keeps_outside_outside(painted: TriangleMesh):
    matrix = np.eye(4)
    matrix[:3, :3] = 3.0 * np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    matrix[:3, 3] = 7, 8, 9
    moved = transform_mesh(painted, matrix)
    assert mesh_report(moved)["volume"] == pytest.approx(27 * mesh_report(painted)["volume"])
    np.testing.assert_allclose(moved.normals, vertex_normals(moved), atol=1e-6)
    back = transform_mesh(moved, np.linalg.inv(matrix))
    np.testing.assert_allclose(back.vertices, painted.vertices, atol=1e-12)
    mirrored = transform_mesh(painted, np.diag([-1.0, 2, 1, 1]))
    assert mesh_report(mirrored)["volume"] == pytest.approx(2 * mesh_report(painted)["volume"])
    inward = (mirrored.normals * vertex_normals(mirrored)).sum(axis=1)
    assert inward.min() > 0.9
    with pytest.raises(ValueError, match="invertible"):
        transform_mesh(painted, np.zeros((4, 4)))


def test_samples_are_even_by_area_and_on_their_faces():
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [9, 0, 0], [5, 4, 0]])
    points, faces = sample_surface(TriangleMesh(corners, np.array([[0, 1, 2], [3, 4, 5]])), 17_000, seed=3)
    assert np.bincount(faces).tolist() == pytest.approx([1000, 16_000], abs=1)
    small = points[faces == 0]
    assert small.min() >= 0
    assert (small[:, 0] + small[:, 1]).max() <= 1
    np.testing.assert_allclose(small.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.02)
    again = sample_surface(TriangleMesh(corners, np.array([[0, 1, 2], [3, 4, 5]])), 17_000, seed=3)[0]
    assert np.array_equal(points, again)
    with pytest.raises(ValueError, match="area"):
        sample_surface(TriangleMesh(corners, np.array([[0, 0, 1]])), 10)


@pytest.mark.parametrize("ending", ["ply", "obj", "stl", "glb"])
def test_files_read_back(tmp_path: Path, painted: TriangleMesh, ending: str):
    path = tmp_path / "deep" / f"mesh.{ending}"
    write_mesh(path, painted)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = read_mesh(path)
    expected = painted if ending != "glb" else transform_mesh(painted, y_up_from("z"))
    np.testing.assert_allclose(
        loaded.vertices[loaded.faces], expected.vertices[expected.faces], rtol=1e-6, atol=1e-6
    )
    if ending == "stl":
        return
    assert loaded.colors is not None
    # OBJ holds four digits, GLB linear light that trimesh rounds to 8 bits: dark colours come back coarser.
    difference = np.abs(loaded.colors.astype(int) - painted.colors)
    assert difference[painted.colors > 60].max() <= {"ply": 0, "obj": 1, "glb": 2}[ending]
    with_normals = trimesh.load(path, process=False, skip_materials=True)
    scene_normals = with_normals.dump()[0] if isinstance(with_normals, trimesh.Scene) else with_normals
    np.testing.assert_allclose(scene_normals.vertex_normals, expected.normals, atol=1e-4)


def test_ply_header_is_what_viewers_look_for(tmp_path: Path, painted: TriangleMesh):
    write_mesh(tmp_path / "a.ply", painted)
    header = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert header[:2] == ["ply", "format binary_little_endian 1.0"]
    assert [f"property uchar {name}" in header for name in ("red", "green", "blue")] == [True] * 3
    assert [f"property float {name}" in header for name in ("x", "y", "z", "nx", "ny", "nz")] == [True] * 6


def test_ply_far_from_the_origin_keeps_its_digits(tmp_path: Path):
    far = replace(TETRAHEDRON, vertices=TETRAHEDRON.vertices + np.array([4e6, 5e5, 100.0]))
    write_mesh(tmp_path / "far.ply", far)
    np.testing.assert_allclose(read_mesh(tmp_path / "far.ply").vertices, far.vertices, rtol=0, atol=1e-8)


def test_glb_keeps_to_the_format(tmp_path: Path, painted: TriangleMesh):
    path = tmp_path / "a.glb"
    write_mesh(path, painted)
    content = path.read_bytes()
    magic, version, length, json_length, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    tree = json.loads(content[20 : 20 + json_length])
    binary = content[20 + json_length + 8 :]
    assert json_length % 4 == 0
    assert tree["buffers"][0]["byteLength"] == len(binary)
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]

    def values(number: int) -> np.ndarray:
        view = tree["bufferViews"][tree["accessors"][number]["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        part = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        return np.frombuffer(part, "<f4").reshape(-1, 3)

    position = tree["accessors"][attributes["POSITION"]]
    assert position["min"] == values(attributes["POSITION"]).min(axis=0).tolist()
    # Z up becomes Y up, which is a rotation: (x, y, z) -> (x, z, -y).
    np.testing.assert_allclose(
        values(attributes["POSITION"]), painted.vertices[:, [0, 2, 1]] * [1, 1, -1], rtol=1e-6
    )
    np.testing.assert_allclose(values(attributes["COLOR_0"]), linear_from_srgb(painted.colors), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(values(attributes["NORMAL"]), axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("up", ["x", "y", "z", "-x", "-y", "-z"])
def test_up_becomes_y_by_a_rotation(up: str):
    matrix = y_up_from(up)
    axis = np.eye(4)["xyz".index(up[-1])] * (-1 if up[0] == "-" else 1)
    np.testing.assert_array_equal(matrix @ axis, [0, 1, 0, 0])
    assert np.linalg.det(matrix) == pytest.approx(1.0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(4))


def test_linear_light_by_hand_and_back():
    assert linear_from_srgb(np.array([0, 255, 188], np.uint8)) == pytest.approx([0.0, 1.0, 0.5029], abs=1e-4)
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(srgb_from_linear(linear_from_srgb(every)), every)


def test_what_cannot_be_written_or_read_says_so(tmp_path: Path):
    with pytest.raises(ExportError, match="format"):
        write_mesh(tmp_path / "a.fbx", TETRAHEDRON)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        write_mesh(tmp_path / "file" / "a.ply", TETRAHEDRON)
    with pytest.raises(DataError, match="no such file"):
        read_mesh(tmp_path / "none.ply")
    for name, content in (("a.ply", b"not a mesh"), ("b.obj", b""), ("c.glb", b"glTF"), ("d.xyz1", b"?")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_mesh(tmp_path / name)


def test_point_clouds_are_read_without_faces(tmp_path: Path):
    cloud = trimesh.PointCloud(np.eye(3), colors=np.full((3, 4), 200, np.uint8))
    cloud.export(tmp_path / "points.ply")
    loaded = read_mesh(tmp_path / "points.ply")
    assert loaded.faces.shape == (0, 3)
    np.testing.assert_allclose(loaded.vertices, np.eye(3))
    assert loaded.colors is not None


def test_areas_and_normals_of_a_face_without_area():
    flat = TriangleMesh(np.zeros((3, 3)), np.array([[0, 1, 2]]))
    areas, normals = face_areas_and_normals(flat)
    assert areas.tolist() == [0.0]
    assert normals.tolist() == [[0.0, 0.0, 0.0]]
