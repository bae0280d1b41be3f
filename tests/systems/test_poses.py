"""Refined camera poses: rotations, gauge, rays, gradients, what a run learns and leaves behind."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_resume import differences
from tiny import before_step, new_trainer, raiser, resumed_trainer, tiny_config, tiny_model, tiny_scene
from torch import Tensor

from process_data import load_scene
from process_data.batches import RayBatches
from process_data.cameras import image_rays
from process_data.formats.transforms import TransformsConfig
from systems import checkpoint
from systems.poses import PoseConfig, PoseRefinement, rotate
from systems.system import given
from utils.errors import CheckpointError, ConfigError
from utils.types import Progress, Rays, Scene

REFINE = ("trainer.poses.refine=true", "trainer.poses.start=0")
DONE = Progress(1.0, 1.0, 4.0, {})


def refinement(scene: Scene, scale: float = 0.05) -> PoseRefinement:
    """Poses with random motions."""
    poses = PoseRefinement(PoseConfig(refine=True), scene)
    with torch.no_grad():
        poses.per_image += scale * torch.randn(poses.per_image.shape)
    return poses


# Rotations


def test_rotate_by_hand() -> None:
    quarter = torch.tensor([[0.0, 0.0, math.pi / 2]])
    torch.testing.assert_close(rotate(torch.tensor([[1.0, 0, 0]]), quarter), torch.tensor([[0.0, 1, 0]]))
    vectors = torch.randn(4, 3)
    assert torch.equal(rotate(vectors, torch.zeros(4, 3)), vectors)


def test_rotate_against_scipy_at_all_sizes() -> None:
    vectors, axes = torch.randn(200, 3).double(), torch.randn(200, 3).double()
    angles = torch.logspace(-9, 0.49, 200, dtype=torch.float64)[:, None]
    rotation = torch.nn.functional.normalize(axes, dim=1) * angles
    expected = torch.from_numpy(Rotation.from_rotvec(rotation.numpy()).apply(vectors.numpy()))
    torch.testing.assert_close(rotate(vectors, rotation), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.03, 0.0999, 0.1001, 2.0])
def test_derivatives_of_rotations(size: float) -> None:
    rotation = torch.nn.functional.normalize(torch.randn(3, 3).double(), dim=1) * size
    vectors = torch.randn(3, 3).double()
    assert torch.autograd.gradcheck(rotate, (vectors.requires_grad_(), rotation.requires_grad_()))


# The gauge


def test_motions_of_all_cameras_together_are_none() -> None:
    scene = tiny_scene()
    poses = refinement(scene, 0.0)
    centers = scene.cameras.c2w[list(scene.train_indices), :, 3]
    with torch.no_grad():
        poses.per_image[:, :3] = torch.tensor([0.1, -0.2, 0.3])
        poses.per_image[:, 3:] = 0.07 * centers + torch.tensor([0.3, 0.1, -0.5])
    for motion in poses.motions():
        torch.testing.assert_close(motion, torch.zeros_like(motion), atol=1e-6, rtol=0)


def test_the_gauge_is_taken_off_whatever_is_learned() -> None:
    scene = tiny_scene()
    poses = refinement(scene)
    rotation, translation = poses.motions()
    assert float(rotation.detach().abs().max()) > 0.01
    torch.testing.assert_close(rotation.mean(dim=0), torch.zeros(3), atol=1e-7, rtol=0)
    torch.testing.assert_close(translation.mean(dim=0), torch.zeros(3), atol=1e-7, rtol=0)
    centers = scene.cameras.c2w[list(scene.train_indices), :, 3]
    growth = (translation * (centers - centers.mean(dim=0))).sum()
    assert abs(float(growth.detach())) < 1e-5
    # A single camera has nothing but gauge.
    alone = refinement(replace(scene, train_indices=(3,)))
    assert all(not motion.any() for motion in alone.motions())


# Rays


def test_rays_are_those_of_the_refined_cameras() -> None:
    scene = tiny_scene()
    poses = refinement(scene)
    refined = poses.refined(scene)
    for view in (1, 2, 5):
        assert (view == 5) == (view in scene.test_indices)
        moved, expected = poses(image_rays(scene.cameras, view), DONE), image_rays(refined.cameras, view)
        for name in ("origins", "directions", "near", "far"):
            torch.testing.assert_close(getattr(moved, name), getattr(expected, name), atol=2e-5, rtol=1e-5)
        still = torch.equal(refined.cameras.c2w[view], scene.cameras.c2w[view])
        assert still == (view == 5)
    rotations = refined.cameras.c2w[:, :, :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(10, 3, 3), atol=1e-5, rtol=0)


def test_before_the_start_poses_have_no_gradient_and_after_it_they_have() -> None:
    scene = tiny_scene()
    poses = PoseRefinement(PoseConfig(refine=True, start=0.4), scene)
    rays = image_rays(scene.cameras, 1)
    early = poses(rays, replace(DONE, fraction=0.39))
    assert not early.origins.requires_grad
    assert not early.directions.requires_grad
    assert torch.equal(early.directions, rays.directions)
    late = poses(rays, replace(DONE, fraction=0.4))
    assert late.origins.requires_grad
    assert late.directions.requires_grad
    assert not late.near.requires_grad
    with torch.no_grad():
        assert not poses(rays, DONE).origins.requires_grad


def test_gradients_against_finite_differences() -> None:
    """Through rays, hash grid, normals, colours and weights, in double precision, with the samples held."""
    scene = tiny_scene()
    model = tiny_model(tiny_config("model.backend=reference"), scene).double()
    poses = refinement(scene, 0.001).double()
    batch = RayBatches(scene, seed=3).draw(60)
    rays = Rays(
        *(batch.rays.origins.double(), batch.rays.directions.double()),
        *(batch.rays.near.double(), batch.rays.far.double(), batch.rays.camera_indices),
    )
    with torch.no_grad():
        model.sdf_field.grid.table += 0.05 * torch.randn_like(model.sdf_field.grid.table)
        held = model.sample(batch.rays, DONE, None)
    samples = replace(held[0], t_starts=held[0].t_starts.double(), t_ends=held[0].t_ends.double())
    vars(model)["sample"] = lambda *_: (samples, held[1])

    def loss() -> Tensor:
        render = model.render(poses(rays, DONE), DONE, torch.ones(3).double())
        return (render.rgb - batch.rgb.double()).square().sum()

    (gradient,) = torch.autograd.grad(loss(), poses.per_image)
    step = 1e-6
    for row, column in ((0, 0), (1, 1), (3, 2), (4, 3), (6, 4), (7, 5)):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                poses.per_image[row, column] += sign * step
                found.append(float(loss()))
                poses.per_image[row, column] -= sign * step
        difference = (found[0] - found[1]) / (2 * step)
        assert float(gradient[row, column]) == pytest.approx(difference, rel=1e-3, abs=1e-5)


# Training


def disturbed(scene: Scene) -> Scene:
    """The training views' cameras turned by about a degree, and moved by a hundredth of their distance."""
    poses = PoseRefinement(PoseConfig(refine=True), scene)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        noise = torch.randn(poses.per_image.shape, generator=generator).view(-1, 2, 3)
        noise = torch.nn.functional.normalize(noise, dim=2) * torch.tensor([[math.radians(1.0)], [0.0285]])
        poses.per_image += noise.view(-1, 6)
    return poses.refined(scene)


def pixels_off(scene: Scene, other: Scene) -> float:
    """Mean distance between the pictures of points on the object, over the training views."""
    points = 0.5 * torch.nn.functional.normalize(
        torch.randn(300, 3, generator=torch.Generator().manual_seed(1)), dim=1
    )
    off = []
    for view in scene.train_indices:
        pixels = []
        for cameras in (scene.cameras, other.cameras):
            pose = cameras.c2w[view]
            local = (points - pose[:, 3]) @ pose[:, :3] @ cameras.intrinsics[view].T
            pixels.append(local[:, :2] / local[:, 2:])
        off.append((pixels[0] - pixels[1]).norm(dim=1).mean())
    return float(torch.stack(off).mean())


def test_disturbed_poses_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = tiny_scene()
    wrong = disturbed(scene)
    options = (*REFINE, "trainer.poses.rate=2e-3", "trainer.max_steps=120")
    training = new_trainer(tmp_path, *options, scene=wrong)
    before = pixels_off(scene, wrong)
    with caplog.at_level(logging.INFO):
        training.train()
    refined = given(training.poses).refined(wrong)
    assert before > 0.5
    assert pixels_off(scene, refined) < 0.75 * before
    (line,) = [entry.getMessage() for entry in caplog.records if "poses:" in entry.getMessage()]
    moved = given(training.poses).report(wrong)
    assert 0.1 < moved["mean_rotation"] < moved["max_rotation"] < 3.0
    assert f"turned by {moved['mean_rotation']:.3g} degrees" in line
    # What was written loads as a capture with the refined cameras, in the world.
    path = training.run.save / "cameras_refined.json"
    loaded = load_scene(TransformsConfig(root_dir=str(path), apply_mask=True))
    assert len(loaded.train_indices) == 8
    for view in range(10):
        ours = world_pose(refined, view)
        np.testing.assert_allclose(world_pose(loaded, view), ours, atol=1e-5)
    assert torch.equal(loaded.images.pixels, scene.images.pixels)


def world_pose(scene: Scene, view: int) -> np.ndarray:
    similarity, pose = scene.world_from_scene.numpy(), scene.cameras.c2w[view].double().numpy()
    center = similarity[:3, :3] @ pose[:, 3] + similarity[:3, 3]
    return np.column_stack([similarity[:3, :3] / scene.world_scale @ pose[:, :3], center])


def test_resume_is_exact_and_wants_the_same(tmp_path: Path) -> None:
    options = (*REFINE, "trainer.max_steps=12")
    straight = new_trainer(tmp_path / "straight", *options)
    straight.train()
    first = new_trainer(tmp_path / "broken", *options)
    before_step(first, 6, raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = resumed_trainer(first, *options)
    second.train()
    states = [checkpoint.load(run.run.checkpoints / "last.pth") for run in (straight, second)]
    for state in states:
        del state["train_seconds"], state["random"]
    assert differences(*states) == []
    assert states[0]["poses"]["per_image"].any()
    with pytest.raises(
        CheckpointError, match=r"trained with refinement of poses; set trainer\.poses\.refine="
    ):
        resumed_trainer(first)
    plain = new_trainer(tmp_path / "plain", "trainer.max_steps=1")
    plain.train()
    with pytest.raises(CheckpointError, match="trained without refinement of poses"):
        resumed_trainer(plain, *REFINE)


def test_off_nothing_is_there(tmp_path: Path) -> None:
    training = new_trainer(tmp_path)
    assert training.poses is None
    assert "poses" not in checkpoint.load(training.save_checkpoint())
    assert [group["name"] for group in training.optimizer.param_groups] == ["grid", "networks", "variance"]


# Bad input


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.poses\.start: must lie in \[0, 1\), got 1"):
        PoseConfig(start=1.0)
    with pytest.raises(ValueError, match=r"trainer\.poses\.rate: must lie in \(0, 0\.1\], got 0"):
        PoseConfig(rate=0.0)
    with pytest.raises(
        ConfigError, match=r"trainer\.poses\.refine: system\.loss\.photo_consistency compares"
    ):
        new_trainer(tmp_path, *REFINE, "system.loss.photo_consistency=0.5")
