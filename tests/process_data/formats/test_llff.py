from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from process_data.cameras import rays_from_pixels
from process_data.formats.llff import LLFFConfig, load_llff, ndc_of
from utils.errors import ConfigError, DataError
from utils.types import Scene

WIDTH, HEIGHT, FOCAL = 61, 43, 55.0
NEAR, FAR = 3.0, 12.0
NAMES = [f"{number:02d}.png" for number in range(8, 14)]


def pose(index: int) -> np.ndarray:
    """Camera-to-world in OpenCV axes: cameras near (5, 1, -2), all turned a little from facing (0, 0, 1)."""
    a, b = 0.03 * (index - 2), 0.02 * (index % 3 - 1)
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    center = np.array([5.0 + 0.3 * (index - 2.5), 1.0 + 0.2 * (index % 2), -2.0])
    return np.column_stack([turn_y @ turn_x, center])


def rows(num_views: int) -> np.ndarray:
    """``poses_bounds.npy`` as LLFF writes it: axes down, right, back."""
    table = []
    for index in range(num_views):
        right, down, forward, center = pose(index).T
        matrix = np.column_stack([down, right, -forward, center, [HEIGHT, WIDTH, FOCAL]])
        table.append(np.concatenate([matrix.ravel(), [NEAR + 0.1 * index, FAR]]))
    return np.array(table)


def save_pictures(folder: Path, names: list[str], size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(np.full((size[1], size[0], 3), index, np.uint8)).save(folder / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six views."""
    save_pictures(tmp_path / "images", NAMES)
    np.save(tmp_path / "poses_bounds.npy", rows(6))
    return tmp_path


def config(root: Path, **options: object) -> LLFFConfig:
    return LLFFConfig(root_dir=str(root), **options)


def to_world(scene: Scene, points: np.ndarray) -> np.ndarray:
    matrix = scene.world_from_scene.numpy()
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def miss_in_pixels(scene: Scene, num_views: int = 6) -> float:
    """Largest distance between a point's pixel and where the ray through that pixel passes the point."""
    worst = 0.0
    rng = np.random.default_rng(0)
    for view in range(num_views):
        c2w = pose(view)
        pixels = rng.uniform(0, 1, (20, 2)) * [WIDTH, HEIGHT]
        slopes = (pixels - [WIDTH / 2, HEIGHT / 2]) / FOCAL
        points = (np.column_stack([slopes, np.ones(20)]) * rng.uniform(3, 12, (20, 1))) @ c2w[:, :3].T + c2w[
            :, 3
        ]
        factor = scene.cameras.size[view].numpy() / [WIDTH, HEIGHT]
        rays = rays_from_pixels(
            scene.cameras, torch.full((20,), view), torch.from_numpy(pixels * factor).float()
        )
        origins = to_world(scene, rays.origins.double().numpy())
        steps = to_world(scene, (rays.origins + rays.directions).double().numpy()) - origins
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        closest = origins + steps * ((points - origins) * steps).sum(axis=1, keepdims=True)
        seen = (closest - c2w[:, 3]) @ c2w[:, :3]
        hit = seen[:, :2] / seen[:, 2:] * FOCAL + [WIDTH / 2, HEIGHT / 2]
        worst = max(worst, float(np.linalg.norm((hit - pixels) * factor, axis=1).max()))
    return worst


@pytest.mark.parametrize("downscale", [1, 2, 3])
def test_rays_pass_through_the_points_that_the_pixels_show(root: Path, downscale: int) -> None:
    scene = load_llff(config(root, img_downscale=downscale))
    assert scene.image_names == tuple(NAMES)
    assert scene.cameras.size[0].tolist() == [round(WIDTH / downscale), round(HEIGHT / downscale)]
    assert not scene.cameras.lenses
    assert [int(scene.images.image(view)[0, 0, 0]) for view in range(6)] == list(range(6))
    assert miss_in_pixels(scene) < 0.05


def test_axes_by_hand(tmp_path: Path) -> None:
    """A camera that looks along the world's -z with +y up: down is -y, right is +x, back is +z."""
    save_pictures(tmp_path / "images", ["a.png"])
    matrix = np.column_stack([[0, -1, 0], [1, 0, 0], [0, 0, 1], [1, 2, 3], [HEIGHT, WIDTH, FOCAL]])
    np.save(tmp_path / "poses_bounds.npy", np.concatenate([matrix.ravel(), [NEAR, FAR]])[None])
    scene = load_llff(config(tmp_path, up="none", region_center=[0, 0, 0], region_radius=1.0))
    expected = torch.tensor([[1.0, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3]])
    torch.testing.assert_close(scene.cameras.c2w[0], expected)
    torch.testing.assert_close(
        scene.cameras.intrinsics[0], torch.tensor([[55.0, 0, 30.5], [0, 55, 21.5], [0, 0, 1]])
    )


@pytest.mark.parametrize("folder", ["images_4", "images_8"])
def test_smaller_copies_stand_for_a_downscale(root: Path, folder: str) -> None:
    factor = int(folder[-1])
    size = (round(WIDTH / factor), round(HEIGHT / factor))
    save_pictures(root / folder, NAMES, size)
    scene = load_llff(config(root, img_downscale=factor))
    assert scene.cameras.size[0].tolist() == list(size)
    assert miss_in_pixels(scene) < 0.05
    by_hand = load_llff(config(root, images_dir=folder))
    assert by_hand.cameras.size.tolist() == scene.cameras.size.tolist()


@pytest.mark.parametrize("place", ["masks/{}.png", "images/{}_mask.png"])
def test_masks(root: Path, place: str) -> None:
    (root / "masks").mkdir()
    for index, name in enumerate(NAMES):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, : 8 * (index + 1)] = 255
        Image.fromarray(mask).save(root / place.format(Path(name).stem))
    scene = load_llff(config(root, apply_mask=True))
    assert scene.image_names == tuple(NAMES)
    assert scene.masks is not None
    assert [int((scene.masks.image(view)[0] > 0).sum()) for view in range(6)] == [8, 16, 24, 32, 40, 48]
    assert load_llff(config(root)).image_names == tuple(NAMES)


def test_the_region_holds_what_the_cameras_see_together(root: Path) -> None:
    scene = load_llff(config(root))
    matrix = scene.world_from_scene.numpy()
    radius = np.cbrt(np.linalg.det(matrix[:3, :3]))
    # The harmonic mean of 3.25 and 12 lies at 5.1, seen from z = -2.
    np.testing.assert_allclose(matrix[:3, 3], [5.0, 1.1, 3.1], atol=0.3)
    # Half the picture's diagonal is 0.68 focal lengths: 3.5 at that depth, and a little for the spread.
    assert 3.5 < radius < 4.7
    rays = rays_from_pixels(
        scene.cameras, torch.arange(6), torch.tensor([[WIDTH / 2, HEIGHT / 2]]).expand(6, 2)
    )
    # Near content on the optical axis lies between where the ray enters and leaves.
    nearest = (torch.tensor([NEAR + 0.1 * index for index in range(6)]) / radius).float()
    assert bool((rays.near < nearest + 1e-4).all())
    assert bool((rays.far > nearest).all())
    corners = torch.tensor([[0.0, 0.0], [WIDTH, HEIGHT]])
    for view in range(6):
        hit = rays_from_pixels(scene.cameras, torch.full((2,), view), corners)
        assert bool((hit.near <= hit.far).all())


def test_a_far_bound_near_infinity_does_not_move_the_region_away(root: Path) -> None:
    table = rows(6)
    table[:, 16] = 1e9
    np.save(root / "poses_bounds.npy", table)
    matrix = load_llff(config(root)).world_from_scene.numpy()
    # Twice the near depth of 3.25, from z = -2.
    np.testing.assert_allclose(matrix[:3, 3], [5.0, 1.1, 4.5], atol=0.4)


def test_warp(root: Path) -> None:
    options = config(root, ndc=True)
    scene = load_llff(options)
    warp = ndc_of(options, scene)
    radius = np.cbrt(np.linalg.det(scene.world_from_scene[:3, :3].numpy()))
    # The nearest content lies 3 before the cameras' plane, give or take that they are turned a little.
    assert warp.near * radius == pytest.approx(0.75 * NEAR, rel=0.02)
    rays = rays_from_pixels(
        scene.metric().cameras, torch.arange(6), torch.tensor([[WIDTH / 2, HEIGHT / 2]]).expand(6, 2)
    )
    depths = torch.tensor([[NEAR], [FAR], [1e6]]) / radius
    for depth in depths:
        content = warp.to_field(rays.origins + depth * rays.directions)
        assert float(content.abs().max()) < 1 / np.sqrt(3)
    table = rows(6)
    # One camera is far behind the others: what it calls near lies behind them.
    table[0, 13] -= 100.0
    np.save(root / "poses_bounds.npy", table)
    with pytest.raises(ConfigError, match=r"dataset\.ndc: the content of one picture lies behind"):
        ndc_of(options, load_llff(options))


def test_names_are_ordered_as_text_as_llff_does(root: Path) -> None:
    for name in NAMES[:2]:
        (root / "images" / name).rename(root / "images" / name.removeprefix("0"))
    scene = load_llff(config(root))
    assert scene.image_names[:1] == ("10.png",)
    assert scene.image_names[-2:] == ("8.png", "9.png")


def changed(index: tuple[int, ...], value: float) -> np.ndarray:
    table = rows(6)
    table[index] = value
    return table


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (rows(5), r"5 poses for 6 pictures in images/"),
        (rows(7), r"7 poses for 6 pictures in images/"),
        (rows(6)[:, :15], r"has shape \(6, 15\), not \(N, 17\)"),
        (rows(6).reshape(-1), r"has shape \(102,\)"),
        (np.zeros((0, 17)), r"has shape \(0, 17\)"),
        (changed((2, 3), np.nan), r"row 2: the pose holds values that are not finite"),
        (changed((2, 0), 100.0), r"row 2: the pose is sheared"),
        (np.zeros((6, 17)), r"row 0: the pose is singular"),
        (rows(6) * np.where(np.arange(17) % 5 == 1, -1.0, 1.0), r"row 0: the pose is mirrored"),
        (changed((3, 14), np.nan), r"row 3: height, width, focal length 43, 61, nan are no camera's"),
        (changed((3, 14), -55.0), r"row 3: height, width, focal length 43, 61, -55 are no camera's"),
        (changed((3, 4), 0.0), r"row 3: height, width, focal length 0, 61, 55 are no camera's"),
        (changed((4, 15), np.nan), r"row 4: near and far bounds nan and 12 are not 0 < near < far"),
        (changed((4, 15), 13.0), r"row 4: near and far bounds 13 and 12"),
        (changed((4, 15), -1.0), r"row 4: near and far bounds -1 and 12"),
        (np.array([["a"] * 17] * 6), r"not a readable \.npy file"),
    ],
)
def test_bad_tables_are_named(root: Path, table: np.ndarray, what: str) -> None:
    np.save(root / "poses_bounds.npy", table)
    with pytest.raises(DataError, match=rf"poses_bounds\.npy: {what}.*; "):
        load_llff(config(root))


def test_pictures_of_another_shape_are_named(root: Path) -> None:
    save_pictures(root / "images", ["10.png"], (HEIGHT, WIDTH))
    with pytest.raises(DataError, match=r"10\.png: 43x61 pixels, but its camera is for 61x43"):
        load_llff(config(root))


def test_missing_and_unreadable_files(root: Path) -> None:
    path = root / "poses_bounds.npy"
    content = path.read_bytes()
    for size in (0, 5, 60, 200, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"poses_bounds\.npy: not a readable \.npy file"):
            load_llff(config(root))
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(DataError, match=r"poses_bounds\.npy: not a readable \.npy file"):
        load_llff(config(root))
    np.savez(root / "other.npz", rows(6))
    (root / "other.npz").rename(path)
    with pytest.raises(DataError, match=r"poses_bounds\.npy: "):
        load_llff(config(root))
    path.unlink()
    with pytest.raises(DataError, match=r"poses_bounds\.npy: no such file; .*expected are images/"):
        load_llff(config(root))
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given; .*poses_bounds\.npy"):
        load_llff(LLFFConfig())
