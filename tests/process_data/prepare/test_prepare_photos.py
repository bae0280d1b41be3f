"""Photos, frames and masks of ``--prepare``: what reaches COLMAP, before COLMAP."""

import csv
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image, ImageOps

from process_data.prepare.frames import choose_frames, extract_frames, sharpness
from process_data.prepare.masks import fit_mask, make_masks, mask_folder, match_masks, motion_masks
from process_data.prepare.photos import Collected, collect_photo, collect_photos, photo_folder
from utils.errors import ConfigError, DataError

FOCAL_35MM, ORIENTATION = 0xA405, 0x0112


def picture(width: int = 40, height: int = 24) -> np.ndarray:
    """A smooth picture (JPEG keeps it) without any symmetry."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns * 6, rows * 10, (columns + rows) * 2], axis=-1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, orientation: int = 1, **options: Any) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"  # Pillow writes no EXIF into a PNG unless the first directory holds something.
    exif.get_ifd(0x8769)[FOCAL_35MM] = 28
    if orientation != 1:
        exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_and_keep_their_focal_length(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    source = tmp_path / f"a.{suffix}"
    save(source, picture(), orientation, **({"quality": 98, "subsampling": 0} if suffix == "jpg" else {}))
    photo = collect_photo(source, _made(tmp_path / "images"), 0)
    with Image.open(source) as stored, Image.open(photo.path) as written:
        expected = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
        assert np.abs(np.asarray(written).astype(int) - expected).max() <= (6 if suffix == "jpg" else 0)
        assert written.getexif().get(ORIENTATION, 1) == 1
        assert written.getexif().get_ifd(0x8769)[FOCAL_35MM] == 28
        assert photo.size == written.size
    assert photo.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert (photo.path.read_bytes() == source.read_bytes()) == (orientation == 1)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "LA", "1"])
def test_other_kinds_of_pictures_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = picture()[..., 1]
    stored = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else None
    (stored or Image.fromarray(picture()).convert(mode)).save(tmp_path / "a.png")
    photo = collect_photo(tmp_path / "a.png", _made(tmp_path / "images"), 0)
    with Image.open(photo.path) as written:
        assert (written.mode, written.size) == ("RGB", (40, 24))
        if mode in ("L", "I;16"):
            expected = np.asarray(Image.fromarray(picture()).convert("L")) if mode == "L" else grey
            assert np.array_equal(np.asarray(written)[..., 1], expected)


def test_a_folder_in_natural_order_with_corrupt_foreign_and_hidden_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("10 ä.JPG", "2.jpg", "1.png", ".hidden.jpg"):
        save(tmp_path / "images" / name, picture())
    whole = (tmp_path / "images" / "2.jpg").read_bytes()
    (tmp_path / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "IMG.HEIC").write_bytes(b"x")
    save(tmp_path / "images" / "2.png", picture())
    with caplog.at_level(logging.WARNING):
        photos = collect_photos(photo_folder(tmp_path), tmp_path / "out", 20)
    assert [photo.path.name for photo in photos] == ["1.png", "2.jpg", "10 ä.JPG"]
    assert all(photo.size == (20, 12) for photo in photos)
    with Image.open(photos[2].path) as written:
        assert written.size == (20, 12)
    assert "3.jpg: not a readable picture" in caplog.text
    assert "2.png is left out: 2.jpg has the same name" in caplog.text
    assert "IMG.HEIC" in caplog.text


def test_folders_without_photos_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures; give a folder of JPEG or PNG"):
        photo_folder(tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"give the video itself: .*film\.mp4"):
        photo_folder(tmp_path)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match="HEIC or AVIF pictures, which cannot be read; export them as JPEG"):
        photo_folder(tmp_path)
    save(tmp_path / "a.jpg", picture())
    save(tmp_path / "b.jpg", picture())
    with pytest.raises(DataError, match="only 2 usable photos, at least 3 are needed"):
        collect_photos(tmp_path, tmp_path / "out", 0)


# -------------------------------------------------------------------------------------------------- frames


def test_the_sharpest_frame_of_each_window_is_chosen() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0, 6.0]
    # Windows of 2 s: frames 0..5, none, 6 and 7 (the last instant belongs to the last window).
    assert choose_frames(times, [1.0, 5.0, 2.0, 5.0, 3.0, 0.0, 1.0, 2.0], 3) == [1, 7]
    assert choose_frames(times, [1.0] * 8, 1000) == list(range(8))


def test_frames_of_a_video(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (24, 60, 3)).astype(np.uint8)
    wide = cv2.resize(coarse, (480, 192), interpolation=cv2.INTER_CUBIC)
    opened: Any = imageio.get_writer(tmp_path / "a.mp4", fps=10, macro_block_size=2, quality=9)
    with opened as writer:
        for index in range(30):
            # The view moves on; all frames but 4, 12 and 27 are out of focus; the last ten stand still.
            shift = 8 * min(index, 27)
            frame = wide[:, shift : shift + 256]
            writer.append_data(frame if index in (4, 12, 27) else cv2.GaussianBlur(frame, (0, 0), 3))
    frames = extract_frames(tmp_path / "a.mp4", tmp_path / "frames", tmp_path / "frames.csv", 3)
    assert [path.name for path in frames] == ["frame_00001.jpg", "frame_00002.jpg", "frame_00003.jpg"]
    rows = list(csv.DictReader((tmp_path / "frames.csv").open()))
    assert [int(row["source_frame"]) for row in rows] == [4, 12, 27]
    assert float(rows[1]["seconds"]) == pytest.approx(1.2, abs=0.01)
    read = cv2.imread(str(frames[1]))
    assert read is not None
    written = read[..., ::-1].astype(int)
    assert np.abs(written - wide[:, 96:352].astype(int)).mean() < 12
    assert sharpness(written[..., ::-1].astype(np.uint8)) == pytest.approx(
        float(rows[1]["sharpness"]), rel=0.1
    )


def test_still_frames_are_left_out_and_no_video_is_one_line(tmp_path: Path) -> None:
    still = cv2.resize(np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8), (128, 96))
    opened: Any = imageio.get_writer(tmp_path / "a.mp4", fps=10, macro_block_size=2)
    with opened as writer:
        for _ in range(12):
            writer.append_data(still)
    assert len(extract_frames(tmp_path / "a.mp4", tmp_path / "f", tmp_path / "t.csv", 6)) == 1
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(DataError, match=r"bad\.mp4: not a readable video"):
        extract_frames(tmp_path / "bad.mp4", tmp_path / "g", tmp_path / "t.csv", 6)


# --------------------------------------------------------------------------------------------------- masks


def test_masks_are_matched_by_stem(tmp_path: Path) -> None:
    for name in ("A.png", "b.jpg.png", "c_mask.png", "d.png"):
        save(tmp_path / name, picture())
    names = [path.name for path in match_masks(tmp_path, ["c.jpg", "a.JPG", "b.jpg"])]
    assert names == ["c_mask.png", "A.png", "b.jpg.png"]
    with pytest.raises(DataError, match=r"no mask for 2 of 3 photos, first e\.jpg; add e\.png"):
        match_masks(tmp_path, ["a.jpg", "e.jpg", "f.jpg"])


def collected(path: Path, orientation: int = 1) -> Collected:
    return Collected(path, path, (24, 40) if orientation >= 5 else (40, 24), orientation, 100.0)


def test_masks_take_the_shape_of_the_upright_photo(tmp_path: Path) -> None:
    lying = np.zeros((24, 40), np.uint8)
    lying[2:6, 5:20] = 255
    save(tmp_path / "m.png", lying)
    lying_photo, upright_photo = collected(tmp_path / "a.jpg"), collected(tmp_path / "a.jpg", 6)
    assert np.array_equal(fit_mask(tmp_path / "m.png", lying_photo), lying)
    # Orientation 6: the stored picture is turned clockwise.
    assert np.array_equal(fit_mask(tmp_path / "m.png", upright_photo), np.rot90(lying, -1))
    save(tmp_path / "half.png", lying[::2, ::2])
    assert fit_mask(tmp_path / "half.png", lying_photo).shape == (24, 40)
    save(tmp_path / "square.png", lying[:, :24])
    with pytest.raises(DataError, match=r"square.png: 24x24 pixels do not fit a.jpg \(40x24\)"):
        fit_mask(tmp_path / "square.png", lying_photo)


def test_where_masks_come_from(tmp_path: Path) -> None:
    alpha = np.zeros((24, 40), np.uint8)
    alpha[4:9, 3:30] = 255
    images = tmp_path / "images"
    for index in range(3):
        save(images / f"{index}.png", np.dstack([picture(), alpha]))
    photos = [collected(images / f"{index}.png") for index in range(3)]
    target = tmp_path / "out"
    assert make_masks("none", photos, images, target) is None
    assert not target.exists()
    assert make_masks("auto", photos, images, target) == "masks from the photos' alpha channels"
    assert np.array_equal(np.asarray(Image.open(target / "1.png")), alpha)
    with pytest.raises(DataError, match="masks: no such folder"):
        make_masks("folder", photos, images, target)

    for index in range(3):
        save(tmp_path / "mask" / f"{index}.png", np.where(alpha > 0, 255, index).astype(np.uint8)[::-1])
    assert mask_folder(images) == tmp_path / "mask"
    assert make_masks("auto", photos, images, target) == f"masks from {tmp_path / 'mask'}"
    assert np.array_equal(np.asarray(Image.open(target / "2.png")), alpha[::-1])

    for index in range(3):
        save(images / f"{index}.png", picture())
        save(tmp_path / "mask" / f"{index}.png", np.zeros((24, 40), np.uint8))
    with pytest.raises(DataError, match="not all photos have an alpha channel"):
        make_masks("alpha", photos, images, target)
    with pytest.raises(DataError, match="every mask is black everywhere"):
        make_masks("auto", photos, images, target)


@pytest.mark.parametrize("kind", ["auto", "folder"])
def test_masks_beside_the_photos(tmp_path: Path, kind: str) -> None:
    columns = np.tile(np.arange(40), (24, 1))
    masks = [np.where(columns < width, 255, 0).astype(np.uint8) for width in (8, 16, 24)]
    for index, mask in enumerate(masks):
        save(tmp_path / f"{index}.png", picture())
        save(tmp_path / f"{index}_mask.png", mask)
    photos = collect_photos(tmp_path, tmp_path / "images", 0)
    assert [photo.source.name for photo in photos] == ["0.png", "1.png", "2.png"]
    assert make_masks(kind, photos, tmp_path, tmp_path / "out") == f"masks from {tmp_path}"
    for index, mask in enumerate(masks):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{index}.png")), mask)
    (tmp_path / "1_mask.png").unlink()
    with pytest.raises(DataError, match=r"no mask for 1 of 3 photos, first 1\.png; add 1_mask\.png, or give"):
        make_masks(kind, photos, tmp_path, tmp_path / "out")


def test_rembg_is_used_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", picture())
    photos = [collected(tmp_path / "a.png")]
    monkeypatch.setitem(sys.modules, "rembg", None)
    assert make_masks("auto", photos, tmp_path, tmp_path / "out") is None
    with pytest.raises(ConfigError, match=r"masks: rembg is not installed .*; pip install 'rembg\[cpu\]'"):
        make_masks("rembg", photos, tmp_path, tmp_path / "out")

    def remove(image: Image.Image, session: object, only_mask: bool) -> Image.Image:
        assert session == "session"
        assert only_mask
        return image.convert("L").point(lambda value: 255 if value > 90 else 0)

    fake = SimpleNamespace(new_session=lambda: "session", remove=remove)
    monkeypatch.setitem(sys.modules, "rembg", fake)
    assert make_masks("rembg", photos, tmp_path, tmp_path / "out") == "masks by rembg"
    mask = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert set(np.unique(mask)) == {0, 255}


def test_what_turns_before_a_static_wall_is_found() -> None:
    generator = np.random.default_rng(0)
    wall = cv2.resize(generator.integers(0, 255, (30, 40, 3)).astype(np.uint8), (160, 120))
    skin = cv2.resize(generator.integers(0, 255, (10, 80, 3)).astype(np.uint8), (640, 60))
    rows, columns = np.mgrid[:120, :160]
    pictures, truth = [], []
    for index in range(15):
        # A disk that wobbles about the axis, its texture passing by.
        centre = 80 + 12 * np.cos(0.42 * index)
        disk = (columns - centre) ** 2 + (rows - 60) ** 2 < 28**2
        shown = wall.copy()
        shown[disk] = skin[rows[disk] - 30, (columns[disk] + 37 * index) % 640]
        noisy = shown + generator.normal(0, 2, shown.shape)
        pictures.append(np.clip(noisy, 0, 255).astype(np.uint8))
        truth.append(disk)
    found = motion_masks(np.stack(pictures))
    overlap = [(a & b).sum() / (a | b).sum() for a, b in zip(found, truth, strict=True)]
    # Where the disk is most of the time, the median shows the disk, and the wall counts as a difference.
    assert min(overlap) > 0.7, overlap
    assert np.mean(overlap) > 0.8, overlap
    still = np.clip(wall + generator.normal(0, 2, (15, *wall.shape)), 0, 255).astype(np.uint8)
    assert not motion_masks(still).any()
