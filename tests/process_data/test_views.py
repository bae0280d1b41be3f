from pathlib import Path

import numpy as np
import pytest
import torch

from process_data.views import (
    OPENCV_FROM_OPENGL,
    View,
    checked_pose,
    find_masks,
    find_picture,
    find_root,
    list_pictures,
    natural_key,
    pictures_in,
    without_companions,
)
from utils.errors import DataError
from utils.lens import project_to_lens
from utils.types import Lens

TURN = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
POSE = np.column_stack([TURN, [1.0, 2.0, 3.0]])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def test_pose_of_any_accepted_form() -> None:
    square = np.vstack([POSE, [0, 0, 0, 1]])
    for matrix in (POSE, square, square.tolist(), torch.from_numpy(POSE), POSE.astype(np.float32)):
        np.testing.assert_allclose(checked_pose(matrix, "a.json", "frame 1"), POSE, atol=1e-7)
    scaled = POSE * [[3.0, 3, 3, 1]]
    np.testing.assert_allclose(checked_pose(scaled, "a.json", "frame 1"), POSE, atol=1e-12)
    rounded = np.round(POSE + np.random.default_rng(0).uniform(-1e-3, 1e-3, POSE.shape), 3)
    exact = checked_pose(rounded, "a.json", "frame 1")[:, :3]
    np.testing.assert_allclose(exact.T @ exact, np.eye(3), atol=1e-12)
    assert np.linalg.det(exact) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("matrix", "what"),
    [
        (None, "not a matrix of numbers|has shape"),
        ("text", "not a matrix of numbers"),
        ([["a"] * 4] * 4, "not a matrix of numbers"),
        ([[1, 2], [3]], "not a matrix of numbers"),
        ([[{}] * 4] * 4, "not a matrix of numbers"),
        (np.eye(3), r"has shape \(3, 3\), not \(4, 4\)"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.where(POSE == 3, np.inf, POSE), "not finite"),
        (np.zeros((3, 4)), "singular"),
        (POSE * [[0.0, 1, 1, 1]], "singular"),
        (POSE[:, [0, 0, 2, 3]], "singular"),
        (POSE * [[1.0, 1, -1, 1]], r"mirrored .*determinant -1"),
        (-np.eye(4)[:3], "mirrored"),
        (np.vstack([POSE, [0, 0, 1, 0]]), "the last row of the pose is not 0 0 0 1"),
        (POSE * [[1.0, 1, 1.5, 1]], "sheared"),
        (np.array([[1.0, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), "sheared"),
    ],
)
def test_bad_poses(matrix: object, what: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.json: frame 7: .*({what}).*; write the poses again"):
        checked_pose(matrix, "a.json", "frame 7")


def test_camera_axes_of_opengl() -> None:
    np.testing.assert_array_equal(OPENCV_FROM_OPENGL @ [1, 2, 3], [1, -2, -3])


def test_projection_through_a_view(files: Path) -> None:
    view = View(files / "a.png", POSE, np.array([[100.0, 2, 50], [0, 110, 40], [0, 0, 1]]), (100, 80))
    in_camera = np.array([[0.0, 0, 2], [0.2, 0.4, 1], [0, 0, -1], [1, 1, 0]])
    pixels = view.project(in_camera @ TURN.T + [1, 2, 3])
    np.testing.assert_allclose(pixels[:2], [[50, 40], [100 * 0.2 + 2 * 0.4 + 50, 110 * 0.4 + 40]])
    assert np.isnan(pixels[2:]).all()


def test_projection_through_a_lens(files: Path) -> None:
    lens = Lens("SIMPLE_RADIAL", (100.0, 50.0, 40.0, -0.1), (100, 80))
    view = View(files / "a.png", POSE, np.diag([100.0, 100, 1]), (100, 80), lens)
    in_camera = np.array([[0.2, 0.4, 1.0], [0, 0, -1.0]])
    pixels = view.project(in_camera @ TURN.T + [1, 2, 3])
    np.testing.assert_allclose(pixels[0], project_to_lens(lens, in_camera)[0])
    # r^2 = 0.2, so distances from the centre shrink by 2 %.
    np.testing.assert_allclose(pixels[0], [50 + 0.98 * 20, 40 + 0.98 * 40])
    assert np.isnan(pixels[1]).all()


def test_root(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given; .*one folder"):
        find_root(None, "one folder")
    with pytest.raises(DataError, match=r"nowhere: no such folder; check dataset\.root_dir"):
        find_root(str(files / "nowhere"), "one folder")
    (files / "here").mkdir()
    monkeypatch.setenv("HOME", str(files))
    assert find_root("~/here", "one folder") == (files / "here").resolve()
    (files / "link").symlink_to(files / "here")
    assert find_root(str(files / "link"), "one folder").is_dir()
    (files / "file").touch()
    with pytest.raises(DataError, match="file: no such folder"):
        find_root(str(files / "file"), "one folder")


def test_listing_is_natural_and_leaves_out_what_is_no_picture(files: Path) -> None:
    touch(files, "10.png", "2.JPG", "1.jpeg", "a1.tif", "._1.jpg", ".hidden.png", "notes.txt", "01.png")
    (files / "3.png").mkdir()
    (files / "4.png").symlink_to(files / "gone.png")
    assert [path.name for path in list_pictures(files, "x")] == [
        *("01.png", "1.jpeg", "2.JPG", "10.png", "a1.tif"),
    ]
    with pytest.raises(DataError, match=r"none: no such folder; .*layout text"):
        list_pictures(files / "none", "layout text")
    (files / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no pictures; .*layout text"):
        list_pictures(files / "empty", "layout text")


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        ("images/a.jpg", ("images/a.jpg", "images/a.png"), "images/a.jpg"),
        ("images/a.jpg", ("images/a.JPG",), "images/a.JPG"),
        ("images/a.jpg", ("images/A.jpg",), "images/A.jpg"),
        ("images/a.jpg", ("images/a.png",), "images/a.png"),
        ("images/a.jpg", ("images/a.png", "images/a.JPG"), "images/a.JPG"),
        ("images/a.jpg", ("images/a.png", "images/a.jpg.png"), "images/a.jpg.png"),
        ("images/a.jpg", ("images/A.JPG.png", "images/a.tif"), "images/A.JPG.png"),
        ("images/a.jpg", ("images/a.jpg.png", "images/a.JPG"), "images/a.JPG"),
        ("images/a.jpg.png", ("images/a.jpg.png", "images/a.jpg"), "images/a.jpg.png"),
        ("train/r_0", ("train/r_0.png", "train/r_0_depth_0001.png"), "train/r_0.png"),
        ("train/r_0.5", ("train/r_0.5.png", "train/r_0.png"), "train/r_0.5.png"),
        ("images/a b é.jpg", ("images/a b é.jpg",), "images/a b é.jpg"),
        ("images/a.jpg", ("images/b.jpg",), None),
        ("images/a.jpg", ("images/._a.jpg",), None),
        ("gone/a.jpg", ("images/a.jpg",), None),
    ],
)
def test_finding_a_picture(files: Path, asked: str, there: tuple[str, ...], found: str | None) -> None:
    touch(files, *there)
    assert find_picture(files / asked) == (None if found is None else files / found)


def test_a_folder_or_a_dangling_link_is_no_picture(files: Path) -> None:
    (files / "a.JPG").mkdir()
    (files / "a.png").symlink_to(files / "gone.png")
    assert find_picture(files / "a.jpg") is None


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "tif", "webp"])
@pytest.mark.parametrize("name", ["cat", "cat.jpg", "cat_mask"])
@pytest.mark.parametrize("folder", ["masks", "mask", "images/masks", "images/mask"])
def test_every_accepted_mask_name(files: Path, folder: str, name: str, suffix: str) -> None:
    pictures = touch(files, "images/cat.jpg", "images/dog.jpg")
    masks = touch(files, f"{folder}/{name}.{suffix}")
    assert find_masks(files, pictures) == [masks[0], None]


def test_mask_beside_the_picture(files: Path) -> None:
    pictures = touch(files, "images/cat.jpg", "images/dog.jpg", "images/dog.png")
    masks = touch(files, "images/cat_mask.png")
    assert find_masks(files, pictures[:2]) == [masks[0], None], "dog.png beside dog.jpg is no mask"


@pytest.mark.parametrize("mask", ["masks/left/cat.png", "masks/images/left/cat.png", "masks/cat.png"])
def test_masks_of_subfolders(files: Path, mask: str) -> None:
    pictures = touch(files, "images/left/cat.jpg")
    masks = touch(files, mask)
    assert find_masks(files, pictures) == masks


def test_masks_in_another_case(files: Path) -> None:
    pictures = touch(files, "images/IMG_0.JPG", "images/img_1.jpg", "images/img_2.jpg")
    masks = touch(files, "masks/img_0.png", "masks/IMG_1.JPG.Png", "masks/IMG_2.png", "masks/img_2.tif")
    assert find_masks(files, pictures) == [*masks[:2], masks[3]], "the same case goes first"


def test_natural_order_of_any_digits() -> None:
    names = ["10.png", "2.png", "1²3.png", "①00.png", "٣.png"]
    ordered = [path.name for path in sorted(map(Path, names), key=natural_key)]
    assert ordered.index("2.png") < ordered.index("10.png")
    assert sorted(ordered) == sorted(names)


def test_same_names_in_two_subfolders_have_their_own_masks(files: Path) -> None:
    pictures = touch(files, "images/left/cat.jpg", "images/right/cat.jpg")
    masks = touch(files, "masks/left/cat.png", "masks/right/cat.png")
    assert find_masks(files, pictures) == masks


def test_pictures_outside_of_the_root(files: Path) -> None:
    pictures = touch(files, "elsewhere/cat.jpg")
    (files / "capture").mkdir()
    assert find_masks(files / "capture", pictures) == [None]


def test_masks_and_maps_beside_photographs_are_no_photographs(files: Path) -> None:
    photos = touch(files, "2.jpg", "10.PNG", "depth.png", "man_mask.jpg", "the_normal.png", "b/_depth.png")
    touch(files, "2_depth.png", "10_Normal.tif", "the_normal_depth.png")
    masks = touch(files, "2_mask.png", "10_MASK.png", "depth_mask.PNG", "man_mask_mask.jpg")
    masks += touch(files, "2_foreground_mask.png")
    # A map of another folder's picture lies beside no picture of its name.
    other = touch(files, "b/2_depth.png")
    assert pictures_in(files) == photos[:5]
    assert find_masks(files, photos[:4]) == masks[:4]
    assert set(without_companions(path for path in files.rglob("*") if path.is_file())) == {*photos, *other}
