"""Depth and normal maps: where they are found, in which formats, and their holes when downscaled."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from process_data import load_scene
from process_data.capture import CaptureConfig, build_scene
from process_data.formats.colmap import ColmapConfig
from process_data.formats.dtu import DTUConfig
from process_data.formats.transforms import TransformsConfig
from process_data.synthetic import SyntheticConfig, load_synthetic
from process_data.views import Capture, View
from process_data.writers import write_capture
from utils.errors import ConfigError, DataError

WIDTH, HEIGHT = 8, 4


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Two views of 8 x 4 pixels in a folder with subfolders."""
    views = []
    for index, name in enumerate(("left/a.jpg", "b.jpg")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        pose = np.eye(4)[:3]
        pose[0, 3], pose[2, 3] = index, -3.0
        views.append(View(path, pose, np.array([[8.0, 0, 4], [0, 8, 2], [0, 0, 1]])))
    return Capture(tmp_path, tuple(views), world_from_scene=np.eye(4))


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        assert cv2.imwrite(str(path), values)


def depths(capture: Capture, **keys: object) -> list[np.ndarray]:
    scene = build_scene(capture, CaptureConfig(up="none", use_priors=True, **keys))
    assert scene.depths is not None
    return [scene.depths.image(view)[..., 0].float().numpy() for view in range(2)]


RAMP = np.arange(HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH) + 100


@pytest.mark.parametrize(
    ("names", "dtype", "unit", "factor"),
    [
        (("depth/left/a.npy", "depth/b.npy"), np.float32, None, 1.0),
        (("depths/left/a.jpg.npy", "depths/b_depth.npy"), np.float64, 0.5, 0.5),
        (("depth/a.png", "depth/b.png"), np.uint16, 0.125, 0.125),
        (("images/left/a_depth.tif", "images/b_depth.tiff"), np.float32, None, 1.0),
    ],
)
def test_depths_are_found_and_in_world_units(
    capture: Capture, names: tuple[str, str], dtype: type, unit: float | None, factor: float
) -> None:
    for name in names:
        save(capture.root / name, RAMP.astype(dtype))
    for found in depths(capture, depth_unit=unit):
        np.testing.assert_array_equal(found, RAMP * factor)


@pytest.mark.parametrize("use_priors", [None, False])
def test_maps_that_nothing_asks_for_are_only_mentioned(
    capture: Capture, use_priors: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = CaptureConfig(up="none", use_priors=use_priors)
    build_scene(capture, config)
    assert "maps" not in caplog.text
    for name in ("depth/left/a.npy", "depth/b.npy"):
        save(capture.root / name, RAMP)
    scene = build_scene(capture, config)
    assert scene.depths is None
    unused = [record.message for record in caplog.records if "not used" in record.message]
    terms = "system.loss.depth or system.loss.depth_prior above 0 uses them"
    assert unused == [f"there are depth maps, which are not used; training with {terms}"]
    caplog.clear()
    # The format names this one, in a place where nobody would look for it.
    save(capture.root / "elsewhere.npy", np.ones((HEIGHT, WIDTH, 3)))
    views = [replace(view, normal_path=capture.root / "elsewhere.npy") for view in capture.views]
    assert build_scene(replace(capture, views=tuple(views)), config).normals is None
    assert (
        "normal maps, which are not used; training with system.loss.normal_prior above 0 uses them"
        in caplog.text
    )


def test_maps_without_a_known_value_are_refused(capture: Capture) -> None:
    nothing = -RAMP
    for name in ("depth/left/a.npy", "depth/b.npy"):
        save(capture.root / name, nothing)
    message = r"left/a\.npy: no depth map holds a value above 0; .*dataset\.depth_unit"
    with pytest.raises(DataError, match=message):
        depths(capture)
    nothing[2, 3] = 5
    save(capture.root / "depth/b.npy", nothing)
    first, second = depths(capture)
    assert (int((first != 0).sum()), int((second != 0).sum())) == (0, 1)
    # Half precision has no such small number left.
    with pytest.raises(DataError, match=message):
        depths(capture, depth_unit=1e-9)
    for name in ("normal/a.png", "normal/b.png"):
        save(capture.root / name, np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
    with pytest.raises(DataError, match=r"normal/a\.png: no normal map holds a direction"):
        depths(capture)
    save(capture.root / "normal/b.png", np.full((HEIGHT, WIDTH, 3), (0, 128, 128), np.uint8))
    assert len(depths(capture)) == 2


def test_unknown_is_written_as_zero(capture: Capture) -> None:
    for kind, values in (("depth", RAMP), ("normal", np.ones((HEIGHT, WIDTH, 3)))):
        broken = values.copy()
        broken[1, 2] = np.inf
        save(capture.root / kind / "a.npy", values)
        save(capture.root / kind / "b.npy", broken)
        what = "holds values that are not finite; write 0 where nothing is known$"
        with pytest.raises(DataError, match=rf"{kind}/b\.npy: {what}"):
            depths(capture)
        save(capture.root / kind / "b.npy", values)
    assert len(depths(capture)) == 2


def test_whole_numbers_need_a_unit(capture: Capture) -> None:
    for name in ("depth/a.png", "depth/b.png"):
        save(capture.root / name, RAMP.astype(np.uint16))
    with pytest.raises(ConfigError, match=r"^dataset\.depth_unit: .*a\.png and its like hold whole numbers"):
        depths(capture)
    save(capture.root / "depth/a.png", np.dstack([RAMP, 2 * RAMP, RAMP]).astype(np.uint8))
    with pytest.raises(DataError, match=r"a\.png: has shape \(4, 8, 3\); expected is"):
        depths(capture, depth_unit=1.0)
    save(capture.root / "depth/a.png", np.dstack([RAMP] * 3).astype(np.uint8))
    np.testing.assert_array_equal(depths(capture, depth_unit=1.0)[0], RAMP)
    (capture.root / "depth/a.png").write_bytes((capture.root / "depth/a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"a\.png: not a readable picture; "):
        depths(capture, depth_unit=1.0)
    with pytest.raises(ConfigError, match=r"^dataset\.depth_unit: 0\.0 is not above 0"):
        CaptureConfig(depth_unit=0.0)


def test_holes_are_not_averaged_into_depths(capture: Capture) -> None:
    holes = RAMP.copy()
    holes[0, 0] = holes[0, 1] = holes[1, 0] = 0  # Three of four: unknown.
    holes[0, 2] = 0  # One of four: the mean of the others.
    for name in ("depth/a.npy", "depth/b.npy"):
        save(capture.root / name, holes)
    small = depths(capture, img_downscale=2)[0]
    for row in range(HEIGHT // 2):
        for column in range(WIDTH // 2):
            block = holes[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
            known = block[block > 0]
            expected = known.mean() if len(known) >= 2 else 0.0
            assert small[row, column] == pytest.approx(expected, rel=1e-3)
    assert small[0, 0] == 0.0


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_normals_as_pictures(capture: Capture, dtype: type, top: int) -> None:
    normal = np.array([0.6, 0.0, -0.8])
    coded = np.rint((0.5 + 0.5 * normal) * top).astype(dtype)
    picture = np.tile(coded[::-1], (HEIGHT, WIDTH, 1))  # OpenCV's order is blue, green, red.
    picture[0] = 0
    picture[1] = top // 2
    for name in ("normal/a.png", "normals/b.png"):
        save(capture.root / name, picture)
    scene = build_scene(capture, CaptureConfig(up="none", use_priors=True))
    assert scene.normals is not None
    found = scene.normals.image(1).float().numpy()
    np.testing.assert_allclose(found[2:], np.tile(normal, (2, WIDTH, 1)), atol=0.01)
    assert (found[:2] == 0).all()
    small = build_scene(capture, CaptureConfig(up="none", use_priors=True, img_downscale=4)).normals
    assert small is not None
    np.testing.assert_allclose(small.image(0).float().numpy()[0], np.tile(normal, (2, 1)), atol=0.01)


@dataclass(frozen=True)
class Format:
    kind: str
    config: type
    keys: dict[str, object]


@pytest.mark.parametrize(
    "form",
    [
        Format("neus", DTUConfig, {}),
        Format("colmap", ColmapConfig, {}),
        Format("transforms", TransformsConfig, {}),
    ],
    ids=lambda form: form.kind,
)
@pytest.mark.parametrize(
    ("depth", "normal"),
    [("depth/{}.png", "normal/{}.npy"), ("beside/{}_depth.png", "beside/{}_normal.png")],
    ids=["folders", "beside"],
)
def test_every_format_takes_plain_folders(
    tmp_path: Path, form: Format, depth: str, normal: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scene = load_synthetic(SyntheticConfig(scene="sphere", num_images=4, image_size=16, holdout=0))
    write_capture(scene, tmp_path / "capture", form.kind)
    pictures = [path for path in (tmp_path / "capture").rglob("*.png") if "mask" not in str(path)]
    assert len(pictures) == 4
    for path in pictures:
        place = path.parent if depth.startswith("beside/") else tmp_path / "capture"
        depth_path, normal_path = (
            place / name.removeprefix("beside/").format(path.stem) for name in (depth, normal)
        )
        save(depth_path, np.full((16, 16), 3000, np.uint16))
        if normal_path.suffix == ".npy":
            save(normal_path, np.tile([0.0, 0, -1], (16, 16, 1)))
        else:
            save(normal_path, np.full((16, 16, 3), (0, 32768, 32768), np.uint16))  # Blue, green, red.
    config = form.config(root_dir=str(tmp_path / "capture"), depth_unit=0.001, use_priors=True, **form.keys)
    loaded = load_scene(config)
    assert len(loaded.images) == 4
    assert "no pose" not in caplog.text
    assert loaded.depths is not None
    assert loaded.normals is not None
    assert float(loaded.depths.image(3)[8, 8, 0]) == 3.0
    np.testing.assert_allclose(loaded.normals.image(0)[8, 8].float(), [0, 0, -1], atol=1e-4)
