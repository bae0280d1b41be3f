"""How far a run of a sweep is, from what lies on the disk and nothing else.

<run folder>/<config's name>/<trial>/    what run.py leaves behind
<run folder>/output.txt                  what its last process printed
<run folder>/failure.json                exit code and message of the last process, if that failed
<run folder>/runs.csv                    run.py's table, here of this run's trials alone
"""

import csv
import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from systems import checkpoint
from utils.errors import CheckpointError

State = Literal["new", "running", "interrupted", "failed", "done"]
INTERRUPTED = 130
"""Exit code of a run that was stopped and left a checkpoint."""
_RESULT = {"test": "save/metrics.json", "mesh": "save/transform.json"}
"""What the command writes last; both files name the step that they belong to."""


@dataclass(frozen=True)
class Standing:
    """What is known about a run."""

    state: State
    trial: Path | None = None
    """Folder of its trial, if it has one with a checkpoint."""
    message: str = ""
    """Why it failed, in one line."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Results by dotted path in metrics.json (when done) and by column of runs.csv."""

    @property
    def last_checkpoint(self) -> Path | None:
        """What the run can go on from."""
        return None if self.trial is None else self.trial / "ckpt" / "last.pth"


def standing_of(folder: Path, last_command: str) -> Standing:
    """Look at a run's folder.

    Args:
        folder: see above; need not exist.
        last_command: ``train``, ``mesh`` or ``test``: what must have been done for the run to be done.

    Returns:
        ``done`` once training came to its end and the last command to its result at that very step.
    """
    checkpoints = sorted(folder.glob("*/*/ckpt/last.pth"), key=lambda file: file.stat().st_mtime)
    failure = _read_json(folder / "failure.json")
    message = f"exit code {failure.get('exit_code')}: {failure.get('message')}" if failure else ""
    if not checkpoints:
        return Standing("failed" if failure else "new", None, message)
    trial = checkpoints[-1].parent.parent
    values = _numbers_of(folder / "runs.csv", trial.name)
    if _is_done(trial, last_command):
        results = dict(_flat(_read_json(trial / _RESULT["test"]))) if last_command == "test" else {}
        return Standing("done", trial, "", results | values)
    return Standing("failed" if failure else "interrupted", trial, message, values)


def note_exit(folder: Path, code: int) -> None:
    """Keep why a process failed for :func:`standing_of`, or forget an earlier failure."""
    path = folder / "failure.json"
    # Before run.py is under way, Ctrl-C ends Python as the signal itself.
    if code in (0, INTERRUPTED, -signal.SIGINT):
        path.unlink(missing_ok=True)
        return
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (the machine may have run out of memory)" if -code == 9 else ""
        message = f"ended by {name}{hint}"
    else:
        message = _last_line(folder / "output.txt")
    path.write_text(json.dumps({"exit_code": code, "message": message}) + "\n")


def _is_done(trial: Path, last_command: str) -> bool:
    result = _read_json(trial / _RESULT[last_command]) if last_command in _RESULT else None
    if last_command in _RESULT and not result:
        return False
    try:
        state = checkpoint.load(trial / "ckpt" / "last.pth")
    except CheckpointError:
        return False  # The run itself will say what is wrong with it.
    return state["fraction"] >= 1.0 and (result is None or result.get("step") == state["step"])


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where it is missing or was cut off in writing."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of nested mappings by dotted path; lists are left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield prefix + key, value


def _numbers_of(table: Path, trial: str) -> dict[str, int | float]:
    """Steps, minutes and frames of a trial in runs.csv, where they are there."""
    try:
        with table.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("trial") == trial]
    except OSError:
        return {}
    cells = {name: rows[-1].get(name) for name in ("steps", "minutes", "frames")} if rows else {}
    return {name: float(cell) if name == "minutes" else int(cell) for name, cell in cells.items() if cell}


def _last_line(path: Path) -> str:
    """The last line of a process's output that says something; progress bars rewrite theirs with returns."""
    try:
        lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
