"""The folder that ``--prepare`` writes: where it may lie, what may be deleted, and its config."""

import json
import os
import shutil
from pathlib import Path

import yaml

from process_data.prepare.frames import VIDEO_SUFFIXES
from process_data.prepare.masks import mask_folder
from process_data.prepare.photos import photo_folder
from utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "prepare.json"
WRITTEN = ("images", "masks", "sparse", "frames.csv", "neus.yaml", ".work", "colmap.log", SUMMARY)
"""All that this command writes into its folder, and hence all that it ever deletes there."""


def check_places(source: Path, out: Path) -> None:
    """Refuse sources that are none, and places where writing would touch the source."""
    if not source.exists():
        raise DataError(source, "no such file or folder", "give a folder of photos, or a video")
    if source.is_file() and source.suffix.lower() not in VIDEO_SUFFIXES:
        known = ", ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES))
        raise DataError(
            source, "neither a folder nor a video", f"give a folder of photos, or a video ({known})"
        )
    inner, outer = source.resolve(), out.resolve()
    taken = [inner]
    if source.is_dir():
        folder = photo_folder(source)
        taken += [place.resolve() for place in (folder, mask_folder(folder)) if place is not None]
    for place in taken:
        if place == outer or place.is_relative_to(outer):
            raise DataError(out, f"holds the photos ({place})", "choose another folder for --out")


def claim_folder(out: Path, overwrite: bool) -> None:
    """Make ``out``, or empty it of what an earlier run wrote.

    What a failed run left is only its log, so it may go without being asked for.

    Raises:
        DataError: it holds something, and may not be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise DataError(out, "is a file", "choose another folder for --out")
    if out.is_dir() and any(out.iterdir()):
        earlier = _earlier_status(out)
        if earlier is None:
            what = "is not empty and was not written by --prepare"
            raise DataError(out, what, "choose another folder for --out")
        if earlier == "done" and not overwrite:
            raise DataError(out, "was prepared before", "choose another --out, or add overwrite=true")
        for name in WRITTEN:
            remove(out / name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "check permissions, or choose another folder for --out"
        raise DataError(out, f"cannot be made ({error.strerror or error})", remedy) from error


def _earlier_status(out: Path) -> str | None:
    """Status of the run that wrote a folder, ``None`` where none did."""
    try:
        status = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status if status in ("unfinished", "failed", "done") else None


def remove(path: Path) -> None:
    """Delete a file or folder if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def display_path(path: Path) -> str:
    """A path as seen from the repository, where ``run.py`` is started; absolute outside of it."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def write_config(out: Path, has_masks: bool) -> None:
    """Write neus.yaml: a shipped config on this capture."""
    base = ROOT / "confs" / ("neus-colmap-wmask.yaml" if has_masks else "neus-colmap.yaml")
    folder = out.resolve()
    # Inside the repository everything is relative, so that it can be moved as a whole.
    base_path = os.path.relpath(base, folder) if folder.is_relative_to(ROOT) else str(base)
    content = {"base": base_path, "dataset": {"root_dir": display_path(out)}}
    text = "# Written by run.py --prepare. Keys added here override those of the base.\n"
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (out / "neus.yaml").write_text(text, encoding="utf-8")
