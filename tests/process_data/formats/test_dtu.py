import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from process_data import load_scene
from process_data.formats.dtu import DTUConfig, load_dtu
from utils.errors import ConfigError, DataError

WIDTH, HEIGHT = 40, 30
INTRINSICS = np.array([[50.0, 1.5, 19.0], [0, 55, 16], [0, 0, 1]])
"""For continuous pixel coordinates (centres at +0.5)."""
SCALE, SHIFT = 120.0, np.array([3.0, -20.0, 600.0])
TURN = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])


def pose(index: int) -> np.ndarray:
    """Camera-to-scene pose on a ring of radius 3, looking at the origin."""
    angle = 0.7 * index
    forward = -np.array([np.sin(angle), 0.0, np.cos(angle)])
    down = np.array([0.0, 1.0, 0.0])
    return np.column_stack([np.cross(down, forward), down, forward, -3.0 * forward])


def scale_mat() -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3] = np.column_stack([SCALE * TURN, SHIFT])
    return matrix


def world_mat(index: int) -> np.ndarray:
    """Projects world points to pixels whose centres are integers, as NeuS writes it."""
    rotation, center = pose(index)[:, :3].T, pose(index)[:, 3]
    integer_centres = INTRINSICS - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    matrix = np.eye(4)
    matrix[:3] = (
        integer_centres @ np.column_stack([rotation, -rotation @ center]) @ np.linalg.inv(scale_mat())
    )
    # The scale of a projection matrix means nothing.
    return matrix * np.array([[7.0], [7.0], [7.0], [1.0]])


@dataclass
class Capture:
    """A small capture on disk that tests take apart."""

    root: Path
    matrices: dict[str, np.ndarray] = field(default_factory=dict)

    def save_cameras(self, name: str = "cameras_sphere.npz") -> None:
        np.savez(self.root / name, **self.matrices)

    def config(self, **options: object) -> DTUConfig:
        return DTUConfig(root_dir=str(self.root), **options)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Four views whose names sort naturally but not as text; the green channel holds the view's position."""
    made = Capture(tmp_path / "scan1")
    (made.root / "image").mkdir(parents=True)
    (made.root / "mask").mkdir()
    columns = np.tile(np.arange(WIDTH), (HEIGHT, 1))
    for index, name in enumerate(("1", "2", "10", "11")):
        picture = np.stack([6 * columns, np.full_like(columns, index), columns * 0], axis=-1).astype(np.uint8)
        Image.fromarray(picture).save(made.root / "image" / f"{name}.png")
        Image.fromarray(((columns < 8 + index) * 255).astype(np.uint8)).save(
            made.root / "mask" / f"00{name}.png"
        )
        made.matrices[f"world_mat_{index}"] = world_mat(index)
        made.matrices[f"scale_mat_{index}"] = scale_mat()
    made.save_cameras()
    return made


def test_cameras_and_frames(capture: Capture) -> None:
    scene = load_dtu(capture.config())
    assert scene.name == "scan1"
    assert scene.image_names == ("1.png", "2.png", "10.png", "11.png")
    assert [int(scene.images.image(view)[0, 0, 1]) for view in range(4)] == [0, 1, 2, 3]
    assert scene.masks is None
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 2, 3), ())
    for view in range(4):
        np.testing.assert_allclose(scene.cameras.intrinsics[view], INTRINSICS, atol=1e-4)
        np.testing.assert_allclose(scene.cameras.c2w[view], pose(view), atol=1e-5)
    np.testing.assert_allclose(scene.world_from_scene, scale_mat())


@pytest.mark.parametrize("region_scale", [1.0, 1.5])
def test_scene_goes_back_to_the_world_as_the_files_say(capture: Capture, region_scale: float) -> None:
    scene = load_dtu(capture.config(region_scale=region_scale))
    scale = np.cbrt(np.linalg.det(scene.world_from_scene[:3, :3].numpy()))
    assert scale == pytest.approx(SCALE * region_scale)
    point = np.array([0.2, -0.3, 0.4, 1.0])
    for view in range(4):
        c2w = scene.cameras.c2w[view].double().numpy()
        in_camera = c2w[:, :3].T @ (point[:3] - c2w[:, 3])
        seen = scene.cameras.intrinsics[view].double().numpy() @ in_camera
        from_world = world_mat(view) @ scene.world_from_scene.numpy() @ point
        np.testing.assert_allclose(seen[:2] / seen[2], from_world[:2] / from_world[2] + 0.5, atol=1e-4)


@pytest.mark.parametrize("downscale", [2, 4, 1.6])
def test_downscaled_colours_stay_where_the_camera_sees_them(capture: Capture, downscale: float) -> None:
    scene = load_dtu(capture.config(img_downscale=downscale))
    width, height = scene.cameras.size[0].tolist()
    assert (width, height) == (round(WIDTH / downscale), round(HEIGHT / downscale))
    factor = np.diag([width / WIDTH, height / HEIGHT, 1.0])
    np.testing.assert_allclose(scene.cameras.intrinsics[0], factor @ INTRINSICS, atol=1e-4)
    # The red channel is 6 (u - 0.5) at full size, so a small pixel's centre says which u it came from.
    red = scene.images.image(0)[height // 2, :, 0].double().numpy()
    u_full = (np.arange(width) + 0.5) * WIDTH / width
    # Rounding to 8 bits moves u by 1/12 pixel, partly covered pixels add a little at odd factors.
    np.testing.assert_allclose(red / 6 + 0.5, u_full, atol=0.3 if downscale == 1.6 else 0.1)


def test_odd_sizes_scale_by_their_true_factor(capture: Capture) -> None:
    Image.fromarray(np.zeros((25, 33, 3), np.uint8)).save(capture.root / "image" / "2.png")
    scene = load_dtu(capture.config(img_downscale=2))
    assert scene.cameras.size.tolist() == [[20, 15], [16, 12], [20, 15], [20, 15]]
    np.testing.assert_allclose(
        scene.cameras.intrinsics[1], np.diag([16 / 33, 12 / 25, 1]) @ INTRINSICS, atol=1e-4
    )


def test_masks_match_by_number(capture: Capture) -> None:
    scene = load_dtu(capture.config(apply_mask=True, img_downscale=2))
    assert scene.masks is not None
    # 8, 9, 10 and 11 columns halve to 4, 4.5, 5 and 5.5; a half-covered pixel (127.5, rounded to 128) counts.
    assert [int(scene.masks.image(view)[0].sum()) // 255 for view in range(4)] == [4, 5, 5, 6]
    assert set(scene.masks.pixels.unique().tolist()) == {0, 255}
    assert scene.masks.pixels.shape == (4 * 20 * 15, 1)


def test_masks_match_by_stem_before_order(capture: Capture) -> None:
    for path in sorted((capture.root / "mask").iterdir()):
        path.rename(path.with_name(path.name.removeprefix("00")))
    (capture.root / "mask" / "12.png").write_bytes((capture.root / "mask" / "1.png").read_bytes())
    scene = load_dtu(capture.config(apply_mask=True))
    assert scene.masks is not None
    assert [int(scene.masks.image(view)[0].sum()) // 255 for view in range(4)] == [8, 9, 10, 11]


def test_masks_match_by_order_when_counts_agree(capture: Capture) -> None:
    for letter, number in zip("abcd", ("1", "2", "10", "11"), strict=True):
        (capture.root / "mask" / f"00{number}.png").rename(capture.root / "mask" / f"{letter}.png")
    scene = load_dtu(capture.config(apply_mask=True))
    assert scene.masks is not None
    assert [int(scene.masks.image(view)[0].sum()) // 255 for view in range(4)] == [8, 9, 10, 11]


@pytest.mark.parametrize("ending", ["_mask.png", "_foreground_mask.png"])
def test_masks_beside_the_pictures(capture: Capture, ending: str) -> None:
    expected = load_dtu(capture.config(apply_mask=True))
    for name in ("1", "2", "10", "11"):
        (capture.root / "mask" / f"00{name}.png").rename(capture.root / "image" / f"{name}{ending}")
    (capture.root / "mask").rmdir()
    scene = load_dtu(capture.config(apply_mask=True))
    assert scene.image_names == ("1.png", "2.png", "10.png", "11.png")
    assert scene.masks is not None
    assert expected.masks is not None
    assert torch.equal(scene.masks.pixels, expected.masks.pixels)
    assert torch.equal(scene.images.pixels, expected.images.pixels)
    assert load_dtu(capture.config()).image_names == scene.image_names
    (capture.root / "image" / f"2{ending}").unlink()
    with pytest.raises(DataError, match=r"2\.png: has no mask \(1 of 4 .*apply_mask=false"):
        load_dtu(capture.config(apply_mask=True))


def test_grey_and_upper_case_files_and_stray_ones(capture: Capture) -> None:
    (capture.root / "image" / "1.png").unlink()
    Image.fromarray(np.full((HEIGHT, WIDTH), 77, np.uint8)).save(capture.root / "image" / "1.JPG")
    (capture.root / "image" / "._1.JPG").write_bytes(b"left by a file manager")
    (capture.root / "image" / "notes.txt").write_text("not a picture")
    scene = load_dtu(capture.config())
    assert scene.image_names[0] == "1.JPG"
    assert scene.images.image(0).unique().tolist() == [77]


@pytest.mark.parametrize("folder", ["images", "rgb"])
@pytest.mark.parametrize("camera_file", ["cameras.npz", "cameras_large.npz"])
def test_other_names_of_the_same_layout(capture: Capture, folder: str, camera_file: str) -> None:
    expected = load_dtu(capture.config(apply_mask=True))
    (capture.root / "image").rename(capture.root / folder)
    (capture.root / "mask").rename(capture.root / "masks")
    (capture.root / "cameras_sphere.npz").rename(capture.root / camera_file)
    scene = load_dtu(capture.config(apply_mask=True, render_cameras_name=camera_file))
    assert torch.equal(scene.images.pixels, expected.images.pixels)
    assert scene.masks is not None
    assert expected.masks is not None
    assert torch.equal(scene.masks.pixels, expected.masks.pixels)
    assert torch.equal(scene.cameras.c2w, expected.cameras.c2w)


def test_keys_that_repeat_others_are_ignored(capture: Capture) -> None:
    expected = load_dtu(capture.config())
    for index in range(4):
        for key in ("world_mat_inv", "scale_mat_inv", "camera_mat", "camera_mat_inv"):
            capture.matrices[f"{key}_{index}"] = np.full((4, 4), np.nan)
    capture.save_cameras()
    assert torch.equal(load_dtu(capture.config()).cameras.c2w, expected.cameras.c2w)


@pytest.fixture
def mono_sdf(capture: Capture) -> Capture:
    """The same capture in MonoSDF's layout, with a gap in the names."""
    root = capture.root
    columns = np.tile(np.arange(WIDTH, dtype=np.float32), (HEIGHT, 1))
    for index, (old, new) in enumerate((("1", 0), ("2", 1), ("10", 5), ("11", 12))):
        (root / "image" / f"{old}.png").rename(root / f"{new:06d}_rgb.png")
        (root / "mask" / f"00{old}.png").rename(root / f"{new:06d}_foreground_mask.png")
        np.save(root / f"{new:06d}_depth.npy", columns / WIDTH + index)
        np.save(root / f"{new:06d}_normal.npy", np.stack([columns * 0 + 0.5, columns * 0 + 0.5, columns * 0]))
        np.save(root / f"{new:06d}_mask.npy", np.zeros((HEIGHT, WIDTH), bool))
    (root / "image").rmdir()
    (root / "mask").rmdir()
    (root / "cameras_sphere.npz").rename(root / "cameras.npz")
    return capture


def test_mono_sdf_files_in_one_folder(mono_sdf: Capture) -> None:
    scene = load_dtu(mono_sdf.config(render_cameras_name="cameras.npz", apply_mask=True, use_priors=True))
    assert scene.image_names == tuple(f"{number:06d}_rgb.png" for number in (0, 1, 5, 12))
    assert [int(scene.images.image(view)[0, 0, 1]) for view in range(4)] == [0, 1, 2, 3]
    for view in range(4):
        np.testing.assert_allclose(scene.cameras.c2w[view], pose(view), atol=1e-5)
    assert scene.masks is not None
    assert [int(scene.masks.image(view)[0].sum()) // 255 for view in range(4)] == [8, 9, 10, 11]
    assert scene.depths is not None
    assert scene.normals is not None
    assert scene.depths.image(2).dtype == torch.float16
    expected = torch.arange(WIDTH) / WIDTH + 2
    np.testing.assert_allclose(scene.depths.image(2)[7, :, 0].float(), expected, atol=2e-3)
    assert (scene.normals.image(3) == torch.tensor([0.0, 0.0, -1.0])).all()
    for use_priors in (None, False):
        without = load_dtu(mono_sdf.config(use_priors=use_priors))
        assert without.depths is None
        assert without.normals is None


def test_priors_may_be_missing(mono_sdf: Capture, caplog: pytest.LogCaptureFixture) -> None:
    for path in mono_sdf.root.glob("*_normal.npy"):
        path.unlink()
    scene = load_dtu(mono_sdf.config(use_priors=True))
    assert scene.normals is None
    assert scene.depths is not None
    (mono_sdf.root / "000005_depth.npy").unlink()
    caplog.clear()
    assert load_dtu(mono_sdf.config(use_priors=True)).depths is None
    assert "1 of 4 views have no prior map" in caplog.text
    (mono_sdf.root / "000005_depth.npy").write_text("not an array")
    with pytest.raises(DataError, match=r"000005_depth\.npy: not a readable \.npy file.*; "):
        load_dtu(mono_sdf.config(use_priors=True))


@pytest.mark.parametrize(("width", "height"), [(12, 12), (20, 15), (160, 120)])
def test_cameras_for_pictures_of_another_size_are_refused(capture: Capture, width: int, height: int) -> None:
    for path in (capture.root / "image").iterdir():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    far = rf"\(19, 16\) is far from the middle of 1\.png, which has {width}x{height} pixels"
    what = f"world_mat_0: the principal point {far}; .*first two rows"
    with pytest.raises(DataError, match=rf"cameras_sphere\.npz: {what}"):
        load_dtu(capture.config())


def test_holdout(capture: Capture) -> None:
    scene = load_dtu(capture.config(holdout=[2]))
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 3), (2,))
    with pytest.raises(ConfigError, match=r"dataset\.holdout"):
        load_dtu(capture.config(holdout=[4]))


def test_camera_file_stand_in(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    (capture.root / "cameras_sphere.npz").rename(capture.root / "cameras.npz")
    with caplog.at_level(logging.WARNING):
        load_dtu(capture.config())
    assert "cameras.npz is used in its place" in caplog.text
    (capture.root / "cameras.npz").unlink()
    with pytest.raises(DataError, match=r"cameras_sphere\.npz: no such camera file; "):
        load_dtu(capture.config())


def test_object_sphere_that_differs_is_reported(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    for key in [key for key in capture.matrices if key.startswith("scale")]:
        capture.matrices[key] = capture.matrices[key] @ np.diag([0.5, 0.5, 0.5, 1.0])
    capture.save_cameras("small.npz")
    scene = load_dtu(capture.config(object_cameras_name="small.npz"))
    assert "different spheres" in caplog.text
    np.testing.assert_allclose(scene.world_from_scene, scale_mat())
    small = load_dtu(capture.config(render_cameras_name="small.npz"))
    np.testing.assert_allclose(small.cameras.c2w[0, :, 3], 2 * scene.cameras.c2w[0, :, 3], atol=1e-5)


def break_matrix(capture: Capture, key: str, value: np.ndarray | None) -> None:
    if value is None:
        del capture.matrices[key]
    else:
        capture.matrices[key] = value
    capture.save_cameras()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("world_mat_3", None, "3 world_mat_i for 4 pictures"),
        ("world_mat_4", world_mat(0), "5 world_mat_i for 4 pictures"),
        ("scale_mat_0", None, "scale_mat_0 is missing"),
        ("world_mat_2", np.full((4, 4), np.nan), "world_mat_2 holds values that are not finite"),
        ("world_mat_2", np.zeros((4, 4)), "world_mat_2: the projection matrix is singular"),
        ("world_mat_2", np.eye(3), r"world_mat_2 has shape \(3, 3\)"),
        (
            "world_mat_1",
            world_mat(1) * -np.ones((4, 1)) @ np.diag([1, 1, -1, 1.0]),
            "world_mat_1: the camera looks away",
        ),
        ("scale_mat_0", np.diag([1.0, 1, 2, 1]), "scale_mat_0 is singular, mirrored or sheared"),
        ("scale_mat_0", np.diag([1.0, 1, -1, 1]), "scale_mat_0 is singular, mirrored or sheared"),
        ("scale_mat_0", np.zeros((4, 4)), "scale_mat_0 is singular, mirrored or sheared"),
        ("scale_mat_3", 2 * np.eye(4), "scale_mat_3 differs from scale_mat_0"),
    ],
)
def test_bad_matrices_are_named(capture: Capture, key: str, value: np.ndarray | None, what: str) -> None:
    break_matrix(capture, key, value)
    with pytest.raises(DataError, match=rf"cameras_sphere\.npz: {what}.*; "):
        load_dtu(capture.config())


def test_gap_in_numbering_is_named(capture: Capture) -> None:
    capture.matrices["world_mat_7"] = capture.matrices.pop("world_mat_1")
    capture.save_cameras()
    with pytest.raises(DataError, match="world_mat_1 is missing"):
        load_dtu(capture.config())


def test_unreadable_camera_file(capture: Capture) -> None:
    (capture.root / "cameras_sphere.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match="not a readable"):
        load_dtu(capture.config())
    np.savez(capture.root / "cameras_sphere.npz", world_mat_0=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        load_dtu(capture.config())


def test_missing_folders(capture: Capture, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given; .*https://github\.com/Totoro97/NeuS"):
        load_dtu(DTUConfig())
    with pytest.raises(DataError, match=r"nowhere: no such folder; .*expected are image"):
        load_dtu(DTUConfig(root_dir=str(tmp_path / "nowhere")))
    for path in (capture.root / "image").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="image: holds no pictures"):
        load_dtu(capture.config())
    (capture.root / "image").rmdir()
    with pytest.raises(DataError, match="image: no such folder"):
        load_dtu(capture.config())


def test_masks_are_asked_for_but_absent(capture: Capture) -> None:
    for path in (capture.root / "mask").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"mask: holds no pictures; .*apply_mask=false"):
        load_dtu(capture.config(apply_mask=True))
    (capture.root / "mask").rmdir()
    with pytest.raises(DataError, match=r"1\.png: has no mask \(4 of 4 .*apply_mask=false"):
        load_dtu(capture.config(apply_mask=True))


def test_bad_pictures_and_masks_are_named(capture: Capture) -> None:
    mask = capture.root / "mask" / "0010.png"
    content = mask.read_bytes()
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"0010\.png: 4x5 pixels, but 10\.png has 40x30"):
        load_dtu(capture.config(apply_mask=True))
    mask.unlink()
    with pytest.raises(DataError, match=r"3 masks for 4 images, none for image/10\.png"):
        load_dtu(capture.config(apply_mask=True))
    mask.write_bytes(content)
    (capture.root / "image" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.png: the file is empty"):
        load_dtu(capture.config())


def test_share_of_foreground_is_told(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    for share, path in zip((0, 10, 20, 30), sorted((capture.root / "mask").iterdir()), strict=True):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, : WIDTH * share // 100] = 255
        Image.fromarray(mask).save(path)
    with caplog.at_level(logging.INFO):
        load_dtu(capture.config(apply_mask=True))
    assert f"masks: 4 files such as {capture.root / 'mask' / '001.png'}" in caplog.text
    assert "on average 15 % of a picture is foreground" in caplog.text


def test_masks_without_information(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    paths = sorted((capture.root / "mask").iterdir())
    black = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8))
    black.save(paths[0])
    assert load_dtu(capture.config(apply_mask=True)).masks is not None
    assert "1 of 4 masks are black everywhere" in caplog.text
    for path in paths:
        black.save(path)
    with pytest.raises(DataError, match=r"every mask is black everywhere.*apply_mask=false"):
        load_dtu(capture.config(apply_mask=True))


def test_bad_config_values() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.img_downscale: 0\.5 is not 1 or more"):
        DTUConfig(img_downscale=0.5)
    with pytest.raises(ConfigError, match=r"dataset\.test_steps"):
        DTUConfig(test_steps=0)


def test_dispatch_by_name(capture: Capture) -> None:
    assert torch.equal(load_scene(capture.config()).images.pixels, load_dtu(capture.config()).images.pixels)
    with pytest.raises(ConfigError, match=r"dataset\.name: 'dtuu' is not a known format; did you mean dtu\?"):
        load_scene(capture.config(name="dtuu"))
