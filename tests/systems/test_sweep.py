"""Sweeps: what their files ask for, what is left to do, and the tables and pictures of what came of it."""

import csv
import json
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from tiny import SECTIONS

import run
from systems import checkpoint, export
from systems.evaluate import ViewRender, view_panel
from systems.sweep import run_sweep
from systems.sweep.conduct import Place
from systems.sweep.launchers import LocalLauncher, RayLauncher
from systems.sweep.plan import Sweep, load_sweep
from systems.sweep.standing import Standing, note_exit, standing_of
from systems.sweep.strips import labelled, split_panel, write_strips
from systems.sweep.table import means_table, runs_table, write_tables
from systems.sweep.xlsx import Cell, write_xlsx
from utils.errors import BackendError, ConfigError, UserError
from utils.images import write_png
from utils.metrics import compare_surfaces

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
TWO = "grid: {trainer.optimizer.grid: [0.01, 0.02]}"


def written(folder: Path, *lines: str) -> Path:
    """A sweep's file with these lines, on the tiny config."""
    path = folder / "two.yaml"
    path.write_text("\n".join([f"config: {TINY}", *lines]) + "\n")
    return path


def planned(folder: Path, *lines: str, overrides: Sequence[str] = ()) -> Sweep:
    return load_sweep(written(folder, *lines), overrides, SECTIONS)


def names(sweep: Sweep) -> list[str]:
    return [planned_run.name for planned_run in sweep.runs]


# The file


def test_a_grid_is_all_combinations(tmp_path: Path) -> None:
    sweep = planned(tmp_path, "grid: {seed: [1, 2], system.loss.mask: [0.1, [[0, 0.1], [1, 0]]]}")
    assert names(sweep) == ["seed=1,mask=0.1", "seed=1,mask=[[0,0.1],[1,0]]", *names(sweep)[2:]]
    assert [r.setting("seed") for r in sweep.runs] == [1, 1, 2, 2]
    assert sweep.runs[3].setting("system.loss.mask") == [[0, 0.1], [1, 0]]
    assert sweep.varying == ("seed", "system.loss.mask")
    assert (sweep.name, sweep.commands, sweep.launcher) == ("two", ("train", "test"), "local")


def test_named_runs_with_every_point_of_a_grid(tmp_path: Path) -> None:
    lines = ("runs: [{name: full}, {name: no-mask, set: {system.loss.mask: 0}}]", "grid: {seed: [1, 2]}")
    sweep = planned(tmp_path, *lines)
    assert names(sweep) == ["full,seed=1", "full,seed=2", "no-mask,seed=1", "no-mask,seed=2"]
    # Of a run that leaves a key alone the config's value counts.
    assert [r.setting("system.loss.mask") for r in sweep.runs] == [0.1, 0.1, 0, 0]


def test_keys_of_one_value_stay_out_of_the_names_and_equal_ends_are_told_apart(tmp_path: Path) -> None:
    sweep = planned(
        tmp_path,
        "grid: {trainer.max_steps: [9], model.sdf.hidden_width: [8, 9], model.radiance.hidden_width: [8, 9]}",
    )
    assert names(sweep)[0] == "sdf.hidden_width=8,radiance.hidden_width=8"
    assert "trainer.max_steps" not in sweep.varying
    assert sweep.runs[0].setting("trainer.max_steps") == 9


def test_what_overrides_what(tmp_path: Path) -> None:
    lines = (
        "common: {trainer.max_steps: 5, trainer.log_every: 5, seed: 5, tag: '1'}",
        "runs: [{name: a, set: {seed: 6}}]",
    )
    (only,) = planned(tmp_path, *lines, overrides=["trainer.log_every=7"]).runs
    keys = ("trainer.max_steps", "trainer.log_every", "seed", "tag")
    assert [only.setting(key) for key in keys] == [5, 7, 6, "1"]
    (same,) = planned(tmp_path, 'common: [trainer.max_steps=5, trainer.log_every=7, tag="1"]', lines[1]).runs
    assert same.digest == only.digest


def test_settings_make_the_hash_and_names_do_not(tmp_path: Path) -> None:
    a, b = planned(tmp_path, TWO).runs
    renamed, changed = planned(
        tmp_path,
        "runs: [{name: x, set: {trainer.optimizer.grid: 0.01}}, {name: grid=0.02, set: {seed: 3}}]",
    ).runs
    assert a.digest == renamed.digest
    assert len({a.digest, b.digest, changed.digest}) == 3
    place = Place(tmp_path, tmp_path, "cpu", None)
    place.folder_of(a).mkdir()
    assert place.folder_of(a).name == f"grid=0.01-{a.digest}"
    assert place.folder_of(renamed) == place.folder_of(a)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("grit: {seed: [1]}",), "two.yaml: unknown key 'grit'; did you mean grid?"),
        ((), "nothing to run; give grid"),
        (("grid: {}",), "nothing to run; give grid"),
        (("grid: {seed: []}",), "grid: seed: empty list; write"),
        (("grid: {seed: 3}",), "grid: seed: 3 is not a list of values; write"),
        (("grid: [seed=3]",), "grid: not a mapping of keys to lists; write"),
        (("name: a/b", TWO), "name: 'a/b' cannot be the name of a folder; use"),
        (("runs: [{set: {seed: 1}}]",), "has no name; write"),
        (("runs: [{name: a, sett: {seed: 1}}]",), "runs: a: unknown key 'sett'; did you mean set?"),
        (("runs: [{name: a}, {name: a, set: {seed: 1}}]",), "2 runs are called a; give"),
        (("runs: [{name: a}, {name: b, set: {seed: 7}}]",), "runs a and b have the same settings; remove"),
        (("runs: [{name: a, set: {seed: 1}}]", "grid: {seed: [1]}"), "seed: is in runs and in grid; leave"),
        ((TWO, "metrics: [psnr_maskd]"), "unknown metric 'psnr_maskd'; did you mean psnr_masked?"),
        ((TWO, "launcher: rai"), "unknown launcher 'rai'; did you mean ray?"),
        ((TWO, "commands: [test]"), "commands: ['test'] cannot be done; give one of [train, test]"),
        ((TWO, "parallel: 0"), "parallel: expected 1 or more, got 0; give"),
        ((TWO, "resources: {gpus: 1}"), "unknown key 'gpus'; did you mean num_gpus?"),
        ((TWO, "common: 3"), "common: not a mapping and not a list of key=value; write"),
        (
            ("grid: {trainer.max_step: [1, 2]}",),
            "run max_step=1: trainer.max_step: unknown key; did you mean trainer.max_steps?",
        ),
        (("grid: {seed: [1, -1]}",), "run seed=-1: seed: must be between"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, *lines)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_is_looked_for_beside_the_file_and_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sub" / "s.yaml"
    path.parent.mkdir()
    for config, folder in (("../beside.yaml", tmp_path), ("confs/here.yaml", tmp_path / "work")):
        file = path.parent / config if folder == tmp_path else folder / config
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"base: {os.path.relpath(TINY, file.parent)}\n")
        path.write_text(f"config: {config}\n{TWO}\n")
        (tmp_path / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "work")
        assert load_sweep(path, (), SECTIONS).config.resolve() == file.resolve()
    path.write_text(f"config: ../besides.yaml\n{TWO}\n")
    with pytest.raises(ConfigError, match=r"no such file; did you mean \S*beside\.yaml\?"):
        load_sweep(path, (), SECTIONS)


def test_keys_that_vary_are_not_overridden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="varies this key; change its values there"):
        planned(tmp_path, TWO, overrides=["trainer.optimizer.grid=1"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "confs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_sweeps_that_come_with_the_project_are_valid(path: Path) -> None:
    sweep = load_sweep(path, (), SECTIONS)
    assert sweep.name == path.stem
    assert len(sweep.runs) >= 2


# What is left to do


def pretend(
    folder: Path, *, fraction: float, step: int = 8, results_at: int | None = 8, trial: str = "run@1"
) -> Path:
    """What a run leaves behind, as far as sweeps look at it."""
    trial_folder = folder / "tiny" / trial
    checkpoint.save(trial_folder / "ckpt", step, {"fraction": fraction}, keep=1)
    (trial_folder / "save").mkdir(exist_ok=True)
    if results_at is not None:
        results = {"step": results_at, "mean": {"psnr": 20.5, "lpips": None}, "views": [{"psnr": 1}]}
        (trial_folder / "save" / "metrics.json").write_text(json.dumps(results))
    (folder / "runs.csv").write_text(
        f"name,trial,steps,minutes,frames\ntiny,other,1,1.0,1\ntiny,{trial},{step},0.25,8\n"
    )
    return trial_folder


def test_standing_follows_from_the_disk(tmp_path: Path) -> None:
    assert standing_of(tmp_path / "none", "test") == Standing("new")
    trial = pretend(tmp_path, fraction=0.5, results_at=8)
    # Someone has tested the checkpoint of a run that was not at its end.
    assert standing_of(tmp_path, "test").state == "interrupted"
    pretend(tmp_path, fraction=1.0, results_at=None)
    (trial / "save" / "metrics.json").write_text('{"step": 8, "me')
    assert standing_of(tmp_path, "test").state == "interrupted"
    assert standing_of(tmp_path, "train").state == "done"
    pretend(tmp_path, fraction=1.0, results_at=6)
    assert standing_of(tmp_path, "test").state == "interrupted"
    pretend(tmp_path, fraction=1.0)
    done = standing_of(tmp_path, "test")
    assert (done.state, done.trial, done.last_checkpoint) == ("done", trial, trial / "ckpt" / "last.pth")
    assert dict(done.values) == {
        **{"step": 8, "mean.psnr": 20.5, "mean.lpips": None},
        **{"steps": 8, "minutes": 0.25, "frames": 8},
    }
    (trial / "ckpt" / "last.pth").write_bytes(b"broken")
    assert standing_of(tmp_path, "test").state == "interrupted"


def test_why_a_run_failed(tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text("12%|##\r50%|####\rrun.py: a: no such folder; check\n\n")
    note_exit(tmp_path, 2)
    failed = standing_of(tmp_path, "test")
    assert (failed.state, failed.message) == ("failed", "exit code 2: run.py: a: no such folder; check")
    note_exit(tmp_path, -9)
    assert (
        "ended by SIGKILL (the machine may have run out of memory)" in standing_of(tmp_path, "test").message
    )
    for code in (130, -2, 0):
        note_exit(tmp_path, 2)
        note_exit(tmp_path, code)
        assert standing_of(tmp_path, "test").state == "new"


# Processes


class Instant:
    """A launcher whose processes are calls that end at once."""

    slots = 1

    def __init__(self, act: Callable[[list[str], Path], int]) -> None:
        self.act = act
        self.commands: list[list[str]] = []

    def start(self, command: Sequence[str], output: Path) -> Any:
        self.commands.append(list(command))
        code = self.act(list(command), output)
        return SimpleNamespace(exit_code=lambda: code, interrupt=lambda: None)


def in_this_process(command: list[str], output: Path) -> int:
    """What ``python run.py`` would do."""
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        return run.main(command[2:])


def sweep_with(launcher: Any, path: Path, outputs: Path, *overrides: str) -> int:
    return run_sweep(path, overrides, SECTIONS, outputs, device="cpu", launcher=launcher)


def test_from_a_file_to_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real trainings, the second of which is interrupted at first."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(export, "compare_surfaces", partial(compare_surfaces, num_samples=500))
    path = written(
        tmp_path,
        "common: {trainer.max_steps: 4, test.video: false, export.resolution: 16, dataset.num_images: 5}",
        TWO,
    )
    outputs = tmp_path / "outputs"

    def act(command: list[str], output: Path) -> int:
        if "trainer.optimizer.grid=0.02" in command:
            shorter = [part for part in command if part != "--test"] + ["trainer.max_steps=2"]
            assert in_this_process(shorter, output) == 0
            # A checkpoint of step 2 of 4.
            file = next(output.parent.glob("*/*/ckpt/last.pth"))
            checkpoint.write_file(file, checkpoint.load(file) | {"fraction": 0.5})
            return 130
        return in_this_process(command, output)

    first = Instant(act)
    assert sweep_with(first, path, outputs) == 1
    folder = outputs / "sweeps" / "two"
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [(row["run"], row["state"]) for row in rows] == [
        ("grid=0.01", "done"),
        ("grid=0.02", "interrupted"),
    ]

    second = Instant(in_this_process)
    assert sweep_with(second, path, outputs) == 0
    (command,) = second.commands
    assert command[command.index("--resume") + 1].endswith("/ckpt/last.pth")
    assert "resumed at step 2" in next(folder.glob("grid=0.02-*/*/*/log.txt")).read_text()
    assert len(list(folder.glob("*-*/tiny/run@*"))) == 2

    third = Instant(in_this_process)
    assert sweep_with(third, path, outputs) == 0
    assert third.commands == []
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [(row["state"], row["steps"]) for row in rows] == [("done", "4")] * 2
    for row in rows:
        metrics = json.loads(next(folder.glob(f"{row['run']}-*/*/*/save/metrics.json")).read_text())
        assert float(row["psnr"]) == metrics["mean"]["psnr"]
        assert float(row["chamfer"]) == metrics["geometry"]["chamfer"]
    page = (folder / "table.md").read_text()
    assert page.count("**") >= 4
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert sum(target.startswith("strips/") for target in targets) == 2
    assert all((folder / target).exists() for target in targets)
    assert len(list((outputs / "tf-logs" / "sweeps" / "two").iterdir())) == 2
    assert not list(outputs.rglob("*.partial"))


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    def act(command: list[str], output: Path) -> int:
        output.write_text("Traceback\nValueError: a | b\n")
        if "seed=2" in command:
            return 1
        pretend(output.parent, fraction=1.0)
        return 0

    path = written(tmp_path, "grid: {seed: [1, 2, 3]}", "metrics: [psnr, minutes]")
    launcher = Instant(act)
    assert sweep_with(launcher, path, tmp_path) == 1
    assert len(launcher.commands) == 3
    page = (tmp_path / "sweeps" / "two" / "table.md").read_text()
    assert "| seed=2 | 2 | failed |  |  |  |  | exit code 1: ValueError: a \\| b |" in page
    # Tried again, and the settings are made good.
    again = Instant(lambda command, output: int(pretend(output.parent, fraction=1.0) is None))
    assert sweep_with(again, path, tmp_path) == 0
    assert len(again.commands) == 1
    assert "failed" not in (tmp_path / "sweeps" / "two" / "table.md").read_text()


def test_nothing_starts_before_all_configs_are_valid(tmp_path: Path) -> None:
    launcher = Instant(lambda command, output: 0)
    with pytest.raises(ConfigError, match="run seed=-1"):
        sweep_with(launcher, written(tmp_path, "grid: {seed: [1, -1]}"), tmp_path / "outputs")
    config = ROOT / "confs" / "neus-dtu.yaml"
    path = tmp_path / "scan.yaml"
    path.write_text(f"config: {config}\nruns: [{{name: a, set: {{dataset.root_dir: /no/such}}}}]\n")
    with pytest.raises(UserError, match=r"which run a needs; check dataset\.root_dir"):
        sweep_with(launcher, path, tmp_path / "outputs")
    assert launcher.commands == []
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_is_conducted_once_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)

    def act(command: list[str], output: Path) -> int:
        with pytest.raises(UserError, match="another process is at this sweep"):
            sweep_with(launcher, path, tmp_path)
        return 130

    launcher = Instant(act)
    assert sweep_with(launcher, path, tmp_path) == 1
    assert len(launcher.commands) == 2


def test_interrupt_reaches_the_process_once_and_ends_the_sweep(tmp_path: Path) -> None:
    """A real process under the local launcher; the signal goes to the sweep as from a terminal."""
    program = (
        "import signal, sys, time\n"
        "def stop(*_):\n    print('stopped', flush=True)\n    time.sleep(0.3)\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )

    class StandIn(LocalLauncher):
        def start(self, command: Sequence[str], output: Path) -> Any:
            job = super().start([sys.executable, "-c", program], output)
            until = time.monotonic() + 20
            while "ready" not in output.read_text():
                assert time.monotonic() < until
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)
            return job

    handler = signal.getsignal(signal.SIGINT)
    path = written(tmp_path, TWO)
    assert sweep_with(StandIn(1), path, tmp_path) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    outputs = list((tmp_path / "sweeps" / "two").glob("*/output.txt"))
    assert [output.read_text() for output in outputs] == ["ready\nstopped\n"]
    assert "| new |" in (tmp_path / "sweeps" / "two" / "table.md").read_text()


def test_local_processes_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    program = (
        "import os, sys, time; e = os.environ; print(e['OMP_NUM_THREADS'], e['CUDA_VISIBLE_DEVICES']);"
        "print('error', file=sys.stderr); sys.stdout.flush(); time.sleep(0.5); sys.exit(3)"
    )
    launcher = LocalLauncher(3, threads=2, gpus=("0", "1"))
    files = [tmp_path / f"{k}.txt" for k in range(3)]
    jobs = [launcher.start([sys.executable, "-c", program], file) for file in files]
    until = time.monotonic() + 20
    while any(job.exit_code() is None for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert [job.exit_code() for job in jobs] == [3, 3, 3]
    assert [sorted(file.read_text().split("\n")) for file in files] == [
        ["", f"2 {gpu}", "error"] for gpu in (0, 1, 0)
    ]


def test_ray_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match="ray is not installed; pip install ray, or write launcher: local"):
        RayLauncher(2, {})


class FakeRay:
    """The few calls that are made of Ray; a task is done when it is waited for a second time."""

    def __init__(self) -> None:
        self.resources: dict[str, Any] = {}
        self.results: list[Any] = []
        self.waits: list[int] = []
        self.cancelled: list[int] = []

    def init(self, **_: object) -> None: ...

    def remote(self, **resources: Any) -> Callable[[Callable[..., Any]], Any]:
        self.resources = resources
        return lambda function: SimpleNamespace(remote=lambda *given: self._submit(function, given))

    def _submit(self, function: Callable[..., Any], given: tuple[Any, ...]) -> int:
        self.results.append(lambda: function(*given))
        self.waits.append(0)
        return len(self.results) - 1

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        (reference,) = references
        self.waits[reference] += 1
        return (references, []) if self.waits[reference] > 1 else ([], references)

    def get(self, reference: int) -> Any:
        if reference in self.cancelled:
            raise RuntimeError("cancelled")
        return self.results[reference]()

    def cancel(self, reference: int, force: bool) -> None:
        assert not force
        self.cancelled.append(reference)


def test_ray_runs_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    launcher = RayLauncher(4, {"num_gpus": 1})
    assert (launcher.slots, ray.resources) == (4, {"num_gpus": 1, "max_retries": 0})
    files = [tmp_path / f"{k}.txt" for k in range(3)]
    program = "import os; print(os.getcwd()); raise SystemExit(5)"
    first, second, third = (launcher.start([sys.executable, "-c", program], file) for file in files)
    assert first.exit_code() is None
    assert first.exit_code() == 5
    assert files[0].read_text() == f"{os.getcwd()}\n"
    second.interrupt()
    assert [second.exit_code(), second.exit_code()] == [None, 130]
    monkeypatch.setattr(ray, "get", lambda reference: 1 / 0)
    assert [third.exit_code(), third.exit_code()] == [None, 1]
    assert files[2].read_text() == "ray lost this run: division by zero\n"


# Tables


def standings_of(
    sweep: Sweep, folder: Path, values: Sequence[dict[str, float] | None]
) -> dict[str, Standing]:
    """Runs that are done with these values, and failed ones where there are none."""
    return {
        planned_run.digest: Standing("failed", None, "exit code 1: broken")
        if found is None
        else Standing("done", folder / f"{planned_run.name}-x" / "tiny" / "run@1", "", found)
        for planned_run, found in zip(sweep.runs, values, strict=True)
    }


def scores(psnr: float, chamfer: float) -> dict[str, float]:
    return {"mean.psnr": psnr, "geometry.chamfer": chamfer, "steps": 9, "minutes": 1.5}


def test_the_best_are_bold_on_each_scene(tmp_path: Path) -> None:
    sweep = planned(
        tmp_path,
        "grid: {dataset.image_size: [16, 32], seed: [1, 2]}",
        "metrics: [psnr, geometry.chamfer, mesh.faces]",
    )
    values = [scores(20, 0.2), scores(21, 0.3), scores(35, 0.1), None]
    standings = standings_of(sweep, tmp_path, values)
    table = runs_table(sweep, standings, tmp_path)
    assert table.header == (
        *("run", "dataset.image_size", "seed", "state", "psnr", "geometry.chamfer", "mesh.faces"),
        *("steps", "minutes", "folder", "message"),
    )
    assert [[cell.value for cell in row[1:6]] for row in table.rows] == [
        *([16, 1, "done", 20, 0.2], [16, 2, "done", 21, 0.3], [32, 1, "done", 35, 0.1]),
        [32, 2, "failed", None, None],
    ]
    # The third is the only one on its scene, whatever its numbers are.
    assert [(row[4].is_bold, row[5].is_bold) for row in table.rows] == [
        *((False, True), (True, False), (False, False), (False, False))
    ]
    assert table.rows[0][9].link == "image_size=16,seed=1-x/tiny/run@1/"
    assert table.rows[3][10].value == "exit code 1: broken"


def test_means_over_scenes_and_seeds(tmp_path: Path) -> None:
    sweep = planned(
        tmp_path, "grid: {seed: [1, 2], system.loss.mask: [0, 0.1, 0.2]}", "metrics: [psnr, chamfer, steps]"
    )
    values = [scores(20, 0.2), scores(30, 0.4), scores(99, 0.01), scores(23, 0.3), scores(31, 0.1), None]
    table = means_table(sweep, standings_of(sweep, tmp_path, values))
    assert table is not None
    assert table.header == ("system.loss.mask", "runs", "psnr", "chamfer")
    assert [[cell.value for cell in row] for row in table.rows] == [
        [0, "2 of 2", 21.5, 0.25],
        [0.1, "2 of 2", 30.5, 0.25],
        [0.2, "1 of 2", 99, 0.01],
    ]
    # A mean that lacks a run is not compared.
    assert [[cell.is_bold for cell in row[2:]] for row in table.rows] == [
        [False, True],
        [True, True],
        [False] * 2,
    ]
    assert means_table(planned(tmp_path, TWO), {}) is None


def test_all_three_files_say_the_same(tmp_path: Path) -> None:
    sweep = planned(tmp_path, "grid: {seed: [1, 2]}", "metrics: [psnr]")
    standings = standings_of(sweep, tmp_path, [scores(20.123456789, 0.2), None])
    picture = tmp_path / "strips" / "a b.png"
    page = write_tables(sweep, standings, tmp_path, [picture]).read_text()
    assert "| seed=1 | 1 | done | 20.12 | 9 | 1.5 | [run@1](seed=1-x/tiny/run@1/) |  |" in page
    assert "![a b](strips/a%20b.png)" in page
    assert "| 1 of 2 | 20.12 |" in page
    rows = list(csv.reader((tmp_path / "table.csv").open(newline="")))
    assert rows[1] == ["seed=1", "1", "done", "20.123456789", "9", "1.5", "run@1", ""]
    cells, links = sheet_of(tmp_path / "table.xlsx", 1)
    assert cells["A1"] == "run"
    assert (cells["B2"], cells["D2"], cells["C3"]) == (1.0, 20.123456789, "failed")
    assert links == {"G2": "seed=1-x/tiny/run@1/"}
    assert sheet_of(tmp_path / "table.xlsx", 2)[0]["B2"] == 20.123456789


# Spreadsheets


MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def sheet_of(path: Path, number: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and links of a sheet by the cells' names, read as another program would."""
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        parts = {name: ElementTree.fromstring(file.read(name)) for name in file.namelist()}
    types = {override.get("PartName") for override in parts["[Content_Types].xml"]}
    assert {f"/{name}" for name in parts if name.startswith("xl/") and "_rels" not in name} <= types
    sheet = parts[f"xl/worksheets/sheet{number}.xml"]
    cells: dict[str, Any] = {}
    for cell in sheet.iter(f"{MAIN}c"):
        text, value = cell.find(f"{MAIN}is/{MAIN}t"), cell.find(f"{MAIN}v")
        if text is not None:
            cells[str(cell.get("r"))] = text.text
        elif value is not None:
            cells[str(cell.get("r"))] = float(str(value.text))
    relations = parts.get(f"xl/worksheets/_rels/sheet{number}.xml.rels", ())
    targets = {entry.get("Id"): str(entry.get("Target")) for entry in relations}
    links = {str(link.get("ref")): targets[link.get(RELATION)] for link in sheet.iter(f"{MAIN}hyperlink")}
    return cells, links


def test_a_spreadsheet_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    many = [Cell(k) for k in range(30)]
    rows = [
        [
            Cell("a < b & 'c'", is_bold=True),
            Cell("bell\x07 \x1b[1mbold"),
            Cell(True),
            Cell(None),
            Cell(-1e-9),
        ],
        [Cell(float("nan")), Cell(float("-inf")), Cell("x" * 40000), Cell("to", link="a b?&c/"), Cell("  ")],
        many,
    ]
    write_xlsx(path, {"one": rows, "two & three": [[Cell("d")]]})
    cells, links = sheet_of(path, 1)
    assert [cells.get(f"{letter}1") for letter in "ABCDE"] == [
        "a < b & 'c'",
        "bell [1mbold",
        1.0,
        None,
        -1e-9,
    ]
    assert [cells[f"{letter}2"] for letter in "ABDE"] == ["nan", "-inf", "to", "  "]
    assert len(cells["C2"]) == 32767
    assert (cells["Z3"], cells["AA3"], cells["AD3"]) == (25.0, 26.0, 29.0)
    assert links == {"D2": "a b?&c/"}
    assert sheet_of(path, 2) == ({"A1": "d"}, {})
    content = path.read_bytes()
    write_xlsx(path, {"one": rows, "two & three": [[Cell("d")]]})
    assert path.read_bytes() == content


@pytest.mark.parametrize("sheets", [{}, {"a/b": []}, {"x" * 32: []}, {"": []}])
def test_sheets_need_names(tmp_path: Path, sheets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names of 1 to 31 characters"):
        write_xlsx(tmp_path / "a.xlsx", sheets)


# Pictures


def save_view(path: Path, rgb: float, photograph: float, size: tuple[int, int] = (20, 30)) -> None:
    """A picture as ``--test`` writes it."""
    height, width = size
    view = ViewRender(
        torch.full((height, width, 3), rgb),
        torch.ones(height, width),
        torch.ones(height, width),
        torch.tensor([0.0, 0.0, -1.0]).expand(height, width, 3).contiguous(),
    )
    write_png(path, view_panel(view, torch.full((height, width, 3), photograph), torch.eye(4)[:3]))


def test_the_parts_of_a_test_picture(tmp_path: Path) -> None:
    save_view(tmp_path / "a.png", rgb=0.2, photograph=0.6)
    rgb, photograph, normal = split_panel(tmp_path / "a.png")
    assert rgb.shape == photograph.shape == normal.shape == (20, 30, 3)
    assert (rgb == 51).all()
    assert (photograph == 153).all()
    assert (normal == (128, 128, 255)).all()
    write_png(tmp_path / "b.png", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UserError, match="is no picture that --test writes; test that run again"):
        split_panel(tmp_path / "b.png")


def test_strips_of_each_scene(tmp_path: Path) -> None:
    sweep = planned(tmp_path, "grid: {dataset.scene: [sphere, figurine], seed: [1, 2]}")
    standings = standings_of(sweep, tmp_path, [scores(1, 1), scores(1, 1), scores(1, 1), None])
    for k, planned_run in enumerate(sweep.runs[:3]):
        trial = standings[planned_run.digest].trial
        assert trial is not None
        for view in range(9):
            save_view(trial / "save" / "test" / f"{view:03d}.png", rgb=0.2 * (k + 1), photograph=1.0)
        write_png(trial / "save" / "mesh.png", np.full((10, 2000, 3), 50 * k, np.uint8))
    paths = write_strips(sweep, standings, tmp_path)
    views = ("000", "002", "004", "006", "008", "meshes")
    assert [path.name for path in paths] == [
        f"{s}-{view}.png" for s in ("sphere", "figurine") for view in views
    ]
    strip = cv2.imread(str(paths[0]))
    assert strip is not None
    # A label of 24 lines, then pictures of 200 pixels (30 widened to 200), their normals below.
    assert strip.shape == (24 + 2 * 133, 3 * 200 + 2 * 4, 3)
    assert [int(strip[24 + 60, x, 0]) for x in (100, 304, 508)] == [255, 51, 102]
    assert (strip[24 + 133 + 60, 304] == (255, 128, 128)).all()
    meshes = cv2.imread(str(paths[5]))
    assert meshes is not None
    assert meshes.shape == (2 * (24 + 8), 1536, 3)
    assert (meshes[28, 700] == 0).all()
    assert (meshes[28 + 32, 700] == 50).all()


def test_labels_fit() -> None:
    picture = np.zeros((5, 200, 3), np.uint8)
    for text in ("short", "a label that is somewhat longer", "x" * 200):
        band = labelled(text, picture)[:24]
        assert band.min() < 100
        # The right border stays white: nothing is cut off in the middle of a letter.
        assert band[:, -3:].min() == 255


def test_without_results_there_are_no_pictures(tmp_path: Path) -> None:
    sweep = planned(tmp_path, TWO)
    assert write_strips(sweep, standings_of(sweep, tmp_path, [None, None]), tmp_path) == []
