"""The command line from photographs to files, in miniature: what a user types, and what lies there then."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import run
from process_data.synthetic import synthetic_world_from_scene
from utils.mesh import read_mesh

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "confs" / "neus-synthetic.yaml")
MINIATURE = [
    *("name=mini", "dataset.scene=sphere", "dataset.num_images=10", "dataset.image_size=32"),
    *("dataset.holdout=5", "dataset.test_steps=4", "model.sdf.initial_radius=0.4"),
    *("model.sdf.hash_grid.num_levels=4", "model.sdf.hash_grid.base_resolution=4"),
    *("model.sdf.hash_grid.max_resolution=32", "model.sdf.hash_grid.log2_table_size=10"),
    *("model.sdf.hidden_width=16", "model.radiance.hidden_width=16", "model.occupancy.resolution=32"),
    *("model.min_step=0.02", "model.max_step=0.04", "export.resolution=64", "trainer.max_minutes=null"),
    *("trainer.samples_per_step=1024", "trainer.initial_rays=100", "trainer.max_rays=400"),
    *("trainer.log_every=10", "trainer.checkpoint_every=100", "trainer.val_every=100"),
    *("trainer.learning_step=100", "trainer.health_step=100", "trainer.optimizer.warmup_steps=20"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CENTRE = synthetic_world_from_scene()[:3, 3].numpy()
RADIUS = 2.5 * 0.5
"""Of the sphere in world units; in the frame of training it is 0.5."""
NEAR = 0.08 * RADIUS
"""Mean distance from the truth after 150 steps; untrained it is 0.2, in the wrong frame 0.6 * RADIUS."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *(str(argument) for argument in arguments)]


def execute(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )


def succeed(*arguments: object) -> str:
    """Run to a good end; everything printed."""
    done = execute(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder after ``--train --test``; later tests go on from there."""
    folder = tmp_path_factory.mktemp("outputs")
    printed = succeed(
        *("--config", CONFIG, "--train", "--test", "--outputs_dir", folder, "--device", "cpu"),
        *(*MINIATURE, "trainer.max_steps=150"),
    )
    trial = trial_of(folder)
    assert str(trial / "log.txt") in printed
    assert f"tensorboard --logdir {folder / 'tf-logs' / 'mini' / trial.name}" in printed
    return folder


def trial_of(outputs: Path) -> Path:
    """The only run there is."""
    (trial,) = (outputs / "mini").iterdir()
    return trial


def test_files_of_a_run(outputs: Path) -> None:
    trial = trial_of(outputs)
    assert sorted(path.name for path in outputs.iterdir()) == ["mini", "runs.csv", "tf-logs"]
    for name in (
        *("config/parsed.yaml", "command.txt", "code/run.py", "code/systems/trainer.py"),
        *("ckpt/ckpt_000100.pth", "ckpt/ckpt_000150.pth", "ckpt/last.pth", "history.csv", "log.txt"),
        *("save/metrics.json", "save/mini.mp4", "save/mesh.ply", "save/preview.ply"),
        *("save/test/000000.png", "save/test/000005.png"),
    ):
        assert (trial / name).is_file(), name
        assert (trial / name).stat().st_size > 0, name
    assert len(list((trial / "save" / "val").glob("000100_*.png"))) == 1
    assert list((outputs / "tf-logs" / "mini" / trial.name).glob("events.out.tfevents*"))
    assert not list(outputs.rglob("*.partial"))
    assert "--train --test" in (trial / "command.txt").read_text()
    history = rows_of(trial / "history.csv")
    assert [int(row["step"]) for row in history] == list(range(10, 151, 10))
    assert float(history[-1]["loss"]) < float(history[0]["loss"])
    log = (trial / "log.txt").read_text()
    assert "CHECK" not in log
    assert log.count("run folder") == 1


def test_the_mesh_is_the_sphere_in_world_coordinates(outputs: Path) -> None:
    mesh = read_mesh(trial_of(outputs) / "save" / "mesh.ply")
    radii = np.linalg.norm(mesh.vertices - CENTRE, axis=1)
    assert abs(radii - RADIUS).mean() < NEAR
    assert radii.max() < 1.2 * RADIUS
    directions = (mesh.vertices - CENTRE) / radii[:, None]
    assert np.abs(directions.mean(axis=0)).max() < 0.1


def test_metrics_and_the_table(outputs: Path) -> None:
    trial = trial_of(outputs)
    metrics = json.loads((trial / "save" / "metrics.json").read_text())
    assert (metrics["step"], metrics["split"]) == (150, "held-out")
    assert [view["view"] for view in metrics["views"]] == ["000000.png", "000005.png"]
    assert metrics["mean"]["psnr"] > 20
    assert {"psnr", "psnr_masked", "ssim", "lpips"} <= set(metrics["mean"])
    assert metrics["geometry"]["chamfer"] < NEAR
    (row,) = rows_of(outputs / "runs.csv")
    assert (row["name"], row["trial"], row["steps"], row["frames"]) == ("mini", trial.name, "150", "8")
    assert float(row["psnr"]) == metrics["mean"]["psnr"]
    assert row["folder"] == str(trial)
    assert iio.imread(trial / "save" / "mini.mp4").shape[0] == 4


def test_eval_agrees_with_the_metrics(outputs: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.ply"
    points = torch.nn.functional.normalize(torch.randn(20000, 3), dim=1).numpy() * RADIUS + CENTRE
    header = "ply\nformat ascii 1.0\nelement vertex 20000\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    truth.write_text(header + "\n".join(" ".join(f"{value:.6f}" for value in point) for point in points))
    done = execute("--eval", trial_of(outputs) / "save" / "mesh.ply", "--gt", truth)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["gt_radius"] == pytest.approx(RADIUS, rel=0.01)
    assert report["completeness"] < NEAR


def test_going_on_and_exporting_again(outputs: Path) -> None:
    trial = trial_of(outputs)
    first = rows_of(trial / "history.csv")
    latest = (
        "--config",
        CONFIG,
        "--train",
        "--resume",
        "latest",
        "--outputs_dir",
        outputs,
        "--device",
        "cpu",
    )
    printed = succeed(*latest, *MINIATURE, "trainer.max_steps=180")
    assert "resumed at step 150" in printed
    assert trial_of(outputs) == trial
    history = rows_of(trial / "history.csv")
    assert [int(row["step"]) for row in history] == list(range(10, 181, 10))
    assert history[: len(first)] == first
    assert (trial / "ckpt" / "ckpt_000180.pth").is_file()
    (row,) = rows_of(outputs / "runs.csv")
    assert row["steps"] == "180"

    # The mesh alone, with nothing but the checkpoint: the config is found beside it.
    (trial / "save" / "mesh.ply").unlink()
    mp4 = (trial / "save" / "mini.mp4").stat().st_mtime_ns
    succeed("--mesh", "--resume", trial / "ckpt" / "last.pth", "--outputs_dir", outputs, "--device", "cpu")
    mesh = read_mesh(trial / "save" / "mesh.ply")
    radii = np.linalg.norm(mesh.vertices - CENTRE, axis=1)
    assert abs(radii - RADIUS).mean() < NEAR
    assert (trial / "save" / "mini.mp4").stat().st_mtime_ns == mp4
    assert trial_of(outputs) == trial
    assert len(list((outputs / "tf-logs" / "mini").iterdir())) == 1


def test_a_terminated_run_leaves_a_checkpoint_and_code_130(tmp_path: Path) -> None:
    arguments = ("--config", CONFIG, "--train", "--outputs_dir", tmp_path, "--device", "cpu", *MINIATURE)
    process = subprocess.Popen(
        command(*arguments, "trainer.max_steps=1000000", "trainer.health_step=0"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        waited_until = time.monotonic() + 120
        while not list(tmp_path.glob("mini/*/history.csv")):
            assert time.monotonic() < waited_until
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("run.py: interrupted; ")
    state = torch.load(trial_of(tmp_path) / "ckpt" / "last.pth", weights_only=True)
    assert state["step"] >= 10


# Bad input: exit code 2, and one line on stderr that names what is wrong. The first in a process of its own.


def one_line(code: int, output: str) -> str:
    assert code == 2, output
    assert output.count("\n") == 1, output
    assert output.startswith("run.py: ")
    return output


def refusal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The line with which a command of this process is refused."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = run.main([str(argument) for argument in (*arguments, "--device", "cpu")])
    return one_line(code, capfd.readouterr().err)


def test_a_truncated_checkpoint_is_one_line(outputs: Path, tmp_path: Path) -> None:
    trial = shutil.copytree(trial_of(outputs), tmp_path / "mini" / "copied")
    broken = trial / "ckpt" / "last.pth"
    broken.write_bytes(broken.read_bytes()[:5000])
    done = execute("--mesh", "--resume", broken, "--outputs_dir", tmp_path, "--device", "cpu")
    line = one_line(done.returncode, done.stderr)
    assert "last.pth: is truncated or not a checkpoint; resume from an older" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "--config", ROOT / "confs/neus-dtu.yaml"), "dataset.root_dir: "),
        (
            ("--train", "--config", ROOT / "confs/neus-dtu.yaml", "dataset.root_dir=/no/such/folder"),
            "/no/such/folder: ",
        ),
        (
            ("--train", "--config", CONFIG, "trainer.max_step=3"),
            "trainer.max_step: unknown key; did you mean",
        ),
        (("--train", "--config", CONFIG, "trainer.max_steps=many"), "trainer.max_steps: "),
        (("--train", "--config", CONFIG, "model.name=neos"), "model.name: "),
        (("--train", "--config", CONFIG, *MINIATURE, "model.backend=gpu"), "gpu"),
        (("--train", "--config", CONFIG, "dataset.image_size=3"), "dataset.image_size: "),
        (("--train", "--config", CONFIG, "system.loss.eikonal=[1]"), "system.loss.eikonal: "),
        (
            ("--train", "--config", CONFIG, *MINIATURE, "dataset.apply_mask=false"),
            "system.loss.mask: needs masks",
        ),
        (("--train", "--config", "confs/no-such.yaml"), "confs/no-such.yaml: no such file"),
        (("--train", "--config", CONFIG, "--resume", "latest"), "nothing to resume"),
        (("--mesh", "--resume", "no/such/last.pth"), "no/such/last.pth: no such checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    line = refusal(capfd, monkeypatch, *arguments, "--outputs_dir", tmp_path / "outputs")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_one_line(
    outputs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(outputs)
    before = (trial / "history.csv").read_text()
    line = refusal(
        *(capfd, monkeypatch, "--train", "--resume", trial / "ckpt" / "last.pth"),
        *("model.radiance.hidden_width=8", "--outputs_dir", outputs),
    )
    assert "last.pth: belongs to another model (radiance.network.0.bias: (16,) against (8,))" in line
    assert (trial / "history.csv").read_text() == before


def test_outputs_that_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    arguments = ("--train", "--config", CONFIG, *MINIATURE, "--outputs_dir", tmp_path / "file")
    line = refusal(capfd, monkeypatch, *arguments)
    assert "file: cannot be written" in line
