"""Pick sharp frames of a video: the sharpest of each of N equal windows of time.

Sharpness is the variance of the Laplacian of a small grey copy (Pech-Pacheco et al., Diatom autofocusing in
brightfield microscopy, ICPR 2000). The video is read twice, first to measure and then to write, so that only
one frame is ever held and the container's frame count, which is often wrong, does not matter.
"""

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from utils.errors import DataError

LOG = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mts", ".3gp", ".mpg", ".mpeg"})
"""File suffixes (lower case) that count as videos."""
_GREY_SIDE = 640
_STILL = 1.0
"""Mean grey-level difference of two small copies below which the camera did not move in between."""
_REMEDY = "play it to check that it is whole, or convert it to H.264 in MP4"


def small_grey(picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w"]:
    """A grey copy whose longest side is at most 640 pixels."""
    factor = _GREY_SIDE / max(picture.shape[:2])
    if factor < 1.0:
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)


def sharpness(picture: UInt8[np.ndarray, "H W C"]) -> float:
    """Variance of the Laplacian of a small grey copy; grows with sharpness, comparable within a capture."""
    return float(cv2.Laplacian(small_grey(picture), cv2.CV_64F).var())


def choose_frames(times: list[float], sharpnesses: list[float], num_frames: int) -> list[int]:
    """Choose the sharpest frame of each of ``num_frames`` equal windows of time.

    Args:
        times: seconds of each frame, ascending.
        sharpnesses: of each frame.
        num_frames: windows; one that holds no frame gives none.

    Returns:
        Frame indices, ascending. Of equally sharp frames the first is taken.
    """
    start, length = times[0], max(times[-1] - times[0], 1e-9)
    best: dict[int, int] = {}
    for index, (moment, value) in enumerate(zip(times, sharpnesses, strict=True)):
        window = min(int((moment - start) / length * num_frames), num_frames - 1)
        if window not in best or value > sharpnesses[best[window]]:
            best[window] = index
    return [best[window] for window in sorted(best)]


def extract_frames(video: Path, folder: Path, table: Path, num_frames: int) -> list[Path]:
    """Write the sharp frames of a video as ``frame_00001.jpg``, ..., with a table of where they are from.

    A frame that looks like the one written before it is left out: a camera at rest adds no view.

    Args:
        video: file that OpenCV's decoder reads; a rotation stored in it is applied.
        folder: where the frames go (made if missing).
        table: CSV to write: file, source frame, seconds, sharpness.
        num_frames: windows of time, >= 1.

    Returns:
        The frames written, in order.

    Raises:
        DataError: the video cannot be read.
    """
    times, sharpnesses = _measure(video)
    chosen = choose_frames(times, sharpnesses, num_frames)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    before = None
    with _opened(video) as (capture, _), table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "source_frame", "seconds", "sharpness"])
        position = -1
        for wanted in tqdm(chosen, desc="frames", unit="frame", disable=None, leave=False):
            while position < wanted and capture.grab():
                position += 1
            is_read, frame = capture.retrieve()
            if position != wanted or not is_read:
                raise DataError(video, f"frame {wanted} could be read once but not again", _REMEDY)
            grey = small_grey(frame)
            if before is not None and float(np.mean(cv2.absdiff(grey, before))) < _STILL:
                continue
            before = grey
            path = folder / f"frame_{len(written) + 1:05d}.jpg"
            if not cv2.imwrite(str(path), frame, [cv2.IMWRITE_JPEG_QUALITY, 95]):
                raise DataError(path, "cannot be written", "check free space and permissions")
            rows.writerow([path.name, wanted, f"{times[wanted]:.3f}", f"{sharpnesses[wanted]:.1f}"])
            written.append(path)
    LOG.info(
        "%s: %d frames in %.1f s, %d picked, %d of them left out as still",
        video,
        len(times),
        times[-1] - times[0],
        len(chosen),
        len(chosen) - len(written),
    )
    return written


def _measure(video: Path) -> tuple[list[float], list[float]]:
    """Seconds and sharpness of every frame."""
    times: list[float] = []
    sharpnesses: list[float] = []
    with (
        _opened(video) as (capture, rate),
        tqdm(desc="sharpness", unit="frame", disable=None, leave=False) as bar,
    ):
        while True:
            is_read, frame = capture.read()
            if not is_read:
                break
            moment = float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0
            # Some containers carry no time stamps; then the frame rate tells the time.
            is_later = bool(times) and np.isfinite(moment) and moment > times[-1]
            times.append(moment if is_later or not times else times[-1] + 1.0 / rate)
            sharpnesses.append(sharpness(frame))
            bar.update()
    if not times:
        raise DataError(video, "not a readable video", _REMEDY)
    return times, sharpnesses


@contextmanager
def _opened(video: Path) -> Iterator[tuple[Any, float]]:
    """OpenCV's decoder on a video, and its frame rate (30 where it does not say)."""
    capture = cv2.VideoCapture(str(video))
    try:
        if not capture.isOpened():
            raise DataError(video, "not a readable video", _REMEDY)
        rate = float(capture.get(cv2.CAP_PROP_FPS))
        yield capture, rate if np.isfinite(rate) and rate > 0.0 else 30.0
    finally:
        capture.release()
