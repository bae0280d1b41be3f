"""Write videos: H.264 in MP4 where ffmpeg is at hand (it comes with imageio-ffmpeg), else PNGs and a GIF."""

import logging
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import numpy.typing as npt

from utils.errors import ExportError

logger = logging.getLogger("utils.video")
Frame = npt.NDArray[np.uint8]


def write_video(path: str | Path, frames: Iterable[Frame], fps: float = 30.0) -> Path:
    """Write frames as they come, so that a long video needs no memory.

    Args:
        path: the MP4 to write; missing folders are made. Without ffmpeg the same name ends in ``.gif`` and
            the frames lie in a folder of that name without an ending.
        frames: ``(H, W, 3)`` uint8 RGB, all of one size; an odd side is extended by its last row or column.
        fps: frames a second.

    Returns:
        The file written: MP4 or GIF.

    Raises:
        ExportError: no frames, or the file cannot be written.
        ValueError: a frame is not ``(H, W, 3)`` uint8 or differs in size from the first.
    """
    path = Path(path)
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ExportError(path, "there are no frames for a video", "ask for at least one")
    checked = (_even(frame, first.shape) for frame in chain([first], remaining))
    reason = ffmpeg_missing()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if reason is None:
            return _write_mp4(path, checked, fps)
        logger.warning("no MP4: %s; writing PNG frames and a GIF instead", reason)
        return _write_gif(path, checked, fps)
    except OSError as error:
        raise ExportError(
            path, f"cannot be written ({error})", "check permissions and free disk space"
        ) from error


def ffmpeg_missing() -> str | None:
    """``None`` where MP4 can be written, else why not and what to install."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return f"ffmpeg not found ({error}), pip install imageio-ffmpeg"
    return None


def _even(frame: Frame, shape: tuple[int, ...]) -> Frame:
    """The frame with even sides, which H.264's halved colour planes (yuv420p) need."""
    if frame.shape != shape or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(
            f"a frame has shape {frame.shape} and type {frame.dtype}, not {shape} (H, W, 3) and uint8"
        )
    return np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")


def _write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> Path:
    settings = {"codec": "libx264", "quality": 8, "pixelformat": "yuv420p", "macro_block_size": 2}
    writer: Any = imageio.get_writer(path, format="FFMPEG", mode="I", fps=fps, **settings)
    with writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def _write_gif(path: Path, frames: Iterable[Frame], fps: float) -> Path:
    folder, gif = path.with_suffix(""), path.with_suffix(".gif")
    folder.mkdir(exist_ok=True)
    writer: Any = imageio.get_writer(gif, format="GIF", mode="I", duration=1000.0 / fps, loop=0)
    with writer:
        for number, frame in enumerate(frames):
            imageio.imwrite(folder / f"{number:05d}.png", frame)
            writer.append_data(frame)
    return gif
