"""Captures in the layout of NeRF-Synthetic, which Blender renders.

::

    root_dir/
      transforms_train.json     {"camera_angle_x": 0.69, "frames": [{"file_path": "./train/r_0",
      transforms_val.json         "transform_matrix": [[...], [...], [...], [...]]}, ...]}
      transforms_test.json
      train/r_0.png ...         RGBA with straight alpha, the foreground mask
      val/r_0.png ...  test/r_0.png ...

``file_path`` comes without a suffix and counts from ``root_dir``. ``transform_matrix`` is camera to world
with OpenGL's camera axes (x right, y up, z backward). The principal point is the picture's middle and pixels
are square, unless a file has the camera keys of a transforms.json (``transforms.py``).

The world is Blender's: +z is up, and the object lies around the origin. Its region has radius 1.5, as in
instant-nsr-pl. Train views train; the views to measure on are those of the test (or val) file.

Source: Mildenhall et al., NeRF, ECCV 2020, https://github.com/bmild/nerf; instant-nsr-pl, confs of
NeRF-Synthetic, https://github.com/bennyguo/instant-nsr-pl.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from process_data.capture import CaptureConfig, build_scene
from process_data.formats.transforms_file import Frame, find_json, frame_view, read_frames, read_json
from process_data.views import Capture
from utils.errors import ConfigError
from utils.types import Scene

LOG = logging.getLogger(__name__)

_TRAIN = "transforms_train.json"
_LAYOUT = (
    "expected are transforms_train.json and, for measuring, transforms_test.json; "
    "for transforms.json set dataset.name=transforms"
)
_RADIUS = 1.5
"""Radius of the region in Blender's units; the value of instant-nsr-pl for NeRF-Synthetic."""


@dataclass(frozen=True)
class BlenderConfig(CaptureConfig):
    """Where a capture in NeRF-Synthetic's layout lies and how to read it."""

    name: str = "blender"
    """Format of the capture."""
    apply_mask: bool = True
    """The pictures' alpha channels are the masks; else they are composited over background."""
    eval_split: Literal["test", "val"] = "test"
    """Whose views are held out for measuring; the other one's if there is no such file."""
    eval_step: int = 1
    """Load every k-th of the views to measure on, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_step < 1:
            raise ConfigError(
                "dataset.eval_step", f"{self.eval_step} is below 1", "give 1 for all views, 8 for every 8th"
            )


def load_blender(config: BlenderConfig) -> Scene:
    """Load a capture in NeRF-Synthetic's layout.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent; the line names the file.
        ConfigError: ``dataset.holdout`` or a key of the region does not fit the capture.
    """
    root = find_json(config.root_dir, _TRAIN, _LAYOUT).parent
    train = _frames(root / _TRAIN)
    evaluation = _evaluation_frames(root, config.eval_split, {frame.photo for frame in train})
    frames = train + evaluation[:: config.eval_step]
    views = tuple(frame_view(frame, "opengl", "c2w", np.eye(4), config.apply_mask) for frame in frames)
    capture = Capture(
        root,
        views,
        world_from_scene=np.diag([_RADIUS, _RADIUS, _RADIUS, 1.0]),
        test_views=tuple(range(len(train), len(views))),
        up=np.array([0.0, 0.0, 1.0]),
    )
    return build_scene(capture, config)


def _frames(path: Path) -> list[Frame]:
    return read_frames(read_json(path), path)


def _evaluation_frames(root: Path, split: str, train: set[Path]) -> list[Frame]:
    """The frames to measure on, without those that are trained on."""
    other = "val" if split == "test" else "test"
    if not (root / f"transforms_{split}.json").is_file():
        if not (root / f"transforms_{other}.json").is_file():
            LOG.info("%s: neither transforms_test.json nor transforms_val.json: no view is held out", root)
            return []
        LOG.info("%s: no transforms_%s.json, transforms_%s.json is used in its place", root, split, other)
        split = other
    frames = _frames(root / f"transforms_{split}.json")
    unseen = [frame for frame in frames if frame.photo not in train]
    if len(unseen) < len(frames):
        LOG.warning(
            "%s: %d of %d views of transforms_%s.json are trained on, and not held out",
            root,
            len(frames) - len(unseen),
            len(frames),
            split,
        )
    return unseen
