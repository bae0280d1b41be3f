"""What cameras see of a mesh, against what is known of balls and plates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from utils.errors import ExportError
from utils.extraction import extract_surface
from utils.lens import project
from utils.mesh import face_areas_and_normals, face_components, select_faces, vertex_normals
from utils.scene import Lens
from utils.types import Cameras, ImageStack, Scene, TriangleMesh
from utils.visibility import cut_unseen, sight_of, views_to_look_through

DISTANCE = 3.0
RADIUS = 0.5


def ball() -> TriangleMesh:
    made = trimesh.creation.icosphere(subdivisions=4, radius=RADIUS)
    return TriangleMesh(np.asarray(made.vertices), np.asarray(made.faces, np.int64))


def joined(*meshes: TriangleMesh) -> TriangleMesh:
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return TriangleMesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def scene_from(*centres: tuple[float, float, float], size: int = 100, train: tuple[int, ...] = ()) -> Scene:
    """Cameras that look at the origin, with a field of view of 37 degrees."""
    poses = []
    for centre in centres:
        forward = -torch.tensor(centre) / torch.tensor(centre).norm()
        up = torch.tensor([0.0, 0.0, 1.0]) if abs(forward[2]) < 0.9 else torch.tensor([0.0, 1.0, 0.0])
        right = torch.linalg.cross(forward, up)
        right = right / right.norm()
        down = torch.linalg.cross(forward, right)
        poses.append(torch.stack([right, down, forward, torch.tensor(centre)], dim=1))
    count = len(poses)
    focal = 1.5 * size
    matrix = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])
    return Scene(
        name="made",
        cameras=Cameras(torch.stack(poses), matrix.expand(count, 3, 3), torch.tensor([[size, size]] * count)),
        images=ImageStack.from_images([np.zeros((size, size, 3), np.uint8)] * count),
        image_names=tuple(f"{index}.png" for index in range(count)),
        train_indices=train or tuple(range(count)),
        test_indices=(),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def test_a_camera_sees_the_cap_of_a_ball():
    views = sight_of(ball(), scene_from((DISTANCE, 0, 0), (0, 0, DISTANCE))).views
    # The horizon of a ball of radius r from distance d lies at x = r^2 / d.
    for axis, seen in ((0, views), (2, views)):
        height = ball().vertices[:, axis]
        hidden = height < RADIUS**2 / DISTANCE - 0.01
        assert (seen[~hidden & (height > RADIUS**2 / DISTANCE + 0.02)] >= 1).all()
        other = ball().vertices[:, 2 - axis] < RADIUS**2 / DISTANCE - 0.01
        assert (seen[hidden & other] == 0).all()
    both = (ball().vertices[:, [0, 2]] > 0.15).all(axis=1)
    assert both.any()
    assert (views[both] == 2).all()


def test_where_a_ball_is_seen_from_on_average():
    centres = ((DISTANCE, 0, 0), (0, 0, DISTANCE), (0, 0, 2 * DISTANCE))
    mesh = ball()
    normals = vertex_normals(mesh)
    sight = sight_of(mesh, scene_from(*centres))
    hidden = sight.views == 0
    assert hidden.any()
    assert not sight.towards[hidden].any()
    np.testing.assert_allclose(np.linalg.norm(sight.towards[~hidden], axis=1), 1.0, atol=1e-6)
    for vertex in np.nonzero((mesh.vertices[:, [0, 2]] > 0.15).all(axis=1))[0][::5]:
        expected = np.zeros(3)
        for centre in centres:
            towards = np.array(centre) - mesh.vertices[vertex]
            towards /= np.linalg.norm(towards)
            expected += (towards @ normals[vertex]) ** 2 * towards
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(sight.towards[vertex], expected, atol=1e-6)
    alone = (mesh.vertices[:, 0] > 0.2) & (mesh.vertices[:, 2] < -0.05)
    towards = np.array(centres[0]) - mesh.vertices[alone]
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    np.testing.assert_allclose(sight.towards[alone], towards, atol=1e-6)


def test_only_training_views_count():
    scene = scene_from((DISTANCE, 0, 0), (-DISTANCE, 0, 0), train=(0,))
    views = sight_of(ball(), scene).views
    assert views.max() == 1
    assert not views[ball().vertices[:, 0] < 0].any()


def test_what_stands_in_front_hides():
    # A small ball throws a shadow of its own size and more on the large one.
    small = ball()
    small = replace(small, vertices=0.3 * small.vertices + [1.0, 0.0, 0.0])
    views = sight_of(joined(ball(), small), scene_from((DISTANCE, 0, 0))).views
    across = np.linalg.norm(ball().vertices[:, 1:], axis=1)
    front = ball().vertices[:, 0] > 0
    large = views[: len(across)]
    assert not large[front & (across < 0.15)].any()
    assert large[front & (across > 0.22) & (across < 0.45)].all()


def test_what_is_outside_of_the_frame_is_not_seen():
    scene = scene_from((1.0, 0, 0))  # 18 degrees to each side: 0.17 at the front of the ball.
    front = ball().vertices[:, 0] > 0.4
    inside = (np.abs(ball().vertices[:, 1:]) < 0.15).all(axis=1)
    outside = (np.abs(ball().vertices[:, 1:]) > 0.2).any(axis=1)
    views = sight_of(ball(), scene).views
    assert views[front & inside].all()
    assert not views[front & outside].any()


def test_the_unseen_side_is_cut_and_folds_stay():
    mesh = ball()
    views = np.where(mesh.vertices[:, 0] > 0, 3, 1)
    fold = int(mesh.vertices[:, 0].argmax())
    views[fold] = 0
    kept = cut_unseen(mesh, views, 2)
    centres = mesh.vertices[mesh.faces]
    expected = int((centres[..., 0] > 0).any(axis=1).sum())
    assert len(kept.faces) == expected, "the vertex that nobody sees in the midst of others stays"
    assert face_areas_and_normals(kept)[0].sum() < 0.6 * face_areas_and_normals(mesh)[0].sum()
    # Every face kept has a corner that is seen.
    assert kept.vertices[kept.faces][..., 0].max(axis=1).min() > 0


def looking_from(scene: Scene, focal: float) -> Scene:
    intrinsics = scene.cameras.intrinsics.clone()
    intrinsics[:, [0, 1], [0, 1]] = focal
    return replace(scene, cameras=replace(scene.cameras, intrinsics=intrinsics))


def ring(count: int, radius: float, height: float) -> list[tuple[float, float, float]]:
    turns = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return [(float(radius * np.cos(turn)), float(radius * np.sin(turn)), height) for turn in turns]


def test_what_the_cut_severs_stays() -> None:
    """A table, from above: its leg is hidden, its top and the floor are not."""

    def distance(positions: torch.Tensor) -> torch.Tensor:
        parts = []
        for height, half in ((0.25, (0.35, 0.35, 0.03)), (0.0, (0.05, 0.05, 0.28)), (-0.3, (0.6, 0.6, 0.05))):
            q = (positions - torch.tensor([0.0, 0.0, height])).abs() - torch.tensor(half)
            parts.append(q.clamp(min=0).norm(dim=1) + q.max(dim=1).values.clamp(max=0))
        return torch.stack(parts).min(dim=0).values

    mesh = extract_surface(distance, 96, 1.0)
    scene = looking_from(scene_from(*ring(12, 2.0, 3.0)), 80.0)
    kept = cut_unseen(mesh, sight_of(mesh, scene).views, 2)
    areas = np.bincount(face_components(kept), face_areas_and_normals(kept)[0])
    assert len(areas) == 2
    for height in (0.28, -0.25):
        there = np.abs(kept.vertices[:, 2] - height) < 0.02
        assert np.ptp(kept.vertices[there, 0]) > 0.6
    assert not (np.abs(kept.vertices[:, 2]) < 0.1).any(), "nobody sees the leg"


def test_the_object_stays_before_vast_surroundings() -> None:
    around = trimesh.creation.icosphere(subdivisions=4, radius=20.0)
    walls = TriangleMesh(np.asarray(around.vertices), np.asarray(around.faces, np.int64)[:, ::-1].copy())
    kept = cut_unseen(joined(ball(), walls), np.full(len(ball().vertices) + len(walls.vertices), 5), 2)
    assert len(kept.faces) == len(ball().faces) + len(walls.faces)


def test_a_ground_seen_at_a_slant_is_seen() -> None:
    ticks = np.linspace(-10.0, 10.0, 200)
    x, y = np.meshgrid(ticks, ticks, indexing="ij")
    corner = (np.arange(199)[:, None] * 200 + np.arange(199)).ravel()
    faces = np.concatenate(
        [np.stack([corner, corner + 200, corner + 201], 1), np.stack([corner, corner + 201, corner + 1], 1)]
    )
    ground = TriangleMesh(np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], 1), faces)
    scene = looking_from(scene_from(*ring(12, 2.0, 0.5)), 60.0)
    expected = np.zeros(x.size, np.int64)
    for view in scene.train_indices:
        expected += project(scene.cameras, view, torch.from_numpy(ground.vertices).float())[2].numpy()
    assert (expected > 0).sum() > 20_000
    np.testing.assert_array_equal(sight_of(ground, scene).views, expected)


def test_a_panorama_sees_all_around() -> None:
    # From within a cube: normals point inwards.
    mesh = extract_surface(lambda at: 0.55 - at.abs().max(dim=1).values, 64, 1.0)
    mesh = select_faces(mesh, np.abs(mesh.vertices[mesh.faces]).max(axis=(1, 2)) < 0.56)
    scene = scene_from((0.0, 0.0, 0.1))
    cameras = replace(
        scene.cameras,
        size=torch.tensor([[200, 100]]),
        lenses=(Lens("EQUIRECTANGULAR", (200.0, 100.0), (200, 100)),),
    )
    images = ImageStack.from_images([np.zeros((100, 200, 3), np.uint8)])
    views = sight_of(mesh, replace(scene, cameras=cameras, images=images)).views
    assert views.mean() > 0.97


def test_of_many_views_a_hundred_are_looked_through() -> None:
    scene = scene_from(*[(DISTANCE, 0.0, 0.001 * index) for index in range(130)], size=8)
    assert len(views_to_look_through(scene)) == 100
    assert views_to_look_through(scene)[0] == 0
    assert views_to_look_through(scene)[-1] == 129
    assert sight_of(ball(), scene).views.max() == 100
    few = replace(scene, train_indices=(3, 5, 9))
    assert views_to_look_through(few) == [3, 5, 9]


def test_nothing_seen_is_an_error():
    with pytest.raises(ExportError, match=r"export\.unseen"):
        cut_unseen(ball(), np.zeros(len(ball().vertices), np.int64), 1)
