"""NeRF-Synthetic's layout: frames, splits and alpha, on a small capture and on Lego."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from process_data.cameras import rays_from_pixels
from process_data.formats.blender import BlenderConfig, load_blender
from utils.errors import ConfigError, DataError
from utils.types import Scene

LEGO = Path(__file__).resolve().parents[4] / "shared" / "data" / "nerf_synthetic" / "lego"
SIDE = 32
ANGLE = 0.7
FOCAL = SIDE / 2 / np.tan(ANGLE / 2)
BALL = 0.3
"""Radius of the ball at ``CENTER`` that the pictures show."""
CENTER = np.array([0.4, -0.2, 0.5])
COUNTS = {"train": 3, "val": 2, "test": 4}


def blender_pose(azimuth: float) -> np.ndarray:
    """(4, 4) camera to world as Blender has it: the camera's +y is up, and it looks along its -z."""
    center = np.array([4 * np.cos(azimuth), 4 * np.sin(azimuth), 1.5])
    backward = center / np.linalg.norm(center)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.column_stack([right, np.cross(backward, right), backward, center])
    return matrix


def ball_alpha(pose: np.ndarray) -> np.ndarray:
    """What the camera sees of the ball: 255 where the line of sight passes it, by Blender's conventions."""
    steps = (np.arange(SIDE) + 0.5 - SIDE / 2) / FOCAL
    x, y = np.meshgrid(steps, -steps)
    directions = np.stack([x, y, -np.ones_like(x)], axis=-1) @ pose[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    misses = np.linalg.norm(np.cross(directions, CENTER - pose[:3, 3]), axis=-1)
    return np.where(misses < BALL, 255, 0).astype(np.uint8)


@dataclass
class Files:
    """A small capture on disk that tests take apart."""

    root: Path
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, **options: Any) -> Scene:
        """Write the files and load them."""
        for path in self.root.glob("*.json"):
            path.unlink()
        for split, content in self.contents.items():
            (self.root / f"transforms_{split}.json").write_text(json.dumps(content))
        return load_blender(BlenderConfig(**{"root_dir": str(self.root), **options}))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A red ball on transparent black; the blue channel holds the view's position among all."""
    made = Files(tmp_path / "ball")
    position = 0
    for split, count in COUNTS.items():
        (made.root / split).mkdir(parents=True)
        frames = []
        for index in range(count):
            pose = blender_pose(0.7 * position)
            rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
            rgba[..., 0], rgba[..., 2], rgba[..., 3] = 200, position, ball_alpha(pose)
            Image.fromarray(rgba).save(made.root / split / f"r_{index}.png")
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": pose.tolist()})
            position += 1
        made.contents[split] = {"camera_angle_x": ANGLE, "frames": frames}
    return made


def test_rays_see_the_ball_where_the_alpha_shows_it(files: Files) -> None:
    scene = files.load()
    assert scene.masks is not None
    np.testing.assert_allclose(scene.world_from_scene, np.diag([1.5, 1.5, 1.5, 1.0]), atol=1e-12)
    columns, rows = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    pixels = torch.from_numpy(np.stack([columns, rows], axis=-1).reshape(-1, 2)).float()
    for view in range(len(scene.cameras)):
        rays = rays_from_pixels(scene.cameras, torch.full((len(pixels),), view), pixels)
        towards = torch.from_numpy(CENTER / 1.5).float() - rays.origins
        misses = torch.linalg.cross(rays.directions, towards).norm(dim=1) * 1.5
        mask = scene.masks.image(view).flatten() > 0
        # A hair around the rim is left to rounding.
        clear = (misses - BALL).abs() > 1e-4
        assert mask.sum() > 20
        assert torch.equal(mask[clear], (misses < BALL)[clear])


def test_test_views_are_held_out(files: Files) -> None:
    scene = files.load()
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 2), (3, 4, 5, 6))
    assert scene.image_names[:4] == ("train_r_0.png", "train_r_1.png", "train_r_2.png", "test_r_0.png")
    assert [int(scene.images.image(view)[0, 0, 2]) for view in range(7)] == [0, 1, 2, 5, 6, 7, 8]
    scene = files.load(eval_split="val")
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 2), (3, 4))
    assert scene.image_names[3] == "val_r_0.png"
    scene = files.load(eval_step=3)
    assert scene.image_names[3:] == ("test_r_0.png", "test_r_3.png")
    assert files.load(holdout=2).test_indices == (0, 2, 4, 6)


@pytest.mark.parametrize(("missing", "asked"), [("val", "val"), ("test", "test")])
def test_the_other_split_stands_in(
    files: Files, missing: str, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    del files.contents[missing]
    other = {"val": "test", "test": "val"}[missing]
    with caplog.at_level(logging.INFO):
        scene = files.load(eval_split=asked)
    assert len(scene.test_indices) == COUNTS[other]
    assert f"no transforms_{missing}.json, transforms_{other}.json is used in its place" in caplog.text


def test_without_evaluation_files_nothing_is_held_out(files: Files) -> None:
    del files.contents["val"], files.contents["test"]
    scene = files.load()
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 2), ())


def test_views_that_train_are_not_held_out(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files.contents["test"]["frames"][:2] = files.contents["train"]["frames"][:2]
    scene = files.load()
    assert scene.image_names[3:] == ("test_r_2.png", "test_r_3.png")
    assert "2 of 4 views of transforms_test.json are trained on" in caplog.text


def test_alpha_is_the_mask_or_composited(files: Files) -> None:
    scene = files.load()
    assert scene.masks is not None
    shown = scene.masks.image(0)[..., 0] > 0
    assert scene.images.image(0)[shown][:, 0].unique().tolist() == [200]
    for background, under in (("white", 255), ("black", 0)):
        scene = files.load(apply_mask=False, background=background)
        assert scene.masks is None
        assert scene.images.image(1)[0, 0].tolist() == [under] * 3
        assert scene.images.image(0)[shown].unique(dim=0).tolist() == [[200, 0, 0]]


def test_camera_keys_of_a_file_count(files: Files) -> None:
    files.contents["test"].update(fl_x=60.0, cx=15.0, w=SIDE, h=SIDE, k1=0.1)
    scene = files.load()
    np.testing.assert_allclose(scene.cameras.intrinsics[0, 0].tolist(), [FOCAL, 0, 16], rtol=1e-5)
    np.testing.assert_allclose(scene.cameras.intrinsics[3, 0].tolist(), [60, 0, 15], rtol=1e-5)
    assert [lens.model for lens in scene.cameras.lenses] == ["PINHOLE"] * 3 + ["OPENCV"] * 4


def test_root_may_be_the_file(files: Files) -> None:
    files.load()
    path = files.root / "transforms_train.json"
    assert len(load_blender(BlenderConfig(root_dir=str(path))).images) == 7


def test_bad_captures_get_one_line(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.eval_step: 0 is below 1"):
        BlenderConfig(eval_step=0)
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given"):
        load_blender(BlenderConfig())
    (tmp_path / "transforms.json").write_text("{}")
    with pytest.raises(DataError, match=r"transforms_train\.json: no such file .*dataset\.name=transforms"):
        load_blender(BlenderConfig(root_dir=str(tmp_path)))
    files.contents["test"]["frames"][1]["transform_matrix"][0][0] = float("nan")
    with pytest.raises(DataError, match=r"transforms_test\.json: frame \./test/r_1: the pose holds values"):
        files.load()
    files.contents["train"]["frames"] = []
    with pytest.raises(DataError, match=r"transforms_train\.json: has no frames"):
        files.load()


def test_photographs_without_alpha_need_masks(files: Files) -> None:
    path = files.root / "train" / "r_1.png"
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(DataError, match=r"r_1\.png: has no mask .*dataset\.apply_mask=false"):
        files.load()
    assert files.load(apply_mask=False).masks is None


@pytest.mark.skipif(not LEGO.exists(), reason=f"no real capture in {LEGO}")
def test_lego() -> None:
    scene = load_blender(BlenderConfig(root_dir=str(LEGO), img_downscale=8, eval_step=5))
    assert (len(scene.train_indices), len(scene.test_indices)) == (100, 5)
    assert scene.masks is not None
    # Every view looks at the object from outside of its region, and its principal ray meets the region.
    distances = scene.cameras.c2w[:, :, 3].norm(dim=1)
    assert distances.min() > 1.5
    middle = scene.cameras.size / 2.0
    rays = rays_from_pixels(scene.cameras, torch.arange(len(scene.cameras)), middle)
    assert (rays.near < rays.far).all()
    # The visual hull is not empty: some point near the origin lies in every mask.
    points = torch.rand(4000, 3) - 0.5
    inside = torch.ones(len(points), dtype=torch.bool)
    for view in range(0, 100, 5):
        c2w = scene.cameras.c2w[view]
        pixels = (points - c2w[:, 3]) @ c2w[:, :3] @ scene.cameras.intrinsics[view].T
        column, row = (pixels[:, :2] / pixels[:, 2:]).long().clamp(0, 99).unbind(dim=1)
        inside &= scene.masks.image(view)[row, column, 0] > 127
    assert 0.02 < inside.float().mean() < 0.6
