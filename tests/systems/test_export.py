"""Export: planted floaters go, colours and normals come from the surface, everything lands in world units."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from systems.export import ExportConfig, clean_surface, export_mesh
from utils.errors import ConfigError, ExportError
from utils.extraction import extract_surface
from utils.mesh import read_mesh
from utils.mesh_report import mesh_report
from utils.types import Cameras, ImageStack, Scene, TriangleMesh

CENTRE = torch.tensor([0.1, -0.05, 0.0])
RADIUS = 0.4
FLOATERS = torch.tensor([[0.7, 0, 0], [-0.7, 0.1, 0], [0, 0.7, 0.2], [0, -0.75, 0], [0.1, 0.1, 0.8]])


class Ball:
    """A sphere with five small ones around it, coloured by direction."""

    device = torch.device("cpu")

    def query_sdf(self, positions: Tensor) -> Tensor:
        ball = (positions - CENTRE).norm(dim=1) - RADIUS
        return torch.minimum(ball, (torch.cdist(positions, FLOATERS) - 0.08).min(dim=1).values)

    def query_gradient(self, positions: Tensor) -> Tensor:
        return 1.7 * (positions - CENTRE)  # Not of unit length, as a learned field's.

    def query_color(self, positions: Tensor, directions: Tensor) -> Tensor:
        assert torch.allclose(directions.norm(dim=1), torch.ones(len(directions)), atol=1e-4)
        return 0.5 - 0.5 * directions


@dataclass(frozen=True)
class Settings:
    export: ExportConfig


@dataclass(frozen=True)
class Folder:
    folder: Path


@pytest.fixture
def scene() -> Scene:
    angle = 0.7
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:3, :3] *= 250.0
    matrix[:3, 3] = torch.tensor([10.0, 20.0, -600.0])
    # A level camera that looks along +y: its down is -z.
    level = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, -3], [0, -1, 0, 0]])
    cameras = Cameras(level[None], torch.eye(3)[None], torch.tensor([[2, 2]], dtype=torch.int64))
    images = ImageStack.from_images([np.zeros((2, 2, 3), np.uint8)])
    return Scene("ball", cameras, images, ("0.png",), (0,), (), matrix)


def world_centre(scene: Scene) -> np.ndarray:
    return (scene.world_from_scene @ torch.cat([CENTRE.double(), torch.ones(1).double()]))[:3].numpy()


def test_files_land_in_world_coordinates(tmp_path: Path, scene: Scene):
    config = Settings(ExportConfig(resolution=96, formats=("ply", "obj", "glb", "stl")))
    truth = trimesh.creation.icosphere(subdivisions=4, radius=250.0 * RADIUS)
    reference = TriangleMesh(truth.vertices + world_centre(scene), np.asarray(truth.faces, np.int64))
    report = export_mesh(config, replace(scene, reference_mesh=reference), Ball(), Folder(tmp_path), step=7)
    names = {path.name for path in report.paths}
    assert names == {"mesh.ply", "mesh.obj", "mesh.glb", "mesh.stl", "transform.json", "mesh.png"}
    assert all(path.is_file() and path.parent == tmp_path / "save" for path in report.paths)

    mesh = read_mesh(tmp_path / "save/mesh.ply")
    outward = mesh.vertices - world_centre(scene)
    assert np.abs(np.linalg.norm(outward, axis=1) - 100.0).max() < 1e-4 * 500.0 + 0.1
    assert report.mesh["components"] == 1
    assert report.mesh["boundary_edges"] == 0
    assert report.mesh["volume"] == pytest.approx(4 / 3 * np.pi * 100.0**3, rel=0.01)
    assert report.geometry is not None
    assert report.geometry["chamfer"] < 0.3

    # In the file the normals are turned with the world. The colour says from where a place is seen, in scene
    # space: from the camera, which looks along +y, to the right and down; elsewhere from in front of it.
    stored = trimesh.load(tmp_path / "save/mesh.ply", process=False)
    direction = outward / np.linalg.norm(outward, axis=1, keepdims=True)
    np.testing.assert_allclose(stored.vertex_normals, direction, atol=2e-3)
    assert mesh.colors is not None
    in_scene = direction @ (scene.world_from_scene[:3, :3] / 250.0).numpy()
    towards = np.array([0, -3, 0]) - (CENTRE.numpy() + RADIUS * in_scene)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    facing, right, down = (towards * in_scene).sum(axis=1), -towards[:, 0], towards[:, 2]
    is_seen = (facing > 0.1) & (right > 0.02) & (down > 0.02)
    is_hidden = (facing < -0.02) | (right < -0.02) | (down < -0.02)
    assert is_seen.sum() > 300
    colors = mesh.colors / 255.0
    np.testing.assert_allclose(colors[is_seen], 0.5 + 0.5 * towards[is_seen], atol=5e-3)
    np.testing.assert_allclose(colors[is_hidden], 0.5 + 0.5 * in_scene[is_hidden], atol=5e-3)

    transform = json.loads((tmp_path / "save/transform.json").read_text())
    np.testing.assert_allclose(transform["world_from_scene"], scene.world_from_scene.numpy())
    assert transform["scale"] == pytest.approx(250.0)
    # Up is +z of the scene, because the camera says so, and GLB turns it to +Y; upside down it is -z.
    np.testing.assert_allclose(transform["up"], scene.world_from_scene[:3, 2] / 250.0, atol=1e-12)
    turned = replace(scene.cameras, c2w=scene.cameras.c2w * torch.tensor([[-1.0, -1, 1, 1]]))
    export_mesh(config, replace(scene, cameras=turned), Ball(), Folder(tmp_path / "turned"), 7)
    transform = json.loads((tmp_path / "turned/save/transform.json").read_text())
    np.testing.assert_allclose(transform["up"], -scene.world_from_scene[:3, 2] / 250.0, atol=1e-12)


def test_what_no_camera_saw_is_kept_marked_or_cut(tmp_path: Path, scene: Scene):
    # The fixture's camera stands at y = -3 and looks along +y, through a frame that is wide enough.
    lens = torch.tensor([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]])
    cameras = replace(scene.cameras, intrinsics=lens[None], size=torch.tensor([[100, 100]]))
    images = ImageStack.from_images([np.zeros((100, 100, 3), np.uint8)])
    scene = replace(scene, cameras=cameras, images=images)
    meshes = {}
    for unseen in ("keep", "flag", "cut"):
        settings = Settings(ExportConfig(resolution=64, unseen=unseen))
        report = export_mesh(settings, scene, Ball(), Folder(tmp_path / unseen), 0)
        assert report.mesh["watertight"] is (unseen != "cut")
        assert report.mesh["observed_holes"] == 0, "a cut is no hole"
        meshes[unseen] = trimesh.load(tmp_path / unseen / "save/mesh.ply", process=False)
    header = (tmp_path / "flag/save/mesh.ply").read_bytes().partition(b"end_header")[0]
    assert b"property uchar seen" in header
    whole = meshes["flag"].vertices
    seen = meshes["flag"].metadata["_ply_raw"]["vertex"]["data"]["seen"]
    np.testing.assert_array_equal(whole, meshes["keep"].vertices)
    # Its horizon: the camera is 2.95 from the centre, the radius is 0.4.
    in_scene = (
        (whole - scene.world_from_scene[:3, 3].numpy()) @ scene.world_from_scene[:3, :3].numpy() / 250.0**2
    )
    towards = CENTRE[1].item() - in_scene[:, 1]
    assert seen[towards > 0.08].all()
    assert not seen[towards < 0.0].any()
    assert 0.35 < meshes["cut"].area / meshes["keep"].area < 0.5
    with pytest.raises(ConfigError, match=r"export\.min_views"):
        ExportConfig(min_views=0)


def test_points_are_asked_in_fewer_at_once_when_memory_runs_out(
    tmp_path: Path, scene: Scene, caplog: pytest.LogCaptureFixture
):
    class Small(Ball):
        def query_gradient(self, positions: Tensor) -> Tensor:
            if len(positions) > 300:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().query_gradient(positions)

        def query_sdf(self, positions: Tensor) -> Tensor:
            if len(positions) > 500:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().query_sdf(positions)

    config = Settings(ExportConfig(resolution=48, chunk=900))
    export_mesh(config, scene, Ball(), Folder(tmp_path / "whole"), 0)
    with caplog.at_level(logging.WARNING):
        export_mesh(config, scene, Small(), Folder(tmp_path / "pieces"), 0)
    meshes = [(tmp_path / name / "save/mesh.ply").read_bytes() for name in ("whole", "pieces")]
    assert meshes[0] == meshes[1]
    # The vertices are asked no more at once than the nodes last were.
    messages = [entry.getMessage() for entry in caplog.records if entry.name == "utils.memory"]
    assert messages == [f"out of memory: points in chunks of {size} from now on" for size in (450, 225)]


def test_five_planted_floaters_go_and_nothing_else():
    found = extract_surface(Ball().query_sdf, 80)
    alone = extract_surface(lambda p: (p - CENTRE).norm(dim=1) - RADIUS, 80)
    assert mesh_report(found)["components"] == 6
    cleaned = clean_surface(found, ExportConfig())
    assert np.array_equal(cleaned.vertices, alone.vertices)
    assert len(cleaned.faces) == len(alone.faces)
    assert mesh_report(clean_surface(found, ExportConfig(keep_components=0)))["components"] == 6
    with pytest.raises(ExportError, match="min_faces"):
        clean_surface(found, ExportConfig(min_faces=10**6))


def test_shell_at_the_wall_is_dropped():
    def field(positions: Tensor) -> Tensor:
        radius = positions.norm(dim=1)
        return torch.minimum(radius - 0.4, 0.985 - radius)

    found = extract_surface(field, 64)
    assert mesh_report(found)["components"] == 2
    cleaned = clean_surface(found, ExportConfig(keep_components=0))
    assert np.linalg.norm(cleaned.vertices, axis=1).max() < 0.41
    assert (
        mesh_report(clean_surface(found, ExportConfig(keep_components=0, cull_shells=False)))["components"]
        == 2
    )


def test_no_surface_writes_no_file(tmp_path: Path, scene: Scene):
    class Empty(Ball):
        def query_sdf(self, positions: Tensor) -> Tensor:
            return 1.0 + positions.norm(dim=1)

    with pytest.raises(ExportError, match="all outside"):
        export_mesh(Settings(ExportConfig(resolution=16)), scene, Empty(), Folder(tmp_path), 0)
    assert not list(tmp_path.rglob("*.*"))


def test_grey_colours_everywhere_are_an_error(tmp_path: Path, scene: Scene):
    class Grey(Ball):
        def query_color(self, positions: Tensor, directions: Tensor) -> Tensor:
            return torch.full_like(positions, 0.498)

    with pytest.raises(ExportError, match=r"100\.0 % of the vertex colours are \(127, 127, 127\)"):
        export_mesh(Settings(ExportConfig(resolution=32)), scene, Grey(), Folder(tmp_path), 0)
    assert not list(tmp_path.rglob("*.*"))


def test_a_vanishing_gradient_leaves_the_normal_of_the_geometry(tmp_path: Path, scene: Scene):
    class Flat(Ball):
        def query_gradient(self, positions: Tensor) -> Tensor:
            return torch.zeros_like(positions)

    export_mesh(Settings(ExportConfig(resolution=48)), scene, Flat(), Folder(tmp_path), 0)
    stored = trimesh.load(tmp_path / "save/mesh.ply", process=False)
    outward = stored.vertices - world_centre(scene)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    assert (stored.vertex_normals * outward).sum(axis=1).min() > 0.95


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", 4),
        ("formats", ("fbx",)),
        ("formats", ()),
        ("keep_components", -1),
        ("min_faces", -1),
        ("lipschitz", 0.0),
        ("chunk", 0),
    ],
)
def test_bad_settings_name_their_key(key: str, value: object):
    with pytest.raises(ConfigError, match=rf"export\.{key}: "):
        ExportConfig(**{key: value})
