"""From files to a Scene, whatever the format: sizes, alpha, masks, memory, priors, splits."""

import json
import logging
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from process_data.capture import CaptureConfig, build_scene
from process_data.pictures import _use_disk
from process_data.views import Capture, View
from utils.errors import ConfigError, DataError
from utils.types import Lens, Scene, SparsePoints

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 40, 30
K = np.array([[50.0, 0.0, 21.0], [0.0, 52.0, 14.0], [0.0, 0.0, 1.0]])


def pose(index: int) -> np.ndarray:
    """Camera to world on a ring of radius 3 around the origin, looking inwards."""
    angle = 0.7 * index
    forward = -np.array([np.sin(angle), 0.0, np.cos(angle)])
    down = np.array([0.0, 1.0, 0.0])
    return np.column_stack([np.cross(down, forward), down, forward, -3.0 * forward])


def picture(index: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """Red runs with u, green says which view it is."""
    columns = np.tile(np.arange(size[0]), (size[1], 1))
    return np.stack([6 * columns % 256, np.full_like(columns, index), 0 * columns], axis=-1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def view(path: Path, index: int = 0, **options: object) -> View:
    return replace(View(path, pose(index), K.copy()), **options)


def capture_of(root: Path, *views: View, **options: object) -> Capture:
    return Capture(root, views, **{"world_from_scene": np.eye(4), **options})


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Four opaque pictures and nothing else."""
    return capture_of(
        tmp_path,
        *(view(save(tmp_path / "images" / f"{i}.png", picture(i)), i) for i in range(4)),
    )


def build(capture: Capture, **options: object) -> Scene:
    return build_scene(capture, CaptureConfig(**options))


# ----------------------------------------------------------------------------------------------------------
# frames and names


def test_poses_and_points_go_into_the_scene(capture: Capture) -> None:
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    similarity = np.eye(4)
    similarity[:3] = np.column_stack([2.0 * turn, [0.5, -0.2, 0.3]])
    positions = np.random.default_rng(0).normal(size=(5, 3))
    points = SparsePoints(
        positions, np.zeros((5, 3), np.uint8), np.full(5, np.nan), np.array([[0, 1], [3, 2]])
    )
    scene = build(replace(capture, world_from_scene=similarity, points=points))
    np.testing.assert_allclose(scene.world_from_scene, similarity, atol=1e-12)
    assert scene.points is not None
    there = np.column_stack([scene.points.positions, np.ones(5)])
    np.testing.assert_allclose((there @ similarity.T)[:, :3], positions)
    np.testing.assert_array_equal(scene.points.observations, points.observations)
    for index in range(4):
        c2w = scene.cameras.c2w[index].double().numpy()
        np.testing.assert_allclose(turn @ c2w[:, :3], pose(index)[:, :3], atol=1e-6)
        np.testing.assert_allclose(2 * turn @ c2w[:, 3] + similarity[:3, 3], pose(index)[:, 3], atol=1e-5)
        # A position projects to the same pixel from either frame.
        in_camera = c2w[:, :3].T @ (scene.points.positions.T - c2w[:, 3:])
        seen = (scene.cameras.intrinsics[index].double().numpy() @ in_camera).T
        expected = capture.views[index].project(positions)
        visible = np.isfinite(expected[:, 0])
        np.testing.assert_allclose((seen[:, :2] / seen[:, 2:])[visible], expected[visible], rtol=1e-4)


def test_names_are_unique(tmp_path: Path) -> None:
    views = [view(save(tmp_path / "images" / side / "1.png", picture(0))) for side in ("left", "right")]
    assert build(capture_of(tmp_path, *views)).image_names == ("images_left_1.png", "images_right_1.png")
    other = view(save(tmp_path / "images" / "left" / "2.png", picture(0)))
    assert build(capture_of(tmp_path, views[0], other)).image_names == ("1.png", "2.png")


def test_splits(capture: Capture) -> None:
    def split(made: Capture, **options: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
        scene = build(made, **options)
        return scene.train_indices, scene.test_indices

    own = replace(capture, test_views=(1, 3))
    assert split(capture) == ((0, 1, 2, 3), ())
    assert split(own) == ((0, 2), (1, 3))
    assert split(own, holdout=None) == ((0, 2), (1, 3))
    assert split(own, holdout=3) == ((1, 2), (0, 3))
    assert split(own, holdout=[2]) == ((0, 1, 3), (2,))
    with pytest.raises(ConfigError, match=r"dataset\.holdout"):
        build(capture, holdout=[9])


def test_a_bad_split_is_told_before_decoding(capture: Capture) -> None:
    content = capture.views[2].image_path.read_bytes()
    capture.views[2].image_path.write_bytes(content[: len(content) - 30])
    with pytest.raises(ConfigError, match=r"dataset\.holdout"):
        build(capture, holdout=1)
    with pytest.raises(DataError, match=r"2\.png: not a readable picture"):
        build(capture)


# ----------------------------------------------------------------------------------------------------------
# sizes


def test_two_sizes_with_two_focal_lengths(tmp_path: Path) -> None:
    double = np.diag([2.0, 2.0, 1.0]) @ K
    made = capture_of(
        tmp_path,
        view(save(tmp_path / "a.png", picture(0)), size=(WIDTH, HEIGHT)),
        view(save(tmp_path / "b.png", picture(1, (80, 60))), 1, size=(80, 60), intrinsics=double),
        view(save(tmp_path / "c.png", picture(2, (30, 40))), 2),
    )
    scene = build(made)
    assert scene.cameras.size.tolist() == [[40, 30], [80, 60], [30, 40]]
    np.testing.assert_allclose(scene.cameras.intrinsics[1], double)
    np.testing.assert_allclose(scene.cameras.intrinsics[2], K)
    half = build(made, img_downscale=2)
    assert half.cameras.size.tolist() == [[20, 15], [40, 30], [15, 20]]
    np.testing.assert_allclose(half.cameras.intrinsics[1], K)
    assert [int(half.images.image(index)[0, 0, 1]) for index in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("downscale", [1, 2, 1.6, 1000])
def test_downscale_follows_the_true_factor(capture: Capture, downscale: float) -> None:
    scene = build(capture, img_downscale=downscale)
    width, height = max(1, round(WIDTH / downscale)), max(1, round(HEIGHT / downscale))
    assert scene.cameras.size.tolist() == [[width, height]] * 4
    np.testing.assert_allclose(
        scene.cameras.intrinsics[0], np.diag([width / WIDTH, height / HEIGHT, 1]) @ K, rtol=1e-6
    )


def test_folder_that_was_resized_uniformly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cameras for 81x61, pictures of half the size: the intrinsics follow, rounding and all."""
    views = [view(save(tmp_path / f"{i}.png", picture(i, (40, 30))), i, size=(81, 61)) for i in range(3)]
    with caplog.at_level(logging.INFO):
        scene = build(capture_of(tmp_path, *views))
    np.testing.assert_allclose(scene.cameras.intrinsics[1], np.diag([40 / 81, 30 / 61, 1]) @ K, rtol=1e-6)
    assert "pictures are 0.4938 times the size that their cameras are for" in caplog.text


def test_lens_of_a_resized_picture_keeps_its_own_size(tmp_path: Path) -> None:
    lens = Lens("SIMPLE_RADIAL", (100.0, 40.0, 30.0, -0.1), (80, 60))
    path = save(tmp_path / "a.png", picture(0))
    scene = build(capture_of(tmp_path, view(path, size=(80, 60), lens=lens)))
    assert scene.cameras.lenses == (lens,)
    assert scene.cameras.size.tolist() == [[40, 30]]


def test_a_pinhole_among_lenses(tmp_path: Path) -> None:
    lens = Lens("SIMPLE_RADIAL", (50.0, 20.0, 15.0, -0.1), (WIDTH, HEIGHT))
    paths = [save(tmp_path / f"{i}.png", picture(i)) for i in range(2)]
    scene = build(capture_of(tmp_path, view(paths[0], lens=lens), view(paths[1], 1)))
    assert scene.cameras.lenses == (lens, Lens("PINHOLE", (50.0, 52.0, 21.0, 14.0), (WIDTH, HEIGHT)))
    skewed = view(paths[1], 1, intrinsics=np.array([[50.0, 3, 21], [0, 52, 14], [0, 0, 1]]))
    with pytest.raises(DataError, match=r"1\.png: its intrinsics have skew.*; undistort"):
        build(capture_of(tmp_path, view(paths[0], lens=lens), skewed))


def test_one_picture_of_another_size_is_named(tmp_path: Path) -> None:
    views = [view(save(tmp_path / f"{i}.png", picture(i)), i, size=(WIDTH, HEIGHT)) for i in range(4)]
    save(tmp_path / "2.png", picture(2, (20, 15)))
    with pytest.raises(DataError, match=r"2\.png: 20x15 pixels, but its camera is for 40x30; resize all"):
        build(capture_of(tmp_path, *views))


@pytest.mark.parametrize("turned", [(0,), (0, 1, 2)])
def test_turned_pictures_are_refused(tmp_path: Path, turned: tuple[int, ...]) -> None:
    """A viewer that honours EXIF has turned the pixels, so that the camera no longer fits."""
    for index in range(3):
        pixels = picture(index)
        save(tmp_path / f"{index}.png", pixels.transpose(1, 0, 2).copy() if index in turned else pixels)
    views = [view(tmp_path / f"{i}.png", i, size=(WIDTH, HEIGHT)) for i in range(3)]
    with pytest.raises(DataError, match=r"0\.png: 30x40 pixels, but its camera is for 40x30; .*EXIF"):
        build(capture_of(tmp_path, *views))


def test_orientation_tag_alone_changes_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", picture(0), exif=exif)
    scene = build(capture_of(tmp_path, view(path, size=(WIDTH, HEIGHT))))
    np.testing.assert_array_equal(scene.images.image(0), picture(0))


# ----------------------------------------------------------------------------------------------------------
# alpha and masks


def rgba(alpha: np.ndarray, color: tuple[int, int, int] = (200, 100, 50)) -> np.ndarray:
    return np.dstack([np.full((*alpha.shape, 3), color, np.uint8), alpha])


def ramp() -> np.ndarray:
    """Opaque on the left, transparent on the right, a soft column between at an odd place."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, :17] = 255
    alpha[:, 17] = 102
    return alpha


def test_alpha_channel_is_the_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = rgba(ramp())
    hidden[ramp() == 0, :3] = (0, 255, 0)
    path = save(tmp_path / "a.png", hidden)
    with caplog.at_level(logging.INFO):
        scene = build(capture_of(tmp_path, view(path)), apply_mask=True)
    assert scene.masks is not None
    np.testing.assert_array_equal(scene.masks.image(0)[..., 0], ramp())
    assert (scene.images.image(0)[:, :18] == torch.tensor([200, 100, 50])).all(), "straight, not composited"
    assert "masks: 1 alpha channels" in caplog.text


def test_hidden_colours_do_not_leak_when_downscaled(tmp_path: Path) -> None:
    hidden = rgba(ramp())
    hidden[ramp() == 0, :3] = (0, 255, 0)
    path = save(tmp_path / "a.png", hidden)
    scene = build(capture_of(tmp_path, view(path)), apply_mask=True, img_downscale=4)
    assert scene.masks is not None
    # Columns 16..19 hold one opaque, one at 102 and two transparent pixels.
    alpha = scene.masks.image(0)[0, :, 0].tolist()
    assert alpha[3:6] == [255, pytest.approx((255 + 102) / 4, abs=1), 0]
    visible = scene.images.image(0)[:, :5].int()
    assert (visible - torch.tensor([200, 100, 50])).abs().max() <= 3, "8-bit rounding at a third of opacity"


@pytest.mark.parametrize("background", ["black", "white"])
@pytest.mark.parametrize("downscale", [1, 2])
def test_transparency_without_masks_is_composited(tmp_path: Path, background: str, downscale: int) -> None:
    path = save(tmp_path / "a.png", rgba(ramp()))
    scene = build(capture_of(tmp_path, view(path)), background=background, img_downscale=downscale)
    assert scene.masks is None
    under = 255 if background == "white" else 0
    assert scene.background_color == (under / 255,) * 3
    shown = scene.images.image(0).int()
    assert (shown[:, -1] == under).all()
    assert (shown[:, 0] == torch.tensor([200, 100, 50])).all()
    share = 0.4 if downscale == 1 else (1.0 + 0.4) / 2
    expected = share * torch.tensor([200.0, 100, 50]) + (1 - share) * under
    assert (shown[:, 17 // downscale] - expected).abs().max() <= 2


def with_masks(capture: Capture, pattern: str = "masks/{}.png", folder: str | None = None) -> list[Path]:
    """A mask for every picture, 8 + index columns wide."""
    paths = []
    for index in range(len(capture.views)):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, : 8 + index] = 255
        paths.append(save(capture.root / pattern.format(index), mask))
    return paths


@pytest.mark.parametrize(
    "pattern",
    [
        *("masks/{}.png", "mask/{}.png", "masks/{}.png.png", "masks/{}_mask.png", "images/{}_mask.png"),
        *("images/masks/{}.png", "masks/{}.PNG", "mask/{}.tif"),
    ],
)
def test_masks_of_every_accepted_name(capture: Capture, pattern: str) -> None:
    with_masks(capture, pattern)
    scene = build(capture, apply_mask=True)
    assert scene.masks is not None
    assert [int(scene.masks.image(index)[0].sum()) // 255 for index in range(4)] == [8, 9, 10, 11]
    for index in range(4):
        np.testing.assert_array_equal(scene.images.image(index), picture(index), "pictures stay as they are")
    assert build(capture).masks is None, "not asked for"


def test_masks_that_the_format_names_come_first(capture: Capture) -> None:
    with_masks(capture)
    named = save(capture.root / "special.png", np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 255)
    views = (replace(capture.views[0], mask_path=named), *capture.views[1:])
    scene = build(replace(capture, views=views), apply_mask=True)
    assert scene.masks is not None
    np.testing.assert_array_equal(scene.masks.image(0)[..., 0], np.eye(HEIGHT, WIDTH) * 255)


def test_downscaled_masks_are_hard_again(capture: Capture) -> None:
    with_masks(capture)
    scene = build(capture, apply_mask=True, img_downscale=2)
    assert scene.masks is not None
    assert set(scene.masks.pixels.unique().tolist()) == {0, 255}
    # A half-covered pixel (127.5, rounded to 128) counts.
    assert [int(scene.masks.image(index)[0].sum()) // 255 for index in range(4)] == [4, 5, 5, 6]


def test_mask_file_of_a_picture_with_alpha(tmp_path: Path) -> None:
    """The file decides what is object, and what the picture does not show is plain background."""
    path = save(tmp_path / "images" / "a.png", rgba(ramp()))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :5] = 255
    save(tmp_path / "masks" / "a.png", mask)
    scene = build(capture_of(tmp_path, view(path)), apply_mask=True, background="black")
    assert scene.masks is not None
    np.testing.assert_array_equal(scene.masks.image(0)[..., 0], mask)
    assert (scene.images.image(0)[:, -1] == 0).all()


def test_masks_at_the_camera_s_size(tmp_path: Path) -> None:
    """Pictures were halved, masks were not."""
    path = save(tmp_path / "images" / "a.png", picture(0, (20, 15)))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :10] = 255
    save(tmp_path / "masks" / "a.png", mask)
    scene = build(capture_of(tmp_path, view(path, size=(WIDTH, HEIGHT))), apply_mask=True)
    assert scene.masks is not None
    assert scene.masks.image(0).shape == (15, 20, 1)
    assert (scene.masks.image(0)[:, :5] == 255).all()
    assert (scene.masks.image(0)[:, 5:] == 0).all()


def test_masks_that_do_not_fit(capture: Capture) -> None:
    paths = with_masks(capture)
    save(paths[2], np.zeros((5, 4), np.uint8))
    with pytest.raises(DataError, match=r"masks/2\.png: 4x5 pixels, but 2\.png has 40x30; give the mask"):
        build(capture, apply_mask=True)
    paths[2].unlink()
    with pytest.raises(
        DataError, match=r"images/2\.png: has no mask \(1 of 4 pictures have none\); add masks/"
    ):
        build(capture, apply_mask=True)
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"images/0\.png: has no mask \(4 of 4 .*apply_mask=false"):
        build(capture, apply_mask=True)


def test_masks_without_information(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    paths = with_masks(capture)
    save(paths[1], np.zeros((HEIGHT, WIDTH), np.uint8))
    assert build(capture, apply_mask=True).masks is not None
    assert f"1 of 4 masks are black everywhere, first {paths[1]}" in caplog.text
    for path in paths:
        save(path, np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(DataError, match=r"masks: every mask is black everywhere; 255 marks the object"):
        build(capture, apply_mask=True)
    for path in paths:
        save(path, np.full((HEIGHT, WIDTH), 255, np.uint8))
    with pytest.raises(DataError, match=r"white everywhere and carries no information; .*apply_mask=false"):
        build(capture, apply_mask=True)


# ----------------------------------------------------------------------------------------------------------
# priors


def test_priors_are_resized_and_normalised(capture: Capture) -> None:
    columns = np.tile(np.arange(WIDTH, dtype=np.float32), (HEIGHT, 1))
    views = []
    for index, one in enumerate(capture.views):
        np.save(capture.root / f"{index}_d.npy", columns)
        as_colours = np.stack([0.5 + 0 * columns, 0.5 + 0 * columns, 0 * columns])
        signed = np.dstack([0 * columns, -3 + 0 * columns, 0 * columns])
        np.save(capture.root / f"{index}_n.npy", as_colours if index else signed)
        paths = {
            "depth_path": capture.root / f"{index}_d.npy",
            "normal_path": capture.root / f"{index}_n.npy",
        }
        views.append(replace(one, **paths))
    scene = build(replace(capture, views=tuple(views)), img_downscale=2, use_priors=True)
    assert scene.depths is not None
    assert scene.normals is not None
    # Of the columns 0 and 1 only the second one knows a depth.
    expected = np.where(np.arange(20) > 0, np.arange(20) * 2 + 0.5, 1.0)
    np.testing.assert_allclose(scene.depths.image(1)[3, :, 0].float(), expected)
    assert (scene.normals.image(0) == torch.tensor([0.0, -1, 0])).all()
    assert (scene.normals.image(1) == torch.tensor([0.0, 0, -1])).all()
    for bad, what in (
        (np.zeros((3, 3, 5), np.float32), r"has shape \(3, 3, 5\); expected is a \.npy"),
        (np.zeros(7, np.float32), r"has shape \(7,\); expected is a \.npy"),
        (np.zeros((0, 5), np.float32), r"has shape \(0, 5\); expected is a \.npy"),
        (
            np.full((HEIGHT, WIDTH), np.nan),
            "holds values that are not finite; write 0 where nothing is known$",
        ),
    ):
        np.save(capture.root / "2_d.npy", bad)
        with pytest.raises(DataError, match=rf"2_d\.npy: {what}"):
            build(replace(capture, views=tuple(views)), use_priors=True)
    np.save(capture.root / "2_d.npy", np.full((HEIGHT, WIDTH), 70000.0))
    with pytest.raises(DataError, match=r"2_d\.npy: holds depths up to 70000, .*; store it in metres"):
        build(replace(capture, views=tuple(views)), use_priors=True)


# ----------------------------------------------------------------------------------------------------------
# memory


def test_disk_gives_the_same_pixels_as_memory(
    capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_masks(capture)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    in_ram = build(capture, apply_mask=True, memory="ram")
    on_disk = build(capture, apply_mask=True, memory="disk")
    for one, other in ((in_ram.images, on_disk.images), (in_ram.masks, on_disk.masks)):
        assert one is not None
        assert other is not None
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.offsets, other.offsets)
        assert other.pixels.dtype == torch.uint8
    assert not list((tmp_path / "temporary").iterdir()), "the file has no name and goes with the tensor"
    for index in range(4):
        np.testing.assert_array_equal(on_disk.images.image(index), picture(index))


Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")


@pytest.fixture
def short_of(monkeypatch: pytest.MonkeyPatch):
    def limit(memory: float, disk: float) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(int(memory)))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(int(disk), 0, int(disk)))

    return limit


NUM_BYTES = 4 * WIDTH * HEIGHT * 3


def test_refusal_when_memory_and_disk_are_short(capture: Capture, short_of) -> None:
    short_of(memory=NUM_BYTES / 2, disk=NUM_BYTES / 2)
    for memory in ("auto", "ram", "disk"):
        with pytest.raises(DataError, match=r"the pictures take .* MiB free; raise dataset\.img_downscale"):
            build(capture, memory=memory)
    assert len(build(capture, img_downscale=4).images) == 4, "the remedy helps"


def test_auto_chooses_the_disk_when_memory_is_short(
    capture: Capture, short_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = sys.modules["tempfile"].TemporaryFile
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: asked.append(1) or real(**options))
    short_of(memory=NUM_BYTES * 10, disk=0)
    build(capture)
    assert not asked
    short_of(memory=NUM_BYTES * 1.5, disk=1e9)
    build(capture)
    assert len(asked) == 1
    short_of(memory=NUM_BYTES * 1.5, disk=0)
    build(capture, memory="ram")
    build(capture)
    assert len(asked) == 1, "memory suffices where the disk does not"
    with pytest.raises(DataError, match="raise dataset"):
        build(capture, memory="disk")
    short_of(memory=NUM_BYTES, disk=0)
    with pytest.raises(DataError, match="raise dataset"):
        build(capture)


def test_need_and_room_are_told(short_of, caplog: pytest.LogCaptureFixture) -> None:
    short_of(memory=100 * 2**30, disk=10 * 2**30)
    with caplog.at_level(logging.INFO):
        assert not _use_disk(13 * 2**30, "auto")
    assert "the pictures take 13.0 GiB of 100.0 GiB free in memory" in caplog.text
    caplog.clear()
    with pytest.raises(DataError, match=r"the pictures take 110\.0 GiB, and /.* has 10\.0 GiB free; raise"):
        _use_disk(110 * 2**30, "auto")
    assert not caplog.text
    with caplog.at_level(logging.INFO):
        _use_disk(3 * 2**20, "auto")
    assert "the pictures take 3 MiB of 100.0 GiB free in memory" in caplog.text


def test_priors_count_as_memory(capture: Capture, short_of, caplog: pytest.LogCaptureFixture) -> None:
    gib = 2**30
    short_of(memory=100 * gib, disk=50 * gib)
    assert not _use_disk(30 * gib, "auto", 19 * gib)
    assert _use_disk(30 * gib, "auto", 21 * gib)
    with pytest.raises(
        DataError, match=r"the pictures and prior maps take 100\.0 GiB, and memory has 100\.0"
    ):
        _use_disk(60 * gib, "ram", 40 * gib)
    with pytest.raises(DataError, match=r"the prior maps take 96\.0 GiB, and memory .* or remove the maps"):
        _use_disk(gib, "disk", 96 * gib)
    np.save(capture.root / "d.npy", np.ones((HEIGHT, WIDTH)))
    views = tuple(replace(one, depth_path=capture.root / "d.npy") for one in capture.views)
    short_of(memory=NUM_BYTES * 1.5, disk=0)
    build(capture, memory="ram")
    with pytest.raises(DataError, match="the pictures and prior maps take"):
        build(replace(capture, views=views), memory="ram", use_priors=True)


LOAD = """
import json, resource, sys
from pathlib import Path
import numpy as np
from process_data.capture import CaptureConfig, build_scene
from process_data.views import Capture, View

def peak():
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) / 1024

folder, memory, downscale = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
k = np.array([[900.0, 0, 500], [0, 900, 500], [0, 0, 1]])
views = tuple(View(path, np.eye(4)[:3], k) for path in sorted(folder.iterdir()))
config = CaptureConfig(memory=memory, img_downscale=downscale)
build_scene(Capture(folder, views[:1], world_from_scene=np.eye(4)), config)
before = peak()
scene = build_scene(Capture(folder, views, world_from_scene=np.eye(4)), config)
print(json.dumps([peak() - before, scene.images.pixels.numel() / 2**20, str(scene.images.pixels.dtype)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("memory", "downscale", "limit"), [("ram", 4, 60.0), ("disk", 1, 60.0)])
def test_peak_memory_stays_far_below_the_full_set(
    tmp_path: Path, memory: str, downscale: int, limit: float
) -> None:
    """60 pictures of a megapixel are 172 MiB as bytes and 687 MiB as floats."""
    save(tmp_path / "0000.jpg", picture(3, (1000, 1000)), quality=50)
    for index in range(1, 60):
        (tmp_path / f"{index:04d}.jpg").hardlink_to(tmp_path / "0000.jpg")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), memory, str(downscale)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    grown, kept, dtype = json.loads(result.stdout)
    assert dtype == "torch.uint8"
    assert kept == pytest.approx(60 * 3e6 / downscale**2 / 2**20)
    assert grown < limit


# ----------------------------------------------------------------------------------------------------------
# progress and config


@pytest.mark.parametrize(("number", "shown"), [(20, False), (21, True)])
def test_progress_bar_from_21_files_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, shown: bool
) -> None:
    save(tmp_path / "0.png", picture(0))
    for index in range(1, number):
        (tmp_path / f"{index}.png").hardlink_to(tmp_path / "0.png")
    build(capture_of(tmp_path, *(view(tmp_path / f"{index}.png", index) for index in range(number))))
    assert (f"/{number} [" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_downscale", 0.5),
        ("img_downscale", float("nan")),
        ("img_downscale", float("inf")),
        ("region_scale", 0.0),
        ("region_scale", float("nan")),
        ("region_radius", 0.0),
        ("region_radius", -1.0),
        ("region_radius", float("nan")),
        ("region_center", [1.0, 2.0]),
        ("region_center", "middle"),
        ("region_center", [1.0, 2.0, "x"]),
        ("test_steps", 0),
    ],
)
def test_bad_config_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset\.{key}: .*; "):
        CaptureConfig(**{key: value})


def test_bad_region_center_is_refused_at_the_latest_when_used(capture: Capture) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.region_center"):
        build(capture, region_center=[1.0, 2.0, float("nan")])


@pytest.mark.parametrize("center", [[0.0, 1.0, 2.0], [0, 1, 2], (0, 1, 2)])
def test_good_region_centers(center: object) -> None:
    assert CaptureConfig(region_center=center).region_center == center
