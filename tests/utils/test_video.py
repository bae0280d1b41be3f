"""Videos: what is written can be read, with and without ffmpeg."""

from collections.abc import Iterator
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from utils import video
from utils.errors import ExportError
from utils.video import write_video


def frames(count: int = 6, height: int = 33, width: int = 47) -> Iterator[np.ndarray]:
    for number in range(count):
        frame = np.full((height, width, 3), 40, np.uint8)
        frame[:, : width // 2] = 40 * number
        yield frame


@pytest.mark.skipif(video.ffmpeg_missing() is not None, reason=str(video.ffmpeg_missing()))
def test_mp4_has_even_sides_and_the_frames(tmp_path: Path):
    path = write_video(tmp_path / "deep" / "a.mp4", frames(), fps=12.0)
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
    shown = np.stack(imageio.mimread(path))
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == pytest.approx(12)
    assert shown.shape == (6, 34, 48, 3)
    for number in range(6):
        assert shown[number, :, 4:18].mean() == pytest.approx(40 * number, abs=4)


def test_without_ffmpeg_frames_and_gif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(video, "ffmpeg_missing", lambda: "ffmpeg not found")
    path = write_video(tmp_path / "a.mp4", frames())
    assert path == tmp_path / "a.gif"
    assert len(imageio.mimread(path)) == 6
    assert len(list((tmp_path / "a").glob("*.png"))) == 6
    assert imageio.imread(tmp_path / "a" / "00003.png")[5, 5].tolist() == [120, 120, 120]
    assert caplog.text.count("ffmpeg not found") == 1


def test_no_frames_wrong_frames_no_place(tmp_path: Path):
    with pytest.raises(ExportError, match="no frames"):
        write_video(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", [np.zeros((8, 8, 4), np.uint8)])
    with pytest.raises(ValueError, match="not"):
        write_video(tmp_path / "b.mp4", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", frames())
