from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from process_data.inspection.conventions import (
    HYPOTHESES,
    check_conventions,
    check_matrices,
    closest_depths,
    epipolar_errors,
    read_as,
    require_convention,
    spread,
    try_hypotheses,
)
from process_data.inspection.feature_matches import (
    Matches,
    Photographs,
    angles_between,
    find_features,
    match_photographs,
)
from utils.errors import DataError
from utils.lens import lens_rays
from utils.types import Cameras, ImageStack, Lens, Scene

WIDTH, HEIGHT, FOCAL = 240, 180, 270.0
INTRINSICS = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
LENS = Lens("SIMPLE_RADIAL", (FOCAL, WIDTH / 2, HEIGHT / 2, -0.25), (WIDTH, HEIGHT))


def look_at_corner(azimuth: float, height: float) -> np.ndarray:
    """A pose that looks at the room's corner from 4 units away."""
    center = np.array([4 * np.sin(azimuth), -4 * np.cos(azimuth), height])
    forward = np.array([0.0, 0.5, 0.4]) - center
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    return np.column_stack([right, np.cross(forward, right), forward, center])


ARC = np.stack([look_at_corner(0.12 * step - 0.4, 1.0 + 0.25 * (step % 3)) for step in range(8)])


def camera_rays(lens: Lens | None) -> np.ndarray:
    """Directions through all pixel centres in the camera's axes, row by row."""
    pixels = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), -1).reshape(-1, 2)
    if lens is not None:
        return lens_rays(lens, pixels)
    return np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(INTRINSICS).T


def photograph(c2w: np.ndarray, lens: Lens | None = None) -> np.ndarray:
    """A textured floor (z = 0) that meets a textured wall (y = 1)."""
    texture = np.random.default_rng(5).integers(0, 256, (2, 80, 80, 3), np.uint8)
    floor, wall = (cv2.resize(picture, (1280, 1280), interpolation=cv2.INTER_CUBIC) for picture in texture)
    directions = camera_rays(lens) @ c2w[:, :3].T
    to_floor = np.where(directions[:, 2] < -1e-6, -c2w[2, 3] / directions[:, 2], np.inf)
    to_wall = np.where(directions[:, 1] > 1e-6, (1 - c2w[1, 3]) / directions[:, 1], np.inf)
    points = c2w[:, 3] + np.minimum(to_floor, to_wall)[:, None] * directions
    is_floor = to_floor < to_wall
    across = np.where(is_floor, points[:, 1], points[:, 2])
    at = (np.stack([points[:, 0], across], -1) * 160 + 640).astype(np.float32).reshape(HEIGHT, WIDTH, 2)
    return np.where(
        is_floor.reshape(HEIGHT, WIDTH, 1),
        cv2.remap(floor, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT),
        cv2.remap(wall, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT),
    )


def homogeneous(poses: np.ndarray) -> np.ndarray:
    return np.concatenate([poses, np.tile([[[0, 0, 0, 1.0]]], (len(poses), 1, 1))], axis=1)


def written_as(c2w: np.ndarray, axes: str, direction: str) -> np.ndarray:
    """What a file of that convention holds for OpenCV c2w poses."""
    matrices = homogeneous(c2w)
    if axes == "opengl":
        matrices = matrices @ np.diag([1, -1, -1, 1.0])
    return np.linalg.inv(matrices) if direction == "w2c" else matrices


def save(pictures: list[np.ndarray], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save([photograph(pose) for pose in ARC], tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def room_matches(room: list[Path]) -> Matches:
    sizes = [(WIDTH, HEIGHT)] * len(ARC)
    photographs = Photographs.of_files(room, intrinsics(len(ARC)), [None] * len(ARC), sizes)
    return match_photographs(photographs, ARC[:, :, :3], spread(len(ARC), 6))


def intrinsics(number: int) -> np.ndarray:
    return np.tile(INTRINSICS, (number, 1, 1))


# ---------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(("axes", "direction"), HYPOTHESES)
def test_reading_undoes_writing(axes: str, direction: str) -> None:
    written = written_as(ARC, axes, direction)
    np.testing.assert_allclose(read_as(written[2, :3], axes, direction), ARC[2], atol=1e-12)


def test_epipolar_errors_by_hand() -> None:
    eye = np.eye(3)
    left, right = np.column_stack([eye, [0, 0, 0.0]]), np.column_stack([eye, [1.0, 0, 0]])
    point = np.array([0.5, 0, 2.0])
    tilt = 0.01
    ray = point / np.linalg.norm(point)
    # The second ray of the second match leaves the plane y = 0 by an angle whose sine is known.
    tilted = np.array([-0.5, 2 * np.tan(tilt), 2.0])
    behind = np.array([0.5, 0, 2.0])
    rays = np.stack([point - [1, 0, 0], tilted, behind])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    first = np.stack([ray, ray, np.array([-0.5, 0, 2.0]) / np.linalg.norm(behind)])
    errors, in_front = epipolar_errors((left, first), (right, rays))
    assert errors[0] == pytest.approx(0, abs=1e-12)
    one_way = np.arcsin(rays[1, 1])
    other_way = np.arcsin(abs(np.cross([1, 0, 0], rays[1]) @ ray) / np.hypot(rays[1, 1], rays[1, 2]))
    assert errors[1] == pytest.approx((one_way + other_way) / 2, rel=1e-6)
    assert in_front.tolist() == [True, True, False]
    depths = closest_depths(first[:1], rays[:1], np.array([1.0, 0, 0]))
    np.testing.assert_allclose(np.concatenate(depths), np.hypot(0.5, 2), rtol=1e-9)


def test_no_baseline_has_no_epipolar_error() -> None:
    rays = np.array([[0, 0, 1.0]])
    errors, in_front = epipolar_errors((ARC[0], rays), (ARC[0], rays))
    assert np.isnan(errors).all()
    assert not in_front.any()


def test_angles_are_the_same_in_every_convention() -> None:
    angles = angles_between(ARC[:, :, :3])
    for axes, direction in HYPOTHESES:
        other = angles_between(written_as(ARC, axes, direction)[:, :3, :3])
        # arccos loses digits near 0.
        np.testing.assert_allclose(other, angles, atol=1e-5)
    turn = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
    assert angles_between(np.stack([np.eye(3), turn]))[0, 1] == pytest.approx(np.degrees(0.3))


def test_spread_takes_both_ends() -> None:
    assert spread(11, 3) == [0, 5, 10]
    assert spread(2, 6) == [0, 1]
    assert spread(1, 6) == [0]


def test_features_lie_where_they_are_drawn() -> None:
    picture = np.full((120, 160, 3), 40, np.uint8)
    # A disc around pixel (80, 60) has its centre at the continuous point (80.5, 60.5). Others lie about, as
    # one in the picture's middle alone would hide a swap of the axes.
    for column, row in ((80, 60), (40, 30), (120, 90)):
        cv2.circle(picture, (column, row), 7, (230, 230, 230), -1, cv2.LINE_AA)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.5)
    photographs = Photographs(
        np.array([[320, 240]]),
        lambda _: picture,
        lambda _, at: np.column_stack([at, 0 * at[:, :1] + 400]) / 600,
    )
    features = find_features(photographs, 0)
    for expected in ((161, 121), (81, 61), (241, 181)):
        assert np.linalg.norm(features.pixels - expected, axis=1).min() < 0.15
    assert features.shrink == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ photographs


@pytest.mark.parametrize(("axes", "direction"), HYPOTHESES)
def test_the_right_convention_wins(room_matches: Matches, axes: str, direction: str) -> None:
    matrices = written_as(ARC, axes, direction)
    report = try_hypotheses(room_matches, matrices[:, :3], ("a", "b", "c", "d"))
    assert report.winner == (axes, direction)
    assert report.scores[0].share > 0.9
    assert report.scores[0].median_error < 0.3
    assert report.scores[1].share < 0.5
    assert report.num_matches == room_matches.num_matches


def test_files_are_all_that_is_needed(room: list[Path]) -> None:
    matrices = written_as(ARC, "opengl", "w2c")
    report = check_matrices(matrices, intrinsics(len(ARC)), [], room)
    assert require_convention(report, "poses.json") == ("opengl", "w2c")


def test_intrinsics_may_be_for_another_size(room: list[Path]) -> None:
    double = INTRINSICS * [[2], [2], [1]]
    sizes = [(2 * WIDTH, 2 * HEIGHT)] * len(ARC)
    report = check_matrices(
        homogeneous(ARC), np.tile(double, (len(ARC), 1, 1)), [None] * len(ARC), room, sizes
    )
    assert report.winner == ("opencv", "c2w")
    assert report.scores[0].median_error < 0.6


def test_lenses_bend_rays(tmp_path: Path) -> None:
    paths = save([photograph(pose, LENS) for pose in ARC[:5]], tmp_path)
    errors = [
        check_matrices(homogeneous(ARC[:5]), intrinsics(5), lenses, paths).scores[0].median_error
        for lenses in ([LENS] * 5, [])
    ]
    assert errors[0] < 0.3
    assert errors[1] > 2 * errors[0]


def test_sideways_cameras_leave_the_axes_open(tmp_path: Path) -> None:
    poses = np.stack([ARC[3]] * 6)
    poses[:, :, 3] += 0.15 * np.arange(6)[:, None] * ARC[3][:, 0]
    paths = save([photograph(pose) for pose in poses], tmp_path)
    report = check_matrices(homogeneous(poses), intrinsics(6), [], paths)
    assert report.winner is None
    assert "OpenCV c2w" in report.reason
    assert "OpenGL c2w" in report.reason
    with pytest.raises(DataError) as caught:
        require_convention(report, tmp_path)
    line = str(caught.value)
    assert line.count("\n") == 0
    assert str(tmp_path) in line
    assert "dataset.convention" in line
    for name in ("OpenCV c2w", "OpenGL c2w", "OpenCV w2c", "OpenGL w2c"):
        assert name in line


def test_cameras_in_one_place_fit_everything(tmp_path: Path) -> None:
    poses = ARC.copy()
    # In w2c form the same matrices stand still only if the centre is the origin.
    poses[:, :, 3] = 0.0
    shifted = [np.column_stack([pose[:, :3], [0, -4, 1.5]]) for pose in poses]
    paths = save([photograph(pose) for pose in shifted], tmp_path)
    report = check_matrices(homogeneous(poses), intrinsics(len(ARC)), [], paths)
    assert report.winner is None
    assert "one place" in report.reason


def test_poses_of_other_photos_fit_nothing(room: list[Path]) -> None:
    shuffled = homogeneous(ARC)[[5, 2, 7, 0, 3, 6, 1, 4]]
    report = check_matrices(shuffled, intrinsics(len(ARC)), [], room)
    assert report.winner is None
    assert "no convention fits" in report.reason


def test_plain_pictures_are_not_enough(tmp_path: Path) -> None:
    paths = save([np.full((HEIGHT, WIDTH, 3), 128, np.uint8)] * len(ARC), tmp_path)
    report = check_matrices(homogeneous(ARC), intrinsics(len(ARC)), [], paths)
    assert report.winner is None
    assert "not enough matches" in report.reason
    with pytest.raises(DataError, match="not enough matches"):
        require_convention(report, tmp_path / "transforms.json")


def test_one_view_is_not_enough(room: list[Path]) -> None:
    report = check_matrices(homogeneous(ARC[:1]), intrinsics(1), [], room[:1])
    assert report.winner is None


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_bad_poses_name_their_picture(room: list[Path], bad: float) -> None:
    matrices = homogeneous(ARC)
    matrices[3, 0, 0] = bad
    with pytest.raises(DataError, match=r"3\.png"):
        check_matrices(matrices, intrinsics(len(ARC)), [], room)


def test_missing_pictures_are_named(room: list[Path]) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        check_matrices(homogeneous(ARC), intrinsics(len(ARC)), [], [*room[:-1], Path("gone.png")])


# ----------------------------------------------------------------------------------------------------- scenes


def room_scene(poses: np.ndarray, lens: Lens | None = None) -> Scene:
    """The room in a scene frame that is turned, scaled and moved against the world of ``poses``."""
    scale, center = 1.5, np.array([0.0, 0.5, 0.4])
    turn = look_at_corner(0.4, 2.0)[:, :3]
    world_from_scene = np.eye(4)
    world_from_scene[:3] = np.column_stack([scale * turn, center])
    centers = (poses[:, :, 3] - center) @ turn / scale
    c2w = np.concatenate([turn.T @ poses[:, :, :3], centers[:, :, None]], axis=2)
    images = ImageStack.from_images([photograph(pose, lens) for pose in ARC])
    number = len(ARC)
    return Scene(
        "room",
        Cameras(
            torch.from_numpy(c2w).float(),
            torch.from_numpy(intrinsics(number)).float(),
            images.size.clone(),
            (lens,) * number if lens else (),
        ),
        images,
        tuple(f"{view}.png" for view in range(number)),
        tuple(range(1, number)),
        (0,),
        torch.from_numpy(world_from_scene),
    )


@pytest.mark.parametrize(("axes", "direction"), HYPOTHESES)
def test_a_scene_that_was_read_wrongly_is_told_apart(
    room_matches: Matches, axes: str, direction: str
) -> None:
    # The photographs are the same, and so are their matches.
    report = check_conventions(room_scene(written_as(ARC, axes, direction)[:, :3]), room_matches)
    assert report.winner == (axes, direction)
    assert report.fits == ((axes, direction) == ("opencv", "c2w"))
    lines = report.table().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(report.scores[0].name)
