"""The folder that ``--prepare`` writes: where it may lie, what may be deleted, and its config."""

import json
import os
import shlex
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
KEPT_ON_FAILURE = ("colmap.log", SUMMARY)
"""What a failed run leaves."""


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
    """Make ``out``, or empty it of what an earlier run wrote; then none of ``WRITTEN`` is there.

    What a failed run left is only its log, so that may go without being asked for. Whatever else lies there
    is the user's: images/ and the like are never deleted then, other files only stay beside the new ones with
    ``overwrite``.

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
        if earlier == "failed":
            _require_only_a_log(out, overwrite)
        elif not overwrite:
            what = "was prepared before" if earlier == "done" else "holds an unfinished --prepare"
            raise DataError(out, what, "choose another --out, or add overwrite=true")
        for name in KEPT_ON_FAILURE if earlier == "failed" else WRITTEN:
            remove(out / name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "check permissions, or choose another folder for --out"
        raise DataError(out, f"cannot be made ({error.strerror or error})", remedy) from error


def _require_only_a_log(out: Path, overwrite: bool) -> None:
    """Refuse the folder of a failed run where something was added since."""
    added = sorted(path.name for path in out.iterdir() if path.name not in KEPT_ON_FAILURE)
    in_the_way = [name for name in added if name in WRITTEN] if overwrite else added
    if in_the_way:
        what = f"is not empty: {in_the_way[0]} is not from --prepare, which failed there"
        raise DataError(out, what, "move it away, or choose another folder for --out")


class Made:
    """The files and folders of ``WRITTEN`` that one run has made: all that it may delete."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write one of ``WRITTEN``, from now on this run's own.

        Raises:
            DataError: somebody else has put it there since the run began.
        """
        assert name in WRITTEN
        path = self.out / name
        if name not in self._names:
            if os.path.lexists(path):
                raise DataError(path, "appeared while --prepare was running", "move it away and try again")
            self._names.append(name)
        return path

    def remove_all(self) -> None:
        """Delete what was made, except for what a failed run leaves."""
        for name in self._names:
            if name not in KEPT_ON_FAILURE:
                remove(self.out / name)


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
    """A path as seen from the current folder; absolute outside of it."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command(config: Path, action: str) -> str:
    """The shell command that runs a config, to be entered in the current folder."""
    words = ["python", display_path(ROOT / "run.py"), "--config", display_path(config), action]
    return shlex.join(words)


def write_config(out: Path, has_masks: bool) -> None:
    """Write neus.yaml: a shipped config on this capture.

    ``dataset.root_dir`` counts from the folder in which training is started. It is relative only where that
    is the repository, of which the capture is a part; otherwise it is absolute and works from everywhere.
    """
    base = ROOT / "confs" / ("neus-colmap-wmask.yaml" if has_masks else "neus-colmap.yaml")
    folder = out.resolve()
    # Inside the repository everything is relative, so that it can be moved as a whole.
    is_at_home = Path.cwd().resolve() == ROOT and folder.is_relative_to(ROOT)
    root_dir = str(folder.relative_to(ROOT) if is_at_home else folder)
    base_path = os.path.relpath(base, folder) if folder.is_relative_to(ROOT) else str(base)
    content = {"base": base_path, "dataset": {"root_dir": root_dir}}
    text = "# Written by run.py --prepare. Keys added here override those of the base.\n"
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (out / "neus.yaml").write_text(text, encoding="utf-8")
