"""What a run leaves behind: its folder, log, history, tensorboard and one line in the table of all runs.

outputs/<name>/<trial>/   config/parsed.yaml  command.txt  code/  ckpt/  save/  history.csv  log.txt
outputs/runs.csv          one line per run
outputs/tf-logs/<name>/<trial>/
"""

import csv
import datetime
import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.config import Config
from utils.errors import UserError
from utils.types import Scene

_ROOMS = ("confs", "encoder", "models", "process_data", "systems", "utils")
_PROJECT = Path(__file__).resolve().parent.parent
_RUN_COLUMNS = (
    *("name", "trial", "dataset", "scene", "frames", "losses", "steps", "minutes"),
    *("psnr", "psnr_masked", "ssim", "lpips", "chamfer", "folder"),
)

_handlers: list[
    logging.Handler
] = []  # of the present run; the log is the process's own, and others have theirs


class Run:
    """One trial's folder. Build it with :meth:`start` or :meth:`reopen`."""

    def __init__(self, folder: Path, outputs_dir: Path, logs_dir: Path) -> None:
        self.folder = folder.resolve()
        self.outputs_dir = outputs_dir.resolve()
        self.name, self.trial = self.folder.parts[-2], self.folder.parts[-1]
        self.tensorboard_dir = logs_dir.resolve() / self.name / self.trial
        self._tensorboard: SummaryWriter | None = None
        self._history_columns: list[str] | None = None
        try:
            self.tensorboard_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(logs_dir, f"cannot be written ({error})", "choose another --logs_dir") from error
        log_to(self.folder / "log.txt")

    @classmethod
    def start(cls, config: Config, outputs_dir: Path, logs_dir: Path, command: Sequence[str]) -> "Run":
        """Make a new trial's folder with the resolved config, the command line and a copy of the sources.

        Raises:
            UserError: the outputs folder cannot be written.
        """
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        try:
            folder = _new_folder(outputs_dir / config.name, f"{config.tag}@{stamp}")
            for part in ("config", "ckpt", "save"):
                (folder / part).mkdir()
            (folder / "config" / "parsed.yaml").write_text(config.to_yaml())
            (folder / "command.txt").write_text(shlex.join(command) + "\n")
            for room in _ROOMS:
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.nbi", "*.nbc")
                shutil.copytree(_PROJECT / room, folder / "code" / room, ignore=ignore)
            shutil.copy2(_PROJECT / "run.py", folder / "code")
        except OSError as error:
            raise UserError(
                outputs_dir, f"cannot be written ({error})", "choose another --outputs_dir"
            ) from error
        run = cls(folder, outputs_dir, logs_dir)
        run.announce()
        return run

    @classmethod
    def reopen(cls, folder: Path, logs_dir: Path) -> "Run":
        """Go on in an existing trial's folder."""
        run = cls(folder, folder.resolve().parent.parent, logs_dir)
        run.announce()
        return run

    def announce(self) -> None:
        """Say where everything goes and how to watch."""
        log = logging.getLogger(__name__)
        log.info("run folder   %s", self.folder)
        log.info("log file     %s", self.folder / "log.txt")
        log.info("watch with   tensorboard --logdir %s", shlex.quote(str(self.tensorboard_dir)))

    def write_split(self, scene: Scene) -> None:
        """Say in ``save/split.json`` which views are trained on and which are held out."""
        names = {
            "train": [scene.image_names[index] for index in scene.train_indices],
            "held-out": [scene.image_names[index] for index in scene.test_indices],
        }
        (self.save / "split.json").write_text(json.dumps(names, indent=2) + "\n")

    @property
    def save(self) -> Path:
        """Folder of pictures, meshes, videos and metrics."""
        return self.folder / "save"

    @property
    def checkpoints(self) -> Path:
        """Folder of the newest checkpoints."""
        return self.folder / "ckpt"

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one row to history.csv and the same numbers to tensorboard.

        The columns are those of the file's first row; a run keeps its set of scalars.
        """
        path = self.folder / "history.csv"
        if self._history_columns is None:
            self._history_columns = self._columns_of(path) or ["step", *values]
            if not path.exists():
                path.write_text(",".join(self._history_columns) + "\n")
        row = {"step": step, **values}
        with path.open("a", newline="") as file:
            csv.writer(file).writerow([_cell(row.get(column)) for column in self._history_columns])
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(str(self.tensorboard_dir), purge_step=step)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def forget_after(self, step: int) -> None:
        """Drop history rows beyond ``step``: a run resumed from an older checkpoint writes them anew."""
        path = self.folder / "history.csv"
        if path.exists():
            head, *rows = path.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
            path.write_text("\n".join([head, *kept]) + "\n")

    def list_in_table(self, values: Mapping[str, object]) -> None:
        """Write or update this run's line in ``outputs/runs.csv``; values given earlier stay."""
        path = self.outputs_dir / "runs.csv"
        rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        mine = next((r for r in rows if (r["name"], r["trial"]) == (self.name, self.trial)), None)
        if mine is None:
            mine = {}
            rows.append(mine)
        new = {"name": self.name, "trial": self.trial, "folder": str(self.folder), **values}
        mine.update({key: _cell(value) for key, value in new.items()})
        temporary = path.with_suffix(".partial")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, _RUN_COLUMNS, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)

    def close(self) -> None:
        """Flush tensorboard."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    @staticmethod
    def _columns_of(path: Path) -> list[str] | None:
        if not path.exists():
            return None
        with path.open() as file:
            return file.readline().strip().split(",")


class EarlyLog(logging.Handler):
    """Keeps what is logged before there is a run, whose log it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        _add_handler(self)

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102 - logging documents it
        self._records.append(record)

    def pour(self) -> None:
        """Hand what was kept to the run's handlers, which took this one's place."""
        for record in self._records:
            logging.getLogger().handle(record)


def _cell(value: object) -> str:
    # repr keeps every digit of a float: two histories are equal exactly when the runs were.
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _new_folder(parent: Path, trial: str) -> Path:
    """Make ``parent/trial``, with a number behind it when two runs start within one second."""
    for suffix in ["", *(f"-{k}" for k in range(2, 100))]:
        folder = parent / (trial + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / trial} and 98 numbered ones exist")


def log_to(path: Path | None) -> None:
    """Send the project's log to the terminal and to a file if given, instead of to an earlier run's."""
    release_log()
    formatter = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path))
    for handler in handlers:
        handler.setFormatter(formatter)
        _add_handler(handler)


def _add_handler(handler: logging.Handler) -> None:
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    _handlers.append(handler)


def release_log() -> None:
    """Take the present run's handlers off the log and close them; handlers of others stay."""
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()
