"""Conducting a sweep: start what is left to do, wait, write the table after every run."""

import logging
import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from systems import record
from systems.stop import StopRequest
from systems.sweep.launchers import Job, Launcher, LocalLauncher, RayLauncher
from systems.sweep.plan import PlannedRun, Sweep, check_captures, load_sweep
from systems.sweep.standing import INTERRUPTED, Standing, note_exit, standing_of
from systems.sweep.strips import write_strips
from systems.sweep.table import write_tables
from utils import backend
from utils.config import Sections
from utils.errors import UserError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where a sweep's runs go, and on what they run."""

    folder: Path
    """``<outputs_dir>/sweeps/<name>``."""
    logs_dir: Path
    """Tensorboard's; each run has a folder of its own below."""
    device: str
    vram: int | None

    def folder_of(self, run: PlannedRun) -> Path:
        """A run's folder: that with its hash, whatever the run was called when it was begun."""
        known = sorted(self.folder.glob(f"*-{run.digest}"))
        slug = re.sub(r"[^\w.=,@+-]+", "-", run.name).strip("-.")[:80]
        return known[0] if known else self.folder / f"{slug}-{run.digest}"

    def command(self, sweep: Sweep, run: PlannedRun, checkpoint: Path | None) -> list[str]:
        """The command line of a run, from a checkpoint on if there is one."""
        folder = self.folder_of(run)
        return [
            *(sys.executable, str(_PROJECT / "run.py"), "--config", str(sweep.config.absolute())),
            *(f"--{command}" for command in sweep.commands),
            *("--outputs_dir", str(folder), "--logs_dir", str(self.logs_dir / folder.name)),
            *("--device", self.device),
            *(() if self.vram is None else ("--vram", str(self.vram))),
            *(() if checkpoint is None else ("--resume", str(checkpoint))),
            *run.overrides,
        ]


def run_sweep(
    path: Path,
    overrides: Sequence[str],
    sections: Sections,
    outputs_dir: Path,
    *,
    logs_dir: Path | None = None,
    device: str = "auto",
    vram: int | None = None,
    launcher: Launcher | None = None,
) -> int:
    """Do what is left of a sweep, and write ``<outputs_dir>/sweeps/<name>/table.md``, ``.csv``, ``.xlsx``.

    Runs that are done are skipped, interrupted ones go on, failed ones are tried again. A run that fails does
    not stop the others. Ctrl-C or SIGTERM stops the present runs, which write their checkpoints; a second one
    stops them amid a step.

    Args:
        path: the sweep's YAML file, see ``plan.py``.
        overrides: ``key=value`` for all runs; not for keys that vary.
        sections: the schema of configs.
        outputs_dir: where outputs go.
        logs_dir: where tensorboard's logs go, ``<outputs_dir>/tf-logs`` if not given.
        device: ``auto``, ``cpu`` or ``cuda``.
        vram: GPU memory that each run has to fit into, GiB.
        launcher: starts the processes, instead of that which the file names.

    Returns:
        Exit code: 0 all runs are done, 1 some are not (the table says why), 130 interrupted.

    Raises:
        UserError: the file, a config or a capture is not in order, the launcher cannot be used, another
            process is at this sweep, or the folder cannot be written.
    """
    device = backend.resolve_device(device).type
    sweep = load_sweep(path, overrides, sections, device, vram)
    check_captures(sweep)
    launcher = launcher or _build_launcher(sweep, device)
    logs_dir = (logs_dir or outputs_dir / "tf-logs") / "sweeps" / sweep.name
    place = Place((outputs_dir / "sweeps" / sweep.name).resolve(), logs_dir.resolve(), device, vram)
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place.folder / "sweep.yaml")
    except OSError as error:
        raise UserError(
            place.folder, f"cannot be written ({error})", "choose another --outputs_dir"
        ) from error
    with _locked(place.folder):
        record.log_to(place.folder / "log.txt")
        return _Conductor(sweep, place, launcher).conduct()


class _Conductor:
    """One pass over a sweep's runs."""

    def __init__(self, sweep: Sweep, place: Place, launcher: Launcher) -> None:
        self.sweep, self.place, self.launcher = sweep, place, launcher
        self.standings = {run.digest: self._look_at(run) for run in sweep.runs}
        self.running: dict[str, tuple[PlannedRun, Job]] = {}

    def conduct(self) -> int:
        """Work through what is left; the exit code."""
        sweep, standings = self.sweep, self.standings
        waiting = deque(run for run in sweep.runs if standings[run.digest].state != "done")
        counts = Counter(standing.state for standing in standings.values())
        shown = ", ".join(f"{count} {state}" for state, count in counts.items())
        log.info("sweep %s: %d runs (%s) in %s", sweep.name, len(sweep.runs), shown, self.place.folder)
        log.info("watch with   tensorboard --logdir %s", self.place.logs_dir)
        with StopRequest() as stop:
            try:
                while (waiting and not stop.is_made) or self.running:
                    while waiting and not stop.is_made and len(self.running) < self.launcher.slots:
                        self._start(waiting.popleft())
                    self._collect()
                    if stop.is_made:
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                # Also when a table cannot be written: no run is left behind without anyone to wait for it.
                self._stop_all()
        self._write()
        failed = [run for run in sweep.runs if standings[run.digest].state == "failed"]
        for run in failed:
            log.error("%s failed: %s", run.name, standings[run.digest].message)
        if stop.is_made:
            log.info("interrupted; the same command goes on")
            return INTERRUPTED
        return 0 if all(standing.state == "done" for standing in standings.values()) else 1

    def _start(self, run: PlannedRun) -> None:
        folder = self.place.folder_of(run)
        folder.mkdir(exist_ok=True)
        (folder / "failure.json").unlink(missing_ok=True)
        checkpoint = self.standings[run.digest].last_checkpoint
        output = folder / "output.txt"
        job = self.launcher.start(self.place.command(self.sweep, run, checkpoint), output)
        self.running[run.digest] = (run, job)
        verb = "starts" if checkpoint is None else "goes on"
        log.info("%s %s; follow it with tail -f %s", self._label(run), verb, output)

    def _collect(self) -> None:
        """Take in what has ended, and bring table and pictures up to date."""
        ended = {digest: job.exit_code() for digest, (_, job) in self.running.items()}
        for digest, code in ended.items():
            if code is None:
                continue
            run, _ = self.running.pop(digest)
            note_exit(self.place.folder_of(run), code)
            self.standings[digest] = self._look_at(run)
            log.info("%s %s", self._label(run), self._describe(self.standings[digest]))
        if any(code is not None for code in ended.values()):
            self._write()

    def _stop_all(self) -> None:
        for _, job in self.running.values():
            job.interrupt()
        while self.running:
            try:
                self._collect()
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                for _, job in self.running.values():
                    job.interrupt()

    def _look_at(self, run: PlannedRun) -> Standing:
        return standing_of(self.place.folder_of(run), self.sweep.commands[-1])

    def _write(self) -> None:
        standings = {
            digest: replace(standing, state="running") if digest in self.running else standing
            for digest, standing in self.standings.items()
        }
        pictures: list[Path] = []
        try:
            pictures = write_strips(self.sweep, standings, self.place.folder)
        except UserError as error:
            # Pictures can be made again; the runs that are under way cannot.
            log.warning("no pictures side by side: %s", error)
        log.info("wrote %s", write_tables(self.sweep, standings, self.place.folder, pictures))

    def _label(self, run: PlannedRun) -> str:
        return f"[{self.sweep.runs.index(run) + 1}/{len(self.sweep.runs)}] {run.name}:"

    def _describe(self, standing: Standing) -> str:
        if standing.state != "done":
            return f"{standing.state} {standing.message}".strip()
        values = [(metric.name, standing.values.get(metric.path)) for metric in self.sweep.metrics]
        shown = [
            f"{name} {value:.4g}"
            for name, value in values
            if isinstance(value, (int, float)) and name not in ("steps", "minutes")
        ]
        minutes = standing.values.get("minutes")
        return ", ".join(["done", *shown, *([] if minutes is None else [f"{minutes:.1f} min of training"])])


def _build_launcher(sweep: Sweep, device: str) -> Launcher:
    """What the sweep's file asks for; runs side by side share the cores and the GPUs of this machine."""
    is_on_gpu = device == "cuda"
    if sweep.launcher == "ray":
        whole = {"num_gpus": 1} if is_on_gpu else {"num_cpus": os.cpu_count() or 1}
        return RayLauncher(sweep.parallel or len(sweep.runs), sweep.resources or whole)
    slots = sweep.parallel or 1
    threads = None
    if slots > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, backend.set_cpu_threads() // slots)
    gpus: list[str] = []
    if is_on_gpu and torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return LocalLauncher(slots, threads, gpus)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from this sweep, and from one whose runs outlived it.

    Runs inherit the lock, so that it is free only when the last of them has ended.

    Raises:
        UserError: the lock is taken.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl  # absent on Windows

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.set_inheritable(descriptor, True)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                folder, "another process is at this sweep", "wait for it, or stop it and its runs"
            ) from error
        yield
    finally:
        os.close(descriptor)
