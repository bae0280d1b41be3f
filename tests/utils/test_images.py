from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.errors import DataError, ExportError
from utils.images import depth_to_rgb, normal_to_rgb, panel, read_image, read_mask, to_uint8, write_png

COLOURS = np.array(
    [[[255, 0, 0], [0, 200, 0]], [[0, 0, 100], [7, 8, 9]], [[1, 1, 1], [250, 240, 230]]], np.uint8
)


def test_png_round_trip(tmp_path: Path) -> None:
    write_png(tmp_path / "new" / "folder" / "a.png", COLOURS)
    assert np.array_equal(read_image(tmp_path / "new" / "folder" / "a.png"), COLOURS)
    write_png(tmp_path / "grey.png", COLOURS[..., 0])
    assert np.array_equal(read_image(tmp_path / "grey.png"), COLOURS[..., [0, 0, 0]])
    assert np.array_equal(read_mask(tmp_path / "grey.png"), COLOURS[..., 0])


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), COLOURS[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(read_image(tmp_path / "grey.png"), COLOURS[..., [0, 0, 0]])
    cv2.imwrite(str(tmp_path / "rgb.png"), COLOURS[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(read_image(tmp_path / "rgb.png"), COLOURS)


def test_palette_one_bit_and_alpha(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).quantize(6).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), COLOURS)
    Image.fromarray(COLOURS[..., 0] > 100).save(tmp_path / "bits.png")
    assert np.array_equal(read_mask(tmp_path / "bits.png"), np.where(COLOURS[..., 0] > 100, 255, 0))
    alpha = np.array([[255, 128], [0, 255], [255, 255]], np.uint8)
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "alpha.png")
    image = read_image(tmp_path / "alpha.png")
    assert image[0, 1].tolist() == [0, 100, 0], "half transparent over black"
    assert image[1, 0].tolist() == [0, 0, 0], "hidden colour does not leak"
    assert image[1, 1].tolist() == [7, 8, 9]
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable


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
            read_image(tmp_path / f"cut.{suffix}")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"text\.png: not a readable picture"):
        read_mask(tmp_path / "text.png")
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "absent.png")


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
