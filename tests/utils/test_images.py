from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from utils.errors import DataError, ExportError
from utils.images import (
    blend,
    depth_to_rgb,
    normal_to_rgb,
    open_picture,
    panel,
    read_mask,
    read_rgba,
    to_uint8,
    write_png,
)

COLOURS = np.array(
    [[[255, 0, 0], [0, 200, 0]], [[0, 0, 100], [7, 8, 9]], [[1, 1, 1], [250, 240, 230]]], np.uint8
)


def read_opaque(path: Path) -> np.ndarray:
    rgb, alpha = read_rgba(path)
    assert alpha is None
    return rgb


def test_png_round_trip(tmp_path: Path) -> None:
    write_png(tmp_path / "new" / "folder" / "a.png", COLOURS)
    assert np.array_equal(read_opaque(tmp_path / "new" / "folder" / "a.png"), COLOURS)
    write_png(tmp_path / "grey.png", COLOURS[..., 0])
    clear = np.dstack([COLOURS, COLOURS[..., 0]])
    write_png(tmp_path / "clear.png", clear)
    with Image.open(tmp_path / "clear.png") as picture:
        assert np.array_equal(np.asarray(picture), clear)
    assert np.array_equal(read_opaque(tmp_path / "grey.png"), COLOURS[..., [0, 0, 0]])
    assert np.array_equal(read_mask(tmp_path / "grey.png"), COLOURS[..., 0])


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), COLOURS[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(read_opaque(tmp_path / "grey.png"), COLOURS[..., [0, 0, 0]])
    cv2.imwrite(str(tmp_path / "rgb.png"), COLOURS[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(read_opaque(tmp_path / "rgb.png"), COLOURS)


def test_palette_one_bit_and_alpha(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).quantize(6).save(tmp_path / "palette.png")
    assert np.array_equal(read_opaque(tmp_path / "palette.png"), COLOURS)
    Image.fromarray(COLOURS[..., 0] > 100).save(tmp_path / "bits.png")
    assert np.array_equal(read_mask(tmp_path / "bits.png"), np.where(COLOURS[..., 0] > 100, 255, 0))


def test_alpha_stays_beside_straight_colours(tmp_path: Path) -> None:
    alpha = np.array([[255, 128], [0, 255], [255, 255]], np.uint8)
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "alpha.png")
    rgb, read = read_rgba(tmp_path / "alpha.png")
    assert np.array_equal(rgb, COLOURS), "colours are not multiplied by alpha"
    assert read is not None
    assert np.array_equal(read, alpha)
    for array in (rgb, read):
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert array.flags.writeable
    Image.fromarray(np.dstack([COLOURS, np.full_like(alpha, 255)])).save(tmp_path / "opaque.png")
    assert np.array_equal(read_opaque(tmp_path / "opaque.png"), COLOURS)


def test_grey_with_alpha_and_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    alpha = np.array([[255, 128], [0, 255], [255, 255]], np.uint8)
    Image.fromarray(np.dstack([COLOURS[..., 1], alpha])).save(tmp_path / "grey.png")
    rgb, read = read_rgba(tmp_path / "grey.png")
    assert np.array_equal(rgb, COLOURS[..., [1, 1, 1]])
    assert np.array_equal(read, alpha)
    palette = Image.fromarray(COLOURS).quantize(6)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    rgb, read = read_rgba(tmp_path / "palette.png")
    assert np.array_equal(rgb, COLOURS)
    assert read is not None
    assert read.tolist() == [[0, 255], [255, 255], [255, 255]]


def test_blend_composites_straight_colours() -> None:
    rgb = np.array([[[0, 100, 255]] * 3], np.uint8)
    alpha = np.array([[255, 128, 0]], np.uint8)
    assert blend(rgb, alpha, 255).tolist() == [[[0, 100, 255], [127, 177, 255], [255, 255, 255]]]
    assert blend(rgb, alpha, 0).tolist() == [[[0, 100, 255], [0, 50, 128], [0, 0, 0]]]
    every = np.arange(256, dtype=np.uint8)
    grid = np.broadcast_to(every[:, None, None], (256, 256, 3))
    exact = (grid * (every / 255.0)[None, :, None] + 77 * (1 - every / 255.0)[None, :, None]).astype(float)
    assert np.abs(blend(grid, np.broadcast_to(every, (256, 256)), 77) - exact).max() <= 0.5 + 1e-9


def test_orientation_tags_are_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees for display.
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_opaque(tmp_path / "turned.png"), COLOURS)
    with open_picture(tmp_path / "turned.png") as picture:
        assert picture.size == (2, 3)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("LAB", "tif")])
def test_colours_of_print_are_converted(tmp_path: Path, mode: str, suffix: str) -> None:
    picture = Image.fromarray(np.full((8, 8, 3), (200, 60, 30), np.uint8))
    if mode == "LAB":
        picture = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    assert np.abs(read_opaque(tmp_path / f"a.{suffix}").astype(int) - (200, 60, 30)).max() <= 6


def test_first_frame_of_several(tmp_path: Path) -> None:
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_opaque(tmp_path / "pages.tif"), COLOURS)


@pytest.mark.parametrize("value", [0.25, 1.0])
def test_float_pictures_are_zero_to_one(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "float.tif")
    assert (read_opaque(tmp_path / "float.tif") == round(255 * value)).all()


@pytest.mark.parametrize("values", [(0.0, 255.0), (-0.5, 0.5), (0.0, float("nan"))])
def test_float_pictures_of_another_range_are_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: holds floating-point values .*; save it with 8 or 16"):
        read_rgba(tmp_path / "float.tif")


def test_large_panoramas_load_and_larger_ones_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (20_000, 10_000), 1).save(tmp_path / "large.png")
    with open_picture(tmp_path / "large.png") as picture:
        assert picture.size == (20_000, 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(DataError, match=r"large\.png: too large a picture \(.*; resize it"):
        read_rgba(tmp_path / "large.png")


def test_mask_forms(tmp_path: Path) -> None:
    shape = np.array([[0, 1], [1, 0]], np.uint8)
    Image.fromarray(shape).save(tmp_path / "labels.png")
    assert np.array_equal(read_mask(tmp_path / "labels.png"), shape * 255)
    Image.fromarray(np.dstack([shape * 128, shape * 0, shape * 0])).save(tmp_path / "red.png")
    assert np.array_equal(read_mask(tmp_path / "red.png"), shape * 128)
    white = np.full((2, 2, 3), 255, np.uint8)
    Image.fromarray(np.dstack([white, shape * 255])).save(tmp_path / "cutout.png")
    assert np.array_equal(read_mask(tmp_path / "cutout.png"), shape * 255)


def test_unreadable_files_name_themselves(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: not a readable picture"):
            read_opaque(tmp_path / f"cut.{suffix}")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: the file is empty"):
        read_opaque(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"text\.png: not a readable picture"):
        read_mask(tmp_path / "text.png")
    with pytest.raises(DataError, match="no such file"):
        read_opaque(tmp_path / "absent.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_damaged_files_never_raise_anything_else(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    refused = 0
    for trial in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 200), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged[: len(content) - (trial % 3) * 7])
        try:
            read_rgba(path)
        except DataError:
            refused += 1
    assert refused > 0


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", COLOURS)


def test_to_uint8() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, np.nan], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 0]


def test_depth_colours() -> None:
    depth = np.linspace(1.0, 2.0, 50, dtype=np.float32)[None].repeat(4, axis=0)
    opacity = np.ones_like(depth)
    opacity[0] = 0.0
    rgb = depth_to_rgb(depth * opacity, opacity).astype(int)
    assert (rgb[0] == 255).all(), "white where nothing is hit"
    assert rgb[1, 0, 0] > rgb[1, 0, 2], "near is red"
    assert rgb[1, -1, 2] > rgb[1, -1, 0], "far is blue"
    assert (depth_to_rgb(depth * 0, depth * 0) == 255).all()
    assert (depth_to_rgb(depth * 0 + 3, opacity)[1] != 255).any(), "a flat wall is a colour"


def test_normal_colours() -> None:
    c2w = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    towards_viewer = -c2w[:, 2].reshape(1, 1, 3)
    assert normal_to_rgb(towards_viewer, c2w)[0, 0].tolist() == [128, 128, 255]
    up = -c2w[:, 1].reshape(1, 1, 3)
    assert normal_to_rgb(up, c2w)[0, 0].tolist() == [128, 255, 128]
    assert normal_to_rgb(np.array([[[1, 0, -1], [0, 0, 0]]], np.float32)).tolist() == [
        [[255, 128, 0], [128] * 3]
    ]


def test_panel() -> None:
    black = np.zeros((3, 2, 3), np.uint8)
    joined = panel([black, COLOURS[:2], black], gap=1)
    assert joined.shape == (3, 8, 3)
    assert np.array_equal(joined[:2, 3:5], COLOURS[:2])
    assert (joined[:, [2, 5]] == 255).all()
    assert (joined[2, 3:5] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        panel([])
