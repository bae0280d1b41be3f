"""From a folder of photos, or a video, to a capture that is ready to train: ``run.py --prepare``.

::

    photos / video ─> images/ ─> masks/ ─> features ─> matches ─> mapping ─> sparse/0/ ─> neus.yaml
                      upright    optional  └────────── COLMAP ───────────┘

    out/
      images/                 upright photos, or frames of the video (frames.csv says which)
      masks/                  <stem>.png, 255 = foreground, if there are masks
      sparse/0/*.bin          COLMAP's model: cameras, images, points3D, rigs, frames
      prepare.json            what was done and how well it went; marks the folder as written by this command
      colmap.log              what COLMAP said
      neus.yaml               a config to train with

The poses are in COLMAP's own frame and scale. The photos keep their lens distortion, which training knows
about, unless ``undistort=true``.

Source: Schoenberger and Frahm, Structure-from-Motion Revisited, CVPR 2016 (COLMAP, through pycolmap).
"""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from process_data.prepare.colmap import (
    Colmap,
    Model,
    Photo,
    colmap_missing,
    exhaustive_pairs,
    sequential_pairs,
)
from process_data.prepare.diagnosis import diagnose
from process_data.prepare.folder import (
    SUMMARY,
    Made,
    check_places,
    claim_folder,
    command,
    remove,
    write_config,
)
from process_data.prepare.frames import extract_frames
from process_data.prepare.masks import make_masks, write_motion_masks
from process_data.prepare.photos import Collected, collect_photos, photo_folder, require_photos
from utils.errors import BackendError, ConfigError, DataError, UserError
from utils.schema import describe, fields_of, unknown_key

LOG = logging.getLogger(__name__)

_MAX_EXHAUSTIVE = 150
_CAMERA_MODELS = (
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "FULL_OPENCV",
    "OPENCV_FISHEYE",
)


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of ``--prepare``."""

    frames: int = 150
    """Frames to pick from a video, >= 3."""
    max_size: int = 0
    """Longest side of the written pictures in pixels; 0 = as they are."""
    masks: Literal["auto", "none", "folder", "alpha", "rembg"] = "auto"
    """Where foreground masks come from; folder: masks/, or NAME_mask.png beside the photos; auto: from there,
    else alpha channels, else none."""
    turntable: bool = False
    """The camera stands still and the object turns: only features on the object count."""
    matching: Literal["auto", "exhaustive", "sequential"] = "auto"
    """Which photos are compared; auto: all with all up to 150 photos, else (and for videos) neighbours."""
    camera_model: str = "SIMPLE_RADIAL"
    """COLMAP's name of the camera model."""
    single_camera: bool = True
    """Photos of one size share a camera."""
    max_features: int = 4096
    """SIFT features per photo."""
    feature_size: int = 1600
    """Longest side in pixels at which features are looked for."""
    min_registered: float = 0.7
    """Share of the photos that must be placed, 0..1."""
    undistort: bool = False
    """Write pinhole pictures instead of those with the lens's distortion."""
    overwrite: bool = False
    """Delete what an earlier --prepare, finished or not, wrote to the folder."""

    def __post_init__(self) -> None:
        limits = {"frames": 3, "max_features": 100, "feature_size": 100}
        for key, least in limits.items():
            if getattr(self, key) < least:
                raise ConfigError(key, f"{getattr(self, key)} is below {least}", f"give at least {least}")
        if self.max_size != 0 and self.max_size < 64:
            raise ConfigError("max_size", f"{self.max_size} is below 64", "give 0 to keep the size")
        if not 0.0 <= self.min_registered <= 1.0:
            raise ConfigError("min_registered", f"{self.min_registered} is not in 0..1", "0.7 is usual")
        if self.camera_model not in _CAMERA_MODELS:
            known = ", ".join(_CAMERA_MODELS)
            raise ConfigError("camera_model", f"{self.camera_model!r} is unknown", f"choose one of {known}")


@dataclass(frozen=True)
class PrepareSummary:
    """How it went: what ``prepare.json`` holds."""

    status: Literal["unfinished", "failed", "done"]
    source: str
    photos: int = 0
    registered: int = 0
    left_out: tuple[str, ...] = ()
    """Names of the photos that could not be placed."""
    points: int = 0
    mean_reprojection_error: float = 0.0
    """Pixels."""
    mean_track_length: float = 0.0
    """Photos per point."""
    cameras: tuple[str, ...] = ()
    masks: str | None = None
    """Where the masks are from."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """By stage."""
    reason: str | None = None
    """Why it failed."""


def parse_prepare(overrides: list[str]) -> PrepareConfig:
    """Read ``key=value`` strings; the last of a key counts.

    Raises:
        ConfigError: malformed, an unknown key (the nearest known one is named), or an unfit value.
    """
    fields = fields_of(PrepareConfig) or {}
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}", "not of the form key=value", "write e.g. frames=100")
        if key not in fields:
            raise unknown_key(key, text, fields, fields)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        hint = fields[key]
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        options = getattr(hint, "__args__", ())
        # bool is a kind of int in Python, but frames=true is a mistake.
        if not (value in options if options else type(value) is hint):
            raise ConfigError(key, f"expected {describe(hint)}, got {text!r}", "correct the value")
        values[key] = value
    return PrepareConfig(**values)


def prepare(source: Path, out: Path, overrides: list[str]) -> PrepareSummary:
    """Make a ready-to-train COLMAP capture of photos or a video.

    Args:
        source: a folder of photos (or one with images/ in it), or a video; nothing in it is changed.
        out: folder to write.
        overrides: ``key=value`` strings with the keys of :class:`PrepareConfig`.

    Returns:
        What ``prepare.json`` holds.

    Raises:
        ConfigError: a key or value is wrong.
        DataError: the source cannot be used, ``out`` is not empty, or too few photos could be placed; then
            ``out`` keeps colmap.log and prepare.json, which says which ones.
        BackendError: pycolmap is missing.
    """
    config = parse_prepare(overrides)
    missing = colmap_missing()
    if missing is not None:
        raise BackendError("--prepare", missing, "then try again")
    source, out = source.expanduser(), out.expanduser()
    check_places(source, out)
    claim_folder(out, config.overwrite)
    preparation = _Preparation(source, out, config)
    _write_summary(out, preparation.summary)
    try:
        preparation.run()
    except BaseException as error:
        preparation.made.remove_all()
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        _write_summary(out, dataclasses.replace(preparation.summary, status="failed", reason=reason))
        raise
    remove(preparation.made.path(".work"))
    summary = dataclasses.replace(preparation.summary, status="done")
    _write_summary(out, summary)
    print(f"look:  {command(out / 'neus.yaml', '--inspect')}")
    print(f"train: {command(out / 'neus.yaml', '--train')}")
    return summary


class _Preparation:
    """One run of ``--prepare``, stage by stage."""

    def __init__(self, source: Path, out: Path, config: PrepareConfig) -> None:
        self.source, self.out, self.config = source, out, config
        self.seconds: dict[str, float] = {}
        self.made = Made(out)
        self.summary = PrepareSummary("unfinished", str(source.resolve()))
        """What is known so far."""

    def run(self) -> None:
        """Photos, masks, COLMAP, output."""
        start = time.perf_counter()
        photos, folder = self._collect()
        self.seconds["photos"] = time.perf_counter() - start
        LOG.info("%d photos from %s", len(photos), self.source)

        start = time.perf_counter()
        masks, feature_masks = self._mask(photos, folder)
        self.seconds["masks"] = time.perf_counter() - start
        if masks is not None:
            LOG.info("%s", masks)
        elif self.config.masks == "auto":
            LOG.info("no masks found; the surroundings are trained as well")

        self.summary = dataclasses.replace(self.summary, photos=len(photos), masks=masks)
        colmap, model = self._reconstruct(photos, feature_masks)
        if not self._is_enough(model, photos):
            self._summarize(colmap, model, photos)
            raise self._failure(colmap, photos)
        assert model is not None
        if self.config.undistort:
            self._take_undistorted(colmap, model, masks is not None)
        else:
            sparse = self.made.path("sparse")
            sparse.mkdir()
            model.folder.rename(sparse / "0")
        self.made.path("neus.yaml")
        write_config(self.out, masks is not None)
        self._summarize(colmap, model, photos)

    def _summarize(self, colmap: Colmap, model: Model | None, photos: list[Collected]) -> None:
        """Fill the summary, and log it."""
        self.seconds.update(colmap.seconds)
        placed = set() if model is None else set(model.placed)
        self.summary = dataclasses.replace(
            self.summary,
            registered=len(placed),
            left_out=tuple(photo.path.name for photo in photos if photo.path.name not in placed),
            seconds={stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        )
        if model is not None:
            self.summary = dataclasses.replace(
                self.summary,
                points=model.num_points,
                mean_reprojection_error=round(model.mean_reprojection_error, 4),
                mean_track_length=round(model.mean_track_length, 3),
                cameras=model.cameras,
            )
        _log_summary(self.summary, () if model is None else model.other_models)

    def _collect(self) -> tuple[list[Collected], Path]:
        """Fill images/; also give the folder where the user's photos lie."""
        images = self.made.path("images")
        if not self.source.is_file():
            folder = photo_folder(self.source)
            return collect_photos(folder, images, self.config.max_size), folder
        picked = self.made.path(".work") / "picked"
        frames = extract_frames(self.source, picked, self.made.path("frames.csv"), self.config.frames)
        require_photos(self.source, len(frames))
        return collect_photos(picked, images, self.config.max_size), picked

    def _mask(self, photos: list[Collected], folder: Path) -> tuple[str | None, Path | None]:
        """Fill masks/; give where they are from, and the folder of those that limit the features."""
        target = self.made.path("masks")
        masks = make_masks(self.config.masks, photos, folder, target)
        if not self.config.turntable:
            return masks, None
        if masks is not None:
            return masks, target
        if self.config.masks == "none":
            target = self.made.path(".work") / "motion"
            write_motion_masks(photos, target)
            return None, target
        write_motion_masks(photos, target)
        LOG.warning("masks/ was estimated from what moves; look at it before you train on it")
        return "masks estimated from what moves", target

    def _reconstruct(
        self, photos: list[Collected], feature_masks: Path | None
    ) -> tuple[Colmap, Model | None]:
        """Place the photos, if need be once more with all pairs."""
        config = self.config
        is_long = self.source.is_file() or len(photos) > _MAX_EXHAUSTIVE
        is_sequential = config.matching == "sequential" or (config.matching == "auto" and is_long)
        every_pair = exhaustive_pairs(len(photos))
        pairs = sequential_pairs(len(photos)) if is_sequential else every_pair
        LOG.info("matching %d of %d pairs of photos", len(pairs), len(every_pair))

        views = [
            Photo(photo.path, photo.size, feature_masks and feature_masks / f"{photo.path.stem}.png")
            for photo in photos
        ]
        colmap = Colmap(self.made.path(".work") / "colmap", self.made.path("colmap.log"), views)
        colmap.extract(config.camera_model, config.single_camera, config.max_features, config.feature_size)
        colmap.match(pairs, config.turntable)
        model = colmap.map()
        if not self._is_enough(model, photos) and len(pairs) < len(every_pair):
            num_placed = 0 if model is None else len(model.placed)
            LOG.warning(
                "only %d of %d photos were placed; matching all %d pairs",
                num_placed,
                len(photos),
                len(every_pair),
            )
            colmap.match(every_pair, config.turntable)
            model = colmap.map()
        return colmap, model

    def _is_enough(self, model: Model | None, photos: list[Collected]) -> bool:
        return model is not None and len(model.placed) >= self.config.min_registered * len(photos)

    def _failure(self, colmap: Colmap, photos: list[Collected]) -> DataError:
        """The line that says why too few photos were placed; needs the summary."""
        placed, left_out = self.summary.registered, self.summary.left_out
        diagnosis = diagnose(colmap.num_features(), colmap.pairs(), [photo.sharpness for photo in photos])
        names = ", ".join(left_out[:4]) + (f" and {len(left_out) - 4} more" if len(left_out) > 4 else "")
        what = f"only {placed} of {len(photos)} photos could be placed: {diagnosis.what}; left out: {names}"
        return DataError(self.source, what, diagnosis.remedy)

    def _take_undistorted(self, colmap: Colmap, model: Model, has_masks: bool) -> None:
        """Put the pinhole pictures, masks and model in the place of the distorted ones."""
        masks = self.out / "masks" if has_masks else None
        folder = colmap.undistort(model, self.out / "images", masks)
        self.seconds["undistort"] = colmap.seconds["undistort"]
        for name in ("images", "masks") if has_masks else ("images",):
            remove(self.out / name)
            (folder / name).rename(self.out / name)
        sparse = self.made.path("sparse")
        sparse.mkdir()
        (folder / "sparse").rename(sparse / "0")


def _write_summary(out: Path, summary: PrepareSummary) -> None:
    text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False)
    (out / SUMMARY).write_text(text + "\n", encoding="utf-8")


def _log_summary(summary: PrepareSummary, other_models: tuple[int, ...]) -> None:
    LOG.info(
        "%d of %d photos placed, %d points, reprojection error %.2f px, %.1f photos per point",
        summary.registered,
        summary.photos,
        summary.points,
        summary.mean_reprojection_error,
        summary.mean_track_length,
    )
    for camera in summary.cameras:
        LOG.info("camera %s", camera)
    if other_models:
        LOG.info("other models, left aside, had %s photos", ", ".join(map(str, other_models)))
    if summary.left_out:
        LOG.warning("%d photos could not be placed: %s", len(summary.left_out), ", ".join(summary.left_out))
    LOG.info("seconds: %s", ", ".join(f"{stage} {value:.0f}" for stage, value in summary.seconds.items()))
