"""Early checks: each fires for what it is meant for, names keys that exist, and is quiet when all is well."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CPU, SECTIONS, new_run, new_trainer, tiny_config, tiny_scene
from torch import Tensor

from systems import trainer
from systems.health import check_health, check_learning, constant_color_psnr
from utils.errors import TrainingError
from utils.mesh import read_mesh
from utils.schema import keys_of
from utils.types import ImageStack, Progress, Rays, Scene

PROGRESS = Progress(1.0, 1.0, 4.0, {})


@dataclass(frozen=True)
class Ball:
    """A model whose surface is a sphere; ``sign`` -1 turns it inside out."""

    radius: float = 0.5
    sign: float = 1.0
    opacity: float = 1.0
    device: torch.device = CPU

    def frozen_at(self, progress: Progress, extent: float = 1.0) -> "Ball":
        assert progress is PROGRESS
        return self

    def query_sdf(self, positions: Tensor) -> Tensor:
        return self.sign * (positions.norm(dim=1) - self.radius)

    def render(self, rays: Rays, progress: Progress, background: Tensor) -> SimpleNamespace:
        assert background.tolist() == [1.0, 1.0, 1.0]
        closest = torch.linalg.cross(rays.origins, rays.directions).norm(dim=1)
        return SimpleNamespace(opacity=self.opacity * (closest < self.radius).float())


def warnings_for(model: Ball, outputs: Path) -> list[str]:
    return check_health(tiny_scene(), model, PROGRESS, new_run(tiny_config(), outputs))


def assert_names_keys(warning: str) -> None:
    """Every dotted key in a warning is one that a config may hold, and there is at least one."""
    named = re.findall(r"\b(?:dataset|model|system|trainer)\.[\w.]*\w", warning)
    assert named
    assert set(named) <= set(keys_of(SECTIONS))


def test_a_healthy_surface_gives_no_warning_and_a_preview_in_world_units(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    scene = tiny_scene()
    assert check_health(scene, Ball(), PROGRESS, run) == []
    preview = read_mesh(run.save / "preview.ply")
    centre = scene.world_from_scene[:3, 3].numpy()
    assert np.linalg.norm(preview.vertices - centre, axis=1) == pytest.approx(2.5 * 0.5, abs=0.01)
    line = (run.folder / "log.txt").read_text().partition("health: ")[2]
    assert line.startswith("sdf at centre -0.500, 0 % of the sphere's edge inside, ")
    assert "surface reaches 0.50 of the unit sphere" in line
    assert str(run.save / "preview.ply") in line


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Ball(sign=-1.0), "100 % of the unit sphere's edge lies inside the surface"),
        (Ball(opacity=0.0), "only 0.0 % of the training rays meet a surface"),
        (Ball(opacity=0.4), "only 0.0 % of the training rays meet a surface"),
        (Ball(radius=0.06), "the surface fills only 0.06 of the unit sphere"),
    ],
    ids=["inside out", "transparent", "half transparent", "tiny"],
)
def test_one_thing_wrong_gives_one_warning(tmp_path: Path, model: Ball, message: str) -> None:
    found = [warning for warning in warnings_for(model, tmp_path) if message in warning]
    assert len(found) == 1
    assert_names_keys(found[0])
    if message.startswith("only"):
        assert warnings_for(model, tmp_path) == found


def scene_from_within() -> Scene:
    """``tiny_scene`` with its cameras at a tenth of their distance from the middle."""
    scene = tiny_scene()
    c2w = scene.cameras.c2w.clone()
    c2w[:, :, 3] *= 0.1
    return replace(scene, cameras=replace(scene.cameras, c2w=c2w))


def test_a_room_is_solid_at_the_edge_and_empty_where_cameras_stand(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    assert check_health(scene_from_within(), Ball(radius=0.8, sign=-1.0), PROGRESS, run) == []
    (warning,) = check_health(scene_from_within(), Ball(radius=0.8), PROGRESS, run)
    assert warning.startswith("100 % of the cameras stand inside the surface: a room seen from within needs")
    assert_names_keys(warning)


@pytest.mark.parametrize("radius", [-1.0, 5.0])
def test_no_surface_at_all(tmp_path: Path, radius: float) -> None:
    warnings = warnings_for(Ball(radius=radius), tmp_path)
    found = [warning for warning in warnings if warning.startswith("no surface yet")]
    assert len(found) == 1
    assert_names_keys(found[0])
    assert not list(tmp_path.rglob("preview.ply"))


def two_pixel_scene(masks: list[int] | None) -> Scene:
    """``tiny_scene`` with pictures of one row: view 1 is (0, 51, 255), (255, 153, 255), all others black."""
    scene = tiny_scene()
    pictures = [np.zeros((1, 2, 3), np.uint8) for _ in range(10)]
    pictures[1][0] = [[0, 51, 255], [255, 153, 255]]
    size = torch.tensor([[2, 1]] * 10, dtype=torch.int64)
    return replace(
        scene,
        cameras=replace(scene.cameras, size=size),
        images=ImageStack.from_images(pictures),
        masks=None
        if masks is None
        else ImageStack.from_images([np.array(masks, np.uint8).reshape(1, 2, 1) for _ in range(10)]),
        train_indices=(1,),
        test_indices=(0, 5),
    )


def test_constant_color_by_hand() -> None:
    # Red and green vary by +-0.5 and +-0.2 about their means, blue does not.
    variance = (0.25 + 0.04 + 0.0) / 3
    assert constant_color_psnr(two_pixel_scene(None)) == pytest.approx(-10 * np.log10(variance))
    assert constant_color_psnr(two_pixel_scene([255, 255])) == pytest.approx(-10 * np.log10(variance))


def test_constant_color_with_a_random_background_by_hand() -> None:
    # Half of the pixels are the first one, the other half any colour: mean 1/2 and variance 1/12 about it.
    means = [0.5 * (color + 0.5) for color in (0.0, 0.2, 1.0)]
    squares = [0.5 * (color**2 + 0.25 + 1 / 12) for color in (0.0, 0.2, 1.0)]
    variance = np.mean([square - mean**2 for square, mean in zip(squares, means, strict=True)])
    assert constant_color_psnr(two_pixel_scene([255, 0])) == pytest.approx(-10 * np.log10(variance))


def test_a_picture_of_one_colour_is_no_division_by_zero() -> None:
    assert constant_color_psnr(replace(two_pixel_scene(None), train_indices=(2,))) == 100.0


def test_learning_needs_two_decibels() -> None:
    scene = tiny_scene()
    constant = constant_color_psnr(scene)
    assert check_learning(scene, constant + 2.1) == []
    for psnr in (constant + 1.9, constant - 5.0, float("nan")):
        (warning,) = check_learning(scene, psnr)
        assert f"is hardly above a constant colour's {constant:.1f} dB" in warning
        assert_names_keys(warning)


@pytest.mark.parametrize(
    ("check", "key"), [("check_learning", "learning_step"), ("check_health", "health_step")]
)
@pytest.mark.parametrize("strict", [True, False])
def test_strict_runs_stop_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, key: str, strict: bool
) -> None:
    calls: list[Any] = []

    def complain(*arguments: Any) -> list[str]:
        calls.append(arguments)
        return ["the poses look wrong; look at dataset.root_dir"]

    monkeypatch.setattr(trainer, check, complain)
    training = new_trainer(tmp_path, f"trainer.{key}=3", "trainer.max_steps=5", f"trainer.strict={strict}")
    if strict:
        with pytest.raises(TrainingError, match=r"^step 3: the poses look wrong"):
            training.train()
    else:
        training.train()
    assert (training.step, len(calls)) == (3 if strict else 5, 1)
    assert "CHECK the poses look wrong" in (training.run.folder / "log.txt").read_text()


def test_a_run_that_learns_passes_both_checks(tmp_path: Path) -> None:
    options = ("trainer.learning_step=60", "trainer.health_step=60", "trainer.strict=true")
    training = new_trainer(tmp_path, *options, "trainer.max_steps=61", "trainer.samples_per_step=1024")
    training.train()
    log = (training.run.folder / "log.txt").read_text()
    assert "CHECK" not in log
    assert "a constant colour reaches" in log
    assert "health: sdf at centre -0." in log


def test_learning_is_checked_with_the_psnr_of_the_steps_so_far(tmp_path: Path) -> None:
    """A row of history.csv every 50 steps must not make a check at step 40 believe in 0 dB."""
    options = ("trainer.learning_step=40", "trainer.log_every=50", "trainer.strict=true")
    training = new_trainer(tmp_path, *options, "trainer.max_steps=41", "trainer.samples_per_step=1024")
    training.train()
    assert "training PSNR 0.0 dB" not in (training.run.folder / "log.txt").read_text()
