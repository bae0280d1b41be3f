"""benchmarks/engine.py in small: every command runs on a CPU, and ``check`` fails when a kernel is wrong."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_triton import needs_triton
from torch import Tensor

from systems import record

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    """The script, imported; it finds the project by itself."""
    path, environment = list(sys.path), dict(os.environ)
    sys.path.insert(0, str(ROOT))
    engine = importlib.import_module("benchmarks.engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "set_cpu_threads", lambda: 1)  # the suite's is one
        yield engine
    record.release_log()
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)


def tables_of(out: Path, command: str) -> dict[str, list[dict[str, Any]]]:
    assert (out / f"engine-{command}.md").read_text().startswith(f"## engine.py {command}")
    return json.loads((out / f"engine-{command}.json").read_text())["tables"]


def run(engine: ModuleType, out: Path, *arguments: str) -> int:
    return engine.main([*arguments, "--tiny", "--device", "cpu", "--out", str(out)])


@pytest.mark.parametrize(
    ("operation", "backend"),
    [
        *(("hash grid", "cpu"), ("sdf network", "cpu"), ("relu network", "cpu"), ("march", "cpu")),
        *(("drop hidden", "cpu"), ("compositing", "cpu"), ("adam", "cpu")),
        pytest.param("compositing", "cuda", marks=needs_triton),
        pytest.param("adam", "cuda", marks=needs_triton),
    ],
)
def test_check_passes(engine: ModuleType, tmp_path: Path, operation: str, backend: str) -> None:
    assert run(engine, tmp_path, "check", "--only", operation, "--backend", backend) == 0
    (rows,) = tables_of(tmp_path, "check").values()
    assert len(rows) >= 6
    assert {row["verdict"] for row in rows} == {"PASS"}
    assert all(row["operation"].endswith(f" {backend}") for row in rows)


def test_check_trains(engine: ModuleType, tmp_path: Path) -> None:
    assert run(engine, tmp_path, "check", "--only", "training") == 0
    (rows,) = tables_of(tmp_path, "check").values()
    assert [row["verdict"] for row in rows].count("SKIP") == 1  # a CPU has nothing to wait for


def test_check_fails_on_a_wrong_gradient(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.compositing import cpu

    right = cpu.accumulate

    def wrong(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        # The values are right, and so is the gradient of all weights but the first.
        scale = torch.ones_like(weights)
        scale[:1] = 1.01
        leaned = weights * scale + (weights * (1 - scale)).detach()
        return right(leaned, values, offsets)

    monkeypatch.setattr(cpu, "accumulate", wrong)
    assert run(engine, tmp_path, "check", "--only", "compositing", "--backend", "cpu") == 1
    (rows,) = tables_of(tmp_path, "check").values()
    failed = {(row["operation"], row["quantity"]) for row in rows if row["verdict"] == "FAIL"}
    assert failed == {("compositing cpu", "d sums/dweights")}


def test_check_fails_on_an_exception(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.compositing import cpu

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(cpu, "render_weights", broken)
    assert run(engine, tmp_path, "check", "--only", "compositing", "--backend", "cpu") == 1
    (rows,) = tables_of(tmp_path, "check").values()
    assert any(row["quantity"] == "RuntimeError: out of registers" for row in rows)


@pytest.mark.parametrize(("found", "expected", "error"), [((1.0, 2.0), (1.0, 1.0), 0.5**0.5), ((), (), 0.0)])
def test_relative_error(
    engine: ModuleType, found: tuple[float, ...], expected: tuple[float, ...], error: float
) -> None:
    from benchmarks.engine_checks import relative_error

    assert relative_error(torch.tensor(found), torch.tensor(expected)) == pytest.approx(error)
    assert relative_error(torch.tensor([*found, 0.0]), torch.tensor(expected)) == float("inf")
    assert not relative_error(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1e9


def test_phases(engine: ModuleType, tmp_path: Path) -> None:
    assert run(engine, tmp_path, "phases") == 0
    tables = tables_of(tmp_path, "phases")
    phases = {row["phase"]: row for row in tables["Phases"]}
    assert len(phases) == 15
    assert all(row["ms"] > 0 for row in phases.values())
    assert phases["colour network: forward"]["GFLOP"] > 0
    assert all(row["rate"] > 0 for row in tables["Ceilings, as measured"])
    assert all(row["samples/s"] > 0 for row in tables["Whole steps"])


def test_backends(engine: ModuleType, tmp_path: Path) -> None:
    assert run(engine, tmp_path, "backends") == 0
    (rows,) = tables_of(tmp_path, "backends").values()
    timed = {(row["operation"].split(",")[0], row["implementation"]) for row in rows if row["median ms"]}
    for operation in ("hash grid", "SDF network", "march", "drop hidden", "compositing", "Adam"):
        assert {(operation, "cpu"), (operation, "reference")} <= timed


def test_time_to_psnr(engine: ModuleType, tmp_path: Path) -> None:
    assert run(engine, tmp_path, "time-to-psnr", "--steps", "20", "--views", "1") == 0
    over_time, result = tables_of(tmp_path, "time-to-psnr").values()
    assert [row["step"] for row in over_time] == [1, 2, 4, 7, 10, 15, 20]
    assert all(row["PSNR"] > 5 for row in over_time)
    values = {row["what"]: row["value"] for row in result}
    assert values["held-out views"] == 2
    assert (Path(values["folder"]) / "save" / "mesh.ply").is_file()


def test_profile(engine: ModuleType, tmp_path: Path) -> None:
    assert run(engine, tmp_path, "profile") == 0
    (rows,) = tables_of(tmp_path, "profile").values()
    assert len(rows) == 40
    assert (tmp_path / "trace.json").is_file()


def test_bad_input_is_one_line(
    engine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(engine, tmp_path, "time-to-psnr", "dataset.holdout=0") == 2
    assert "no held-out views; add dataset.holdout=8" in capsys.readouterr().err


def test_caps_on_memory_report_what_run_py_says(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def finish(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if "trainer.max_steps=7" in command else 0)

    monkeypatch.setattr(engine.subprocess, "run", finish)
    assert run(engine, tmp_path, "vram") == 0
    assert run(engine, tmp_path, "vram", "trainer.max_steps=7") == 1
    assert "--vram" not in commands[0]
    (rows,) = tables_of(tmp_path, "vram").values()
    assert [(row["cap, GiB"], row["exit code"]) for row in rows] == [("none", 3)]
    report = engine.Report("vram", torch.device("cpu"), tmp_path)
    assert engine.run_under_caps(report, torch.device("cuda"), tmp_path)
    caps = [command[command.index("--vram") + 1] for command in commands[2:]]
    assert caps == ["4", "8", "12", "24"]
