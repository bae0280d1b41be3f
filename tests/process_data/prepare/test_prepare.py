"""``--prepare`` as a whole: keys, places, diagnosis, and tiny captures through COLMAP."""

import json
import logging
import re
import shlex
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import trimesh
import yaml
from PIL import Image

from process_data.prepare import PrepareConfig, parse_prepare, prepare
from process_data.prepare.colmap import (
    Pair,
    exhaustive_pairs,
    is_pure_rotation,
    progress_in,
    sequential_pairs,
)
from process_data.prepare.diagnosis import connected_groups, diagnose
from process_data.prepare.folder import ROOT, Made, claim_folder, command, write_config
from utils.errors import ConfigError, DataError
from utils.raster import render_mesh
from utils.types import TriangleMesh

SIDE = 240


def boulder() -> TriangleMesh:
    """A bumpy ball with blotches of several sizes, radius 1."""
    ball = trimesh.creation.icosphere(subdivisions=6)
    vertices = np.asarray(ball.vertices)
    generator = np.random.default_rng(3)
    waves = vertices @ generator.normal(0, 3, (3, 5)) + np.arange(5)
    bumps = np.sin(waves).sum(axis=1)
    colors = np.zeros((len(vertices), 3))
    for size in (0.3, 0.12, 0.06):
        _, cell = np.unique(np.floor(vertices / size).astype(int), axis=0, return_inverse=True)
        colors += generator.uniform(0, 85, (cell.max() + 1, 3))[cell.ravel()]
    return TriangleMesh(
        vertices * (1 + 0.06 * bumps)[:, None],
        np.asarray(ball.faces, np.int64),
        colors=colors.astype(np.uint8),
    )


def photograph(folder: Path, angles: list[float], names: list[str], wall: np.ndarray | None) -> np.ndarray:
    """Photograph the boulder from a ring of cameras, or turn it before a wall; gives the camera centres."""
    mesh = boulder()
    intrinsics = np.array([[1.3 * SIDE, 0, SIDE / 2], [0, 1.3 * SIDE, SIDE / 2], [0, 0, 1]])
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    centres = []
    for angle, name in zip(angles, names, strict=True):
        forward = -np.array([np.cos(angle), np.sin(angle), 0.3]) / np.hypot(1, 0.3)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        centres.append(-4.2 * forward)
        pose = np.stack([right, np.cross(forward, right), forward, centres[-1]], axis=1)
        view = render_mesh(mesh, pose, intrinsics, (SIDE, SIDE))
        assert view.color is not None
        behind = np.full((SIDE, SIDE, 3), 40.0) if wall is None else wall
        shown = np.where(view.mask[..., None], 255 * view.color, behind)
        noisy = np.clip(shown + generator.normal(0, 1, shown.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / name)
    return np.array(centres)


def centre_errors(model: Path, names: list[str], known: np.ndarray) -> np.ndarray:
    """Distances of the placed camera centres from the known ones after the best similarity."""
    images = pycolmap.Reconstruction(model).images.values()
    found = {image.name: image.projection_center() for image in images if image.has_pose}
    common = [index for index, name in enumerate(names) if name in found]
    points = np.array([found[names[index]] for index in common])
    matrix, _, _ = trimesh.registration.procrustes(points, known[common], reflection=False)
    return np.linalg.norm(trimesh.transform_points(points, matrix) - known[common], axis=1)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, list[str]]:
    """Ten photos over 90 degrees, whose names have spaces and letters outside of ASCII."""
    folder = tmp_path_factory.mktemp("ring") / "photos"
    names = [f"Foto Ä {index}.png" for index in range(1, 11)]
    return folder, photograph(folder, [0.17 * index for index in range(10)], names, None), names


def test_a_tiny_capture_from_photos_to_config(
    ring: tuple[Path, np.ndarray, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos, known, names = ring
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    out = tmp_path / "out"
    summary = prepare(photos, out, ["max_features=2000"])
    assert (summary.photos, summary.registered, summary.left_out) == (10, 10, ())
    assert summary.points > 100
    assert 0.0 < summary.mean_reprojection_error < 1.0
    assert centre_errors(out / "sparse" / "0", names, known).max() < 0.05
    files = {path.name for path in (out / "sparse" / "0").iterdir()}
    assert files == {"cameras.bin", "images.bin", "points3D.bin", "rigs.bin", "frames.bin"}
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(names)
    assert {path.name for path in out.iterdir()} == {
        "images",
        "sparse",
        "prepare.json",
        "colmap.log",
        "neus.yaml",
    }
    written = json.loads((out / "prepare.json").read_text())
    assert written["status"] == "done"
    assert set(written["seconds"]) == {"photos", "masks", "features", "matches", "mapping"}
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before
    # COLMAP's own chatter is in its log, not on the terminal.
    printed = capfd.readouterr()
    assert "SIFT" not in printed.out + printed.err
    assert "SIFT" in (out / "colmap.log").read_text()
    assert f"--config {shlex.quote(str(out / 'neus.yaml'))} --train" in printed.out

    with pytest.raises(DataError, match=r"was prepared before; .*overwrite=true"):
        prepare(photos, out, [])
    (out / "my notes.txt").write_text("mine")
    save_masks(photos.parent / "photos_with_masks", photos)
    again = prepare(photos.parent / "photos_with_masks", out, ["overwrite=true", "undistort=true"])
    assert again.registered == 10
    assert (out / "my notes.txt").read_text() == "mine"
    model = pycolmap.Reconstruction(out / "sparse" / "0")
    assert {camera.model.name for camera in model.cameras.values()} == {"PINHOLE"}
    for image in model.images.values():
        size = (image.camera.width, image.camera.height)
        with Image.open(out / "images" / image.name) as picture:
            assert picture.size == size
        with Image.open(out / "masks" / f"{Path(image.name).stem}.png") as mask:
            assert mask.size == size
            assert set(np.unique(np.asarray(mask))) == {0, 255}
    assert "wmask" in yaml.safe_load((out / "neus.yaml").read_text())["base"]


def save_masks(target: Path, photos: Path) -> None:
    """A capture with images/ and masks/ from plain photos."""
    (target / "images").mkdir(parents=True)
    (target / "masks").mkdir()
    for path in photos.iterdir():
        (target / "images" / path.name).write_bytes(path.read_bytes())
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[30:210, 30:210] = 255
        Image.fromarray(mask).save(target / "masks" / path.name)


def test_a_turntable_before_a_textured_wall(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    wall = np.kron(generator.uniform(0, 255, (SIDE // 6, SIDE // 6, 3)), np.ones((6, 6, 1)))
    names = [f"{index}.png" for index in range(16)]
    known = photograph(tmp_path / "photos", [0.17 * index for index in range(16)], names, wall)
    summary = prepare(tmp_path / "photos", tmp_path / "out", ["turntable=true", "max_features=2000"])
    assert summary.registered >= 15
    assert centre_errors(tmp_path / "out" / "sparse" / "0", names, known).max() < 0.1
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 16


def test_photos_that_cannot_be_placed(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        # Every picture shows something else.
        noise = generator.integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(photos / f"{index}.png")
    with pytest.raises(DataError, match="only 0 of 4 photos could be placed: no two photos share") as caught:
        prepare(photos, out, [])
    assert "left out: 0.png, 1.png, 2.png, 3.png; take photos closer together" in str(caught.value)
    assert {path.name for path in out.iterdir()} == {"colmap.log", "prepare.json"}
    written = json.loads((out / "prepare.json").read_text())
    assert (written["status"], written["photos"], written["registered"]) == ("failed", 4, 0)
    assert written["left_out"] == ["0.png", "1.png", "2.png", "3.png"]
    assert "only 0 of 4" in written["reason"]
    # What a failure left behind is not in the way of the next try.
    with pytest.raises(DataError, match="could be placed"):
        prepare(photos, out, [])


# ---------------------------------------------------------------------------------------------------- keys


def test_keys_and_values() -> None:
    assert parse_prepare([]) == PrepareConfig()
    config = parse_prepare(["frames=10", "masks=none", "turntable=true", "min_registered=1", "frames=12"])
    assert (config.frames, config.masks, config.turntable, config.min_registered) == (12, "none", True, 1.0)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("frame=10", "frame: unknown key; did you mean frames?"),
        ("frames", "override 'frames': not of the form key=value; write e.g. frames=100"),
        ("frames=many", "frames: expected int, got 'many'; correct the value"),
        ("frames=true", "frames: expected int, got 'true'; correct the value"),
        ("frames=2", "frames: 2 is below 3; give at least 3"),
        (
            "masks=hand",
            "masks: expected one of auto, none, folder, alpha, rembg, got 'hand'; correct the value",
        ),
        ("masks=[", "masks: expected one of auto, none, folder, alpha, rembg, got '['; correct the value"),
        (
            "masks=[a]",
            "masks: expected one of auto, none, folder, alpha, rembg, got '[a]'; correct the value",
        ),
        ("min_registered=.nan", "min_registered: nan is not in 0..1; 0.7 is usual"),
        ("max_size=-5", "max_size: -5 is below 64; give 0 to keep the size"),
        ("turntable=1", "turntable: expected bool, got '1'; correct the value"),
    ],
)
def test_wrong_keys_and_values_are_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_prepare([override])
    assert str(caught.value) == line
    with pytest.raises(ConfigError, match="camera_model: 'FISHY' is unknown"):
        parse_prepare(["camera_model=FISHY"])


# -------------------------------------------------------------------------------------------------- places


def test_places_that_are_refused(tmp_path: Path) -> None:
    photos = tmp_path / "work" / "photos"
    photos.mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (20, 20)).save(photos / f"{index}.png")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "link").symlink_to(photos)
    for source, out, line in [
        (tmp_path / "none", tmp_path / "out", "no such file or folder"),
        (tmp_path / "text.txt", tmp_path / "out", "neither a folder nor a video"),
        (photos, photos, "holds the photos"),
        (photos, tmp_path / "work", "holds the photos"),
        (tmp_path / "link", photos, "holds the photos"),
        (photos, tmp_path / "full", "is not empty and was not written by --prepare"),
        (photos, tmp_path / "text.txt", "is a file"),
    ]:
        for overrides in ([], ["overwrite=true"]):
            with pytest.raises(DataError, match=line):
                prepare(source, out, overrides)
    assert len(list(photos.iterdir())) == 3
    assert (tmp_path / "full" / "a").exists()


def folder_of_a_run(out: Path, status: str) -> Path:
    """A folder as a run of this status and its user may leave it; gives a photo of the user's."""
    (out / "images").mkdir(parents=True)
    (out / "images" / "mine.jpg").write_bytes(b"mine")
    (out / "prepare.json").write_text(json.dumps({"status": status}))
    (out / "colmap.log").write_text("said")
    return out / "images" / "mine.jpg"


def test_what_is_beside_the_log_of_a_failed_run_is_never_deleted(tmp_path: Path) -> None:
    mine = folder_of_a_run(tmp_path, "failed")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is not empty: images is not from --prepare"):
            claim_folder(tmp_path, overwrite)
        assert mine.read_bytes() == b"mine"
        assert (tmp_path / "prepare.json").exists()
    mine.rename(tmp_path / "notes.jpg")
    (tmp_path / "images").rmdir()
    with pytest.raises(DataError, match=r"is not empty: notes\.jpg"):
        claim_folder(tmp_path, overwrite=False)
    claim_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jpg"]


@pytest.mark.parametrize(
    ("status", "line"), [("unfinished", "holds an unfinished --prepare"), ("done", "was prepared before")]
)
def test_other_runs_are_overwritten_only_when_asked_for(tmp_path: Path, status: str, line: str) -> None:
    mine = folder_of_a_run(tmp_path, status)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=line + ".*overwrite=true"):
        claim_folder(tmp_path, overwrite=False)
    assert mine.exists()
    claim_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_run_deletes_only_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20)).save(photos / f"{index}.png")

    def fail(*arguments: object) -> None:
        assert len(list((out / "images").iterdir())) == 3
        (out / "sparse").mkdir()
        (out / "neus.yaml").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr("process_data.prepare.make_masks", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(photos, out, [])
    assert {path.name for path in out.iterdir()} == {"sparse", "neus.yaml", "prepare.json"}
    made = Made(out)
    with pytest.raises(DataError, match="appeared while --prepare was running"):
        made.path("sparse")
    made.remove_all()
    assert (out / "sparse").exists()


def test_printed_commands_can_be_pasted_into_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "my $(capture); it's" / "neus.yaml"
    for here, script, shown in [
        (ROOT, "run.py", str(config)),
        (tmp_path, str(ROOT / "run.py"), str(config.relative_to(tmp_path))),
    ]:
        monkeypatch.chdir(here)
        line = command(config, "--train")
        assert shlex.split(line) == ["python", script, "--config", shown, "--train"]
        assert shlex.quote(shown) in line


def test_the_config_works_from_the_repository_and_from_outside(tmp_path: Path) -> None:
    write_config(tmp_path, has_masks=False)
    content = yaml.safe_load((tmp_path / "neus.yaml").read_text())
    assert content["dataset"]["root_dir"] == str(tmp_path.resolve())
    assert content["base"] == str(ROOT / "confs" / "neus-colmap.yaml")


def test_inside_of_the_repository_the_config_can_move_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("process_data.prepare.folder.ROOT", tmp_path)
    out = tmp_path / "inputs" / "scene"
    out.mkdir(parents=True)
    # From a folder inside the repository, or around it, a path relative to the repository leads nowhere.
    for here, root_dir in ((tmp_path, "inputs/scene"), (out.parent, str(out)), (tmp_path.parent, str(out))):
        monkeypatch.chdir(here)
        write_config(out, has_masks=True)
        content = yaml.safe_load((out / "neus.yaml").read_text())
        assert content["base"] == "../../confs/neus-colmap-wmask.yaml"
        assert content["dataset"]["root_dir"] == root_dir
        assert Path(root_dir).resolve() == out


# ----------------------------------------------------------------------------------------------- diagnosis


def chain(num_photos: int, configuration: str, num_inliers: int = 200, skipped: int = -1) -> list[Pair]:
    """Pairs of neighbours; none between ``skipped`` and the next."""
    return [
        Pair((index, index + 1), num_inliers, configuration)
        for index in range(num_photos - 1)
        if index != skipped
    ]


@pytest.mark.parametrize(
    ("features", "sharp", "pairs", "words"),
    [
        (150, 5.0, [], "blurry or plain"),
        (150, 500.0, [], "too few features"),
        (3000, 500.0, chain(8, "UNCALIBRATED", 16), "no two photos share enough matches"),
        (3000, 500.0, chain(8, "PANORAMIC"), "no baseline: 7 of 7 pairs"),
        (3000, 500.0, chain(8, "PLANAR"), "the scene is flat"),
        (3000, 500.0, chain(8, "WATERMARK"), "match at the border only"),
        (3000, 500.0, chain(8, "CALIBRATED", skipped=3), r"groups without overlap \(4, 4 photos, and 0 that"),
        (3000, 500.0, chain(8, "CALIBRATED", 40), r"too few matches between photos \(median of 40"),
    ],
)
def test_diagnosis_of_made_up_captures(features: int, sharp: float, pairs: list[Pair], words: str) -> None:
    found = diagnose([features] * 8, pairs, [sharp] * 8)
    assert re.search(words, found.what), found
    assert len(found.remedy) > 20


def test_groups_and_pairs() -> None:
    assert connected_groups(5, [(0, 3), (3, 4)]) == [[0, 3, 4], [1], [2]]
    assert exhaustive_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    pairs = sequential_pairs(200)
    assert len(pairs) == len(set(pairs)) < len(exhaustive_pairs(200)) / 4
    assert {(0, 1), (0, 10), (0, 16), (0, 128), (0, 195)} <= set(pairs)
    assert (1, 12) not in pairs
    assert all(0 <= i < j < 200 for i, j in pairs)
    assert sequential_pairs(4) == exhaustive_pairs(4)


def test_too_few_neighbours_are_tried_again_with_all_pairs(
    ring: tuple[Path, np.ndarray, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    photos, _, _ = ring
    monkeypatch.setattr("process_data.prepare.sequential_pairs", lambda num_photos: [(0, 1), (0, 2), (1, 2)])
    with caplog.at_level(logging.WARNING):
        summary = prepare(photos, tmp_path / "out", ["matching=sequential", "max_features=1500"])
    assert summary.registered == 10
    assert "only 3 of 10 photos were placed; matching all 45 pairs" in caplog.text


def test_a_failure_says_how_far_it_came(
    ring: tuple[Path, np.ndarray, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for path in ring[0].iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    strangers = [f"{index} stranger.png" for index in range(11, 21)]
    for name in strangers:
        Image.new("RGB", (SIDE, SIDE), "gray").save(photos / name)
    with caplog.at_level(logging.INFO), pytest.raises(DataError, match="only 10 of 20 photos"):
        prepare(photos, out, ["max_features=1500"])
    written = json.loads((out / "prepare.json").read_text())
    assert (written["status"], written["photos"], written["registered"]) == ("failed", 20, 10)
    assert written["left_out"] == strangers
    assert 0.0 < written["mean_reprojection_error"] < 1.0
    assert written["mean_track_length"] > 2.0
    assert "10 photos could not be placed: " + ", ".join(strangers) in caplog.text
    assert {path.name for path in out.iterdir()} == {"colmap.log", "prepare.json"}


def test_a_turn_on_the_spot_is_told_from_a_step_along_a_wall() -> None:
    size, focal = (600, 400), 700.0
    intrinsics = np.array([[focal, 0, 300], [0, focal, 200], [0, 0, 1]])
    turn = trimesh.transformations.rotation_matrix(0.25, [0.1, 1, 0])[:3, :3]
    for step, is_rotation in ((0.0, True), (0.1, False), (0.5, False)):
        # A wall at distance 1 that faces the first camera: H = K (R + t n^T / d) K^-1.
        seen = turn + np.outer([step, 0.0, 0.0], [0.0, 0.0, 1.0])
        homography = intrinsics @ seen @ np.linalg.inv(intrinsics)
        assert is_pure_rotation(-3.0 * homography, size, size) == is_rotation, step


def test_progress_is_read_from_what_colmap_says() -> None:
    files = "I0 a] Processed file [1/3]\nI0 a]   Name: x\nI0 a] Processed file [1/1]\n"
    assert progress_in(files, "features", 4) == 2
    blocks = "I0 a] Processing block [1/4]\nI0 a] in 1.8s\nI0 a] Processing block [4/4]\n"
    assert progress_in(blocks, "matches", 200) == 150
    images = "Registering image #3 (num_reg_frames=2)\nRegistering image #9 (num_reg_frames=3)\n"
    assert progress_in(images, "mapping", 10) == 3
    assert [progress_in("", stage, 10) for stage in ("features", "matches", "mapping")] == [0, 0, 0]
