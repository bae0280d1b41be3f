import logging
import re

import numpy as np
import pytest
import torch

from process_data.cameras import RayGenerator
from utils.lens import (
    PINHOLES,
    RayTable,
    lens_fault,
    lens_rays,
    pinhole_part,
    project,
    project_to_lens,
)
from utils.types import Cameras, Lens

pycolmap = pytest.importorskip("pycolmap")

SIZE = (640, 480)
MIDDLE = np.array([320.0, 240.0])
LENSES = {
    "SIMPLE_PINHOLE": (500, 322, 238),
    "PINHOLE": (500, 510, 322, 238),
    "SIMPLE_RADIAL": (500, 322, 238, -0.12),
    "RADIAL": (500, 322, 238, -0.2, 0.05),
    "OPENCV": (500, 510, 322, 238, -0.25, 0.08, 0.002, -0.001),
    "FULL_OPENCV": (500, 510, 322, 238, -0.2, 0.06, 0.001, -0.001, 0.01, 0.02, -0.01, 0.003),
    "FOV": (500, 510, 322, 238, 0.6),
    "SIMPLE_DIVISION": (500, 322, 238, -0.15),
    "DIVISION": (500, 510, 322, 238, -0.15),
    "EUCM": (500, 510, 322, 238, 0.6, 1.1),
    "SIMPLE_RADIAL_FISHEYE": (400, 322, 238, 0.02),
    "RADIAL_FISHEYE": (400, 322, 238, 0.02, -0.005),
    "OPENCV_FISHEYE": (300, 305, 322, 238, 0.02, -0.01, 0.002, -0.001),
    "THIN_PRISM_FISHEYE": (300, 305, 322, 238, 0.02, -0.01, 0.001, 0.001, 0.002, -0.001, 0.001, -0.001),
    "RAD_TAN_THIN_PRISM_FISHEYE": (
        *(300, 305, 322, 238, 0.02, -0.01, 0.002, -0.001, 0, 0),
        *(0.001, -0.001, 0.001, 0, -0.001, 0),
    ),
    "SIMPLE_FISHEYE": (300, 322, 238),
    "FISHEYE": (300, 305, 322, 238),
    "EQUIRECTANGULAR": SIZE,
}


def lens(model: str) -> Lens:
    return Lens(model, tuple(float(value) for value in LENSES[model]), SIZE)


def cameras(lenses: list[Lens], sizes: list[tuple[int, int]] | None = None) -> Cameras:
    n = len(lenses)
    return Cameras(
        torch.eye(4)[:3].repeat(n, 1, 1),
        torch.from_numpy(np.stack([pinhole_part(one) for one in lenses])).float(),
        torch.tensor(sizes or [one.size for one in lenses]),
        tuple(lenses),
    )


def pixels_over(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Pixels all over a picture, with its corners, its edges and the centres of its corner pixels."""
    width, height = size
    inside = np.random.default_rng(seed).uniform(0, 1, (2000, 2)) * size
    sides = np.linspace(0, 1, 21)[:, None] * np.array([[width, height]])
    edges = [np.column_stack([sides[:, 0], np.full(21, y)]) for y in (0, 0.5, height - 0.5, height)]
    edges += [np.column_stack([np.full(21, x), sides[:, 1]]) for x in (0, 0.5, width - 0.5, width)]
    return np.concatenate([inside, *edges])


def miss(one: Lens, directions: torch.Tensor, pixels: np.ndarray) -> float:
    """Pixels by which directions miss where they should lead, as the exact lens projects them."""
    return float(np.abs(project_to_lens(one, directions.double().numpy()) - pixels).max())


def read(table: RayTable, index: int, pixels: np.ndarray) -> torch.Tensor:
    return table.look_up(torch.full((len(pixels),), index), torch.from_numpy(pixels).float())[0]


def test_every_model_of_colmap_is_covered() -> None:
    assert set(LENSES) == set(pycolmap.CameraModelId.__members__) - {"INVALID"}
    assert [lens_fault(lens(model)) for model in LENSES] == [None] * len(LENSES)


def test_a_pinhole_by_hand() -> None:
    rays = lens_rays(lens("PINHOLE"), np.array([[322.0, 238.0], [822.0, 748.0]]))
    np.testing.assert_allclose(rays, [[0, 0, 1], np.ones(3) / np.sqrt(3)], atol=1e-12)
    np.testing.assert_allclose(
        project_to_lens(lens("PINHOLE"), np.array([[2.0, 2.0, 2.0]])), [[822, 748]], atol=1e-9
    )
    np.testing.assert_array_equal(pinhole_part(lens("PINHOLE")), [[500, 0, 322], [0, 510, 238], [0, 0, 1]])


def test_radial_distortion_by_hand() -> None:
    # SIMPLE_RADIAL: u = f x (1 + k r^2) + cx at x = 0.3, y = 0.4, r^2 = 0.25.
    seen = project_to_lens(lens("SIMPLE_RADIAL"), np.array([[0.3, 0.4, 1.0]]))
    np.testing.assert_allclose(seen, [[500 * 0.3 * 0.97 + 322, 500 * 0.4 * 0.97 + 238]], atol=1e-9)
    np.testing.assert_allclose(
        lens_rays(lens("SIMPLE_RADIAL"), seen)[0] * np.sqrt(1.25), [0.3, 0.4, 1.0], atol=1e-7
    )


@pytest.mark.parametrize("model", LENSES)
def test_table_agrees_with_the_exact_lens(model: str) -> None:
    one, pixels = lens(model), pixels_over(SIZE)
    if model == "EQUIRECTANGULAR":
        # At its left and right edge a panorama meets itself, and the projection may give either.
        pixels = pixels[(pixels[:, 0] > 1) & (pixels[:, 0] < SIZE[0] - 1)]
        pixels = pixels[(pixels[:, 1] > 4) & (pixels[:, 1] < SIZE[1] - 4)]
    table = RayTable.from_cameras(cameras([one]), "cpu")
    directions = read(table, 0, pixels)
    assert miss(one, directions, pixels) < 0.01
    exact = torch.from_numpy(lens_rays(one, pixels)).float()
    cosine = torch.nn.functional.cosine_similarity(directions, exact)
    assert cosine.min() > 1 - 1e-6, "no direction is turned around"


@pytest.mark.parametrize(
    ("model", "focal"),
    [
        ("SIMPLE_PINHOLE", 120.0),
        ("OPENCV", 200.0),
        ("OPENCV", 120.0),
    ],
)
def test_wide_perspective_lenses(model: str, focal: float) -> None:
    """Where the picture stretches, a small angle is many pixels."""
    if model == "SIMPLE_PINHOLE":
        one = Lens(model, (focal, 320.0, 240.0), SIZE)
    else:
        one = Lens(model, (focal, focal, 320.0, 240.0, 0.01, 0.001, 0.0005, 0.0005), SIZE)
    pixels = pixels_over(SIZE)
    assert miss(one, read(RayTable.from_cameras(cameras([one]), "cpu"), 0, pixels), pixels) < 0.01


@pytest.mark.parametrize("model", [model for model in LENSES if model.endswith("FISHEYE")])
def test_fisheye_of_200_degrees(model: str) -> None:
    """Rays at the sides come from behind the camera: the angle is r / f all the way."""
    focal = 320 / np.radians(100)
    camera = pycolmap.Camera.create_from_model_name(1, model, focal, *SIZE)
    one = Lens(model, tuple(camera.params), SIZE)
    assert lens_fault(one) is None
    offset = pixels_over(SIZE) - MIDDLE
    radius = np.linalg.norm(offset, axis=1)
    offset, radius = offset[(radius > 0) & (radius < 320)], radius[(radius > 0) & (radius < 320)]
    true = np.column_stack(
        [np.sin(radius / focal)[:, None] * offset / radius[:, None], np.cos(radius / focal)]
    )
    np.testing.assert_allclose(lens_rays(one, offset + MIDDLE), true, atol=1e-6)
    directions = read(RayTable.from_cameras(cameras([one]), "cpu"), 0, offset + MIDDLE)
    error = (torch.nn.functional.normalize(directions, dim=1) - torch.from_numpy(true)).norm(dim=1)
    assert float(error.max()) * focal < 0.01
    assert true[:, 2].min() < -0.1


def test_panorama_covers_the_sphere() -> None:
    one = lens("EQUIRECTANGULAR")
    directions = read(RayTable.from_cameras(cameras([one]), "cpu"), 0, pixels_over(SIZE))
    directions = torch.nn.functional.normalize(directions, dim=1)
    assert (directions.amin(dim=0) < -0.99).all()
    assert (directions.amax(dim=0) > 0.99).all()
    exact = torch.from_numpy(lens_rays(one, pixels_over(SIZE))).float()
    error = (directions - exact).norm(dim=1).max()
    assert float(error) * SIZE[0] / (2 * np.pi) < 0.02, "pixels at the equator"


def test_mixed_lenses_share_one_table() -> None:
    lenses = [lens("OPENCV"), lens("SIMPLE_RADIAL_FISHEYE"), lens("PINHOLE"), lens("OPENCV")]
    table = RayTable.from_cameras(cameras(lenses), "cpu")
    assert table.starts[0] == table.starts[3], "equal lenses share a grid"
    assert len(table.starts.unique()) == 3
    pixels = pixels_over(SIZE)
    chosen = torch.from_numpy(np.random.default_rng(1).integers(0, 4, len(pixels)))
    directions, _ = table.look_up(chosen, torch.from_numpy(pixels).float())
    for index, one in enumerate(lenses):
        rows = (chosen == index).numpy()
        assert miss(one, directions[rows], pixels[rows]) < 0.01


@pytest.mark.parametrize("size", [(320, 240), (160, 120), (213, 160), (1280, 960), (5, 4)])
def test_pictures_of_another_size_than_the_lens(size: tuple[int, int]) -> None:
    one, pixels = lens("OPENCV"), pixels_over(size)
    table = RayTable.from_cameras(cameras([one], [size]), "cpu")
    factor = np.array(SIZE) / size
    # In pixels of the picture itself.
    assert miss(one, read(table, 0, pixels), pixels * factor) / factor.min() < 0.01


def test_same_lens_at_two_sizes_has_two_grids() -> None:
    one = lens("OPENCV")
    table = RayTable.from_cameras(cameras([one, one], [SIZE, (320, 240)]), "cpu")
    assert table.starts[0] != table.starts[1]
    middle = read(table, 0, np.array([[100.0, 60.0]])), read(table, 1, np.array([[50.0, 30.0]]))
    torch.testing.assert_close(*middle, atol=3e-5, rtol=0)


@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV", "OPENCV_FISHEYE"])
def test_radii_are_those_of_the_exact_lens(model: str) -> None:
    one, size = lens(model), (320, 240)
    table = RayTable.from_cameras(cameras([one], [size]), "cpu")
    pixels = pixels_over(size)
    pixels = pixels[(pixels > 20).all(axis=1) & (pixels < np.array(size) - 20).all(axis=1)]

    steps = [
        np.linalg.norm(lens_rays(one, 2 * (pixels + shift)) - lens_rays(one, 2 * (pixels - shift)), axis=1)
        for shift in (np.array([0.5, 0]), np.array([0, 0.5]))
    ]
    expected = np.mean(steps, axis=0) * 2 / np.sqrt(12)
    _, radii = table.look_up(torch.zeros(len(pixels), dtype=torch.int64), torch.from_numpy(pixels).float())
    np.testing.assert_allclose(radii.numpy(), expected, rtol=0.02)


@pytest.mark.parametrize("device", ["cpu", pytest.param("meta", id="another device")])
def test_table_lives_on_the_device_asked_for(device: str) -> None:
    table = RayTable.from_cameras(cameras([lens("OPENCV")]), device)
    for tensor in (table.nodes, table.starts, table.counts, table.cells_per_pixel):
        assert tensor.device.type == device
    directions, radii = table.look_up(
        torch.zeros(7, dtype=torch.int64, device=device), torch.zeros(7, 2, device=device)
    )
    assert directions.device.type == device
    assert (directions.shape, radii.shape) == ((7, 3), (7,))
    assert not directions.requires_grad


@pytest.mark.parametrize("size", [SIZE, (80, 60), (5, 4)])
def test_pixels_without_a_direction_are_reported(
    size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """A strong negative k folds the picture back: beyond a radius no direction leads there."""
    one = Lens("SIMPLE_RADIAL", (300.0, 320.0, 240.0, -0.5), SIZE)
    exact = lens_rays(one, pixels_over(SIZE))
    assert np.isnan(exact).any()
    with caplog.at_level(logging.WARNING):
        table = RayTable.from_cameras(cameras([one], [size]), "cpu")
    assert "where its SIMPLE_RADIAL lens sees nothing; mask it out" in caplog.text
    # The border itself, where the derivative is infinite, does not make the table ever finer.
    assert (table.counts[0].numpy() <= np.maximum(np.array(size) + 1, 65)).all()
    directions = read(table, 0, pixels_over(size))
    assert directions.isfinite().all()
    assert (directions.norm(dim=1) > 0.5).all()
    central = pixels_over(SIZE)
    central = central[np.linalg.norm(central - (320, 240), axis=1) < 100]
    factor = np.array(size) / SIZE
    assert miss(one, read(table, 0, central * factor), central) * factor.max() < 0.01


def test_distorted_fisheye_beyond_90_degrees() -> None:
    """OPENCV_FISHEYE: r = f theta (1 + k1 theta^2 + k2 theta^4 + ...)."""
    focal, k = 180.0, (0.03, -0.006, 0.001, -0.0001)
    theta = np.radians(np.linspace(1, 100, 100))
    radius = focal * theta * (1 + sum(value * theta ** (2 * i + 2) for i, value in enumerate(k)))
    one = Lens("OPENCV_FISHEYE", (focal, focal, 400.0, 400.0, *k), (800, 800))
    for phi in (0.0, 0.7, 2.5, 4.0):
        across = np.array([np.cos(phi), np.sin(phi)])
        rays = lens_rays(one, 400.0 + radius[:, None] * across)
        expected = np.column_stack([np.sin(theta)[:, None] * across, np.cos(theta)])
        np.testing.assert_allclose(rays, expected, atol=2e-5)


def test_fisheye_sees_nothing_beyond_180_degrees() -> None:
    """A circular picture of 2 pixels per degree: the corners would be 200 degrees off the axis."""
    one = Lens("SIMPLE_FISHEYE", (2 / np.radians(1), 320.0, 240.0), SIZE)
    rays = lens_rays(one, MIDDLE + np.array([[0.0, 0.0], [0.0, 200.0], [-300.0, 0.0], [-300.0, 220.0]]))
    angles = np.degrees(np.arccos(rays[:, 2]))
    np.testing.assert_allclose(angles, [0, 100, 150, np.nan], atol=1e-6)
    np.testing.assert_allclose(rays[2], [-0.5, 0, -np.sqrt(0.75)], atol=1e-9)


@pytest.mark.parametrize("model", LENSES)
@pytest.mark.parametrize("change", [-1, 1, 0])
def test_wrong_number_of_parameters(model: str, change: int) -> None:
    """Pycolmap reads beyond the end of too short a list, so no such lens may reach it."""
    params = lens(model).params
    short = (*params, 0.0) if change == 1 else params[:change]
    fault = lens_fault(Lens(model, short, SIZE))
    assert fault is not None
    assert f"{model} has {len(params)} parameters" in fault
    assert fault.endswith(f"not {len(short)}")


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (Lens("PIN_HOLE", (500.0,), SIZE), r"camera model PIN_HOLE is not one of COLMAP's \(.*PINHOLE"),
        (Lens("INVALID", (), SIZE), "camera model INVALID"),
        (Lens("PINHOLE", (500.0, 500.0, float("nan"), 240.0), SIZE), "not finite"),
        (Lens("PINHOLE", (500.0, 500.0, float("inf"), 240.0), SIZE), "not finite"),
        (Lens("PINHOLE", (-500.0, 500.0, 320.0, 240.0), SIZE), "absurd for a picture of 640 x 480"),
        (Lens("PINHOLE", (0.0, 500.0, 320.0, 240.0), SIZE), "absurd"),
        (Lens("PINHOLE", (1e9, 1e9, 320.0, 240.0), SIZE), "absurd"),
        (Lens("PINHOLE", (500.0, 500.0, 3200.0, 240.0), SIZE), "absurd"),
        (Lens("SIMPLE_RADIAL", (500.0, 320.0, 240.0, 100.0), SIZE), "absurd"),
        (Lens("PINHOLE", (500.0, 500.0, 320.0, 240.0), (0, 480)), "0 x 480 pixels"),
        (
            Lens("SIMPLE_RADIAL", (40.0, 640.0, 480.0, -0.5), SIZE),
            "give no direction for the middle of its picture",
        ),
    ],
)
def test_faults_in_words(one: Lens, what: str) -> None:
    fault = lens_fault(one)
    assert fault is not None
    assert re.search(what, fault), fault


@pytest.mark.parametrize("model", LENSES)
def test_projection_undoes_the_rays(model: str) -> None:
    one = lens(model)
    pixels = pixels_over((600, 440)) + 20
    np.testing.assert_allclose(project_to_lens(one, 3.0 * lens_rays(one, pixels)), pixels, atol=1e-3)


@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV", "OPENCV_FISHEYE"])
@pytest.mark.parametrize("size", [SIZE, (320, 240)])
def test_projection_of_scene_positions(model: str, size: tuple[int, int]) -> None:
    """Against pycolmap, for a turned camera and a picture of half the size."""
    one = lens(model)
    rotation = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    center = np.array([-2.0, 0.3, 0.1])
    factor = np.diag([size[0] / SIZE[0], size[1] / SIZE[1], 1.0])
    posed = Cameras(
        torch.from_numpy(np.column_stack([rotation, center])[None]).float(),
        torch.from_numpy(factor @ pinhole_part(one))[None].float(),
        torch.tensor([size]),
        () if model in PINHOLES else (one,),
    )
    positions = np.random.default_rng(3).uniform(-3, 3, (300, 3))
    pixels, depth, shown = project(posed, 0, torch.from_numpy(positions).float())
    in_camera = (positions - center) @ rotation
    camera = pycolmap.Camera(model=model, width=SIZE[0], height=SIZE[1], params=list(one.params))
    expected = camera.img_from_cam(in_camera) * (np.array(size) / SIZE)
    np.testing.assert_allclose(depth, in_camera[:, 2], atol=1e-5)
    visible = (in_camera[:, 2] > 0) & (expected >= 0).all(axis=1) & (expected < size).all(axis=1)
    borderline = np.abs(expected - np.clip(expected, 0, size)).max(axis=1) < 1e-2
    np.testing.assert_array_equal(shown.numpy()[~borderline | visible], visible[~borderline | visible])
    assert 20 < visible.sum() < 280
    np.testing.assert_allclose(pixels[visible], expected[visible], atol=5e-3)


def test_rays_meet_what_projects_to_their_pixel() -> None:
    """RayGenerator and project are inverse to each other through the same lens."""
    scene_cameras = Cameras(
        torch.from_numpy(np.column_stack([np.eye(3), [0, 0, -3.0]])[None]).float(),
        torch.from_numpy(pinhole_part(lens("OPENCV")))[None].float(),
        torch.tensor([SIZE]),
        (lens("OPENCV"),),
    )
    pixels = torch.from_numpy(pixels_over((600, 440)) + 20).float()
    rays = RayGenerator.from_cameras(scene_cameras).rays(torch.zeros(len(pixels), dtype=torch.int64), pixels)
    seen, _, shown = project(scene_cameras, 0, rays.origins + 2.5 * rays.directions)
    assert shown.all()
    torch.testing.assert_close(seen, pixels, atol=0.02, rtol=0)
