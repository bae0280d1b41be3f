"""The training loop: interruptions, budgets in steps and minutes, and what it writes along the way."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    before_step,
    history,
    new_trainer,
    raiser,
    resumed_trainer,
    tiny_scene,
)

from models.opacity import DENSITIES
from process_data.batches import RayBatches
from systems import checkpoint, trainer
from systems.step import composite_masked

# Interruptions


@pytest.mark.parametrize(
    ("numbers", "saved"),
    [([signal.SIGINT], 8), ([signal.SIGTERM], 8), ([signal.SIGTERM, signal.SIGINT], 7)],
    ids=["Ctrl-C", "SIGTERM", "both"],
)
def test_an_interrupted_run_saves_and_can_go_on(tmp_path: Path, numbers: list[int], saved: int) -> None:
    """A first signal during step 7 lets it finish, so that 8 are done; a second one does not."""
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    training = new_trainer(tmp_path, "trainer.max_steps=12")
    before_step(training, 7, lambda: [os.kill(os.getpid(), number) for number in numbers])
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.load(training.run.checkpoints / "last.pth")["step"] == training.step == saved
    assert f"interrupted at step {saved}" in (training.run.folder / "log.txt").read_text()
    resumed = resumed_trainer(training, "trainer.max_steps=12")
    resumed.train()
    assert history(resumed.run)["step"] == [str(step) for step in range(1, 13)]


def test_every_run_has_a_checkpoint_from_the_start(tmp_path: Path) -> None:
    training = new_trainer(tmp_path)
    before_step(training, 0, raiser(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        training.train()
    assert checkpoint.load(training.run.checkpoints / "last.pth")["step"] == 0


# Budgets


def test_fraction_follows_whichever_bound_is_nearer(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=100", "trainer.max_minutes=2")
    for step, seconds, fraction in [
        (0, 0.0, 0.0),
        (50, 12.0, 0.5),
        (50, 90.0, 0.75),
        (100, 1.0, 1.0),
        (1, 500.0, 1.0),
        (300, 0.0, 1.0),
    ]:
        training.step, training.train_seconds = step, seconds
        assert training.fraction_done() == fraction


def test_minutes_end_a_run_with_its_schedules_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    # The clock is read before and after a step, so that each step takes one second.
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    training = new_trainer(tmp_path, "trainer.max_steps=10000", "trainer.max_minutes=0.25")
    training.train()
    assert (training.step, training.train_seconds, training.fraction_done()) == (15, 15.0, 1.0)
    assert history(training.run)["minutes"][-1] == repr(0.25)
    state = checkpoint.load(training.run.checkpoints / "last.pth")
    assert (state["fraction"], state["train_seconds"]) == (1.0, 15.0)
    longer = resumed_trainer(training, "trainer.max_steps=10000", "trainer.max_minutes=0.5")
    assert longer.fraction_done() == 0.5
    longer.train()
    assert longer.step == 30


def test_samples_settle_near_their_budget(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.samples_per_step=500", "trainer.max_rays=4000")
    counts = []
    for _ in range(60):
        counts.append(training.train_step().num_samples)
        training.step += 1
    assert 350 < sum(counts[30:]) / 30 < 650


# What is written along the way


def test_history_table_and_checkpoints_of_a_run(tmp_path: Path) -> None:
    options = ("trainer.max_steps=12", "trainer.checkpoint_every=4", "trainer.log_every=5")
    training = new_trainer(tmp_path, *options, "trainer.val_every=6", "trainer.health_step=6")
    training.train()
    columns = history(training.run)
    assert columns["step"] == ["5", "10"]
    assert set(training.system.terms) < set(columns)
    weighted = (1.0, "rgb_l1"), (0.1, "eikonal"), (0.1, "mask")
    for row in range(2):
        by_hand = sum(weight * float(columns[name][row]) for weight, name in weighted)
        assert float(columns["loss"][row]) == pytest.approx(by_hand, rel=1e-5)
    assert columns["rgb_l2"] == ["0.0", "0.0"]
    assert sorted(path.name for path in training.run.checkpoints.iterdir()) == [
        *("ckpt_000008.pth", "ckpt_000012.pth", "last.pth")
    ]
    assert len(list((training.run.save / "val").glob("000006_*.png"))) == 1
    assert len(list((training.run.save / "val").iterdir())) == 2
    assert (training.run.save / "preview.ply").is_file()
    head, line = (tmp_path / "runs.csv").read_text().splitlines()
    row_of = dict(zip(head.split(","), line.split(","), strict=True))
    assert (row_of["dataset"], row_of["frames"], row_of["steps"]) == ("synthetic", "8", "12")
    assert "rgb_l1:on" in row_of["losses"]
    assert "sparsity:off" in row_of["losses"]


@pytest.mark.parametrize("density", DENSITIES)
def test_training_learns(tmp_path: Path, density: str) -> None:
    """The sphere starts with radius 0.4 and is 0.5 in the photographs."""
    options = ("trainer.max_steps=150", "trainer.samples_per_step=1024", "trainer.optimizer.variance=0.02")
    training = new_trainer(tmp_path, *options, f"model.density={density}")
    directions = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    distance = []
    for _ in range(2):
        surface = training.model.frozen_at(training.system.progress_at(training.fraction_done()))  # type: ignore[operator]
        distance.append(float(surface.query_sdf(0.5 * directions).abs().mean()))
        if len(distance) == 1:
            training.train()
    assert distance[0] > 0.08
    assert distance[1] < 0.03
    if density == "volsdf":
        betas = [float(beta) for beta in history(training.run)["beta"]]
        assert betas[-1] < 0.95 * betas[0] < 0.0105


def test_losses_in_one_line(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "system.loss.sparsity=[[0.5,0],[1,0.25]]")
    expected = "rgb_l1 1  eikonal 0.1  mask 0.1  sparsity [[0.5, 0], [1, 0.25]]"
    assert training.system.describe_losses() == expected


def test_masked_pixels_get_the_background() -> None:
    batch = RayBatches(tiny_scene(), seed=0).draw(64)
    assert batch.mask is not None
    pink = torch.tensor([1.0, 0.5, 0.5])
    composited = composite_masked(batch, pink)
    inside = batch.mask > 0.5
    assert 0 < int(inside.sum()) < 64
    assert torch.equal(composited.rgb[inside], batch.rgb[inside])
    assert torch.equal(composited.rgb[~inside], pink.expand(int((~inside).sum()), 3))
    without = replace(batch, mask=None)
    assert composite_masked(without, pink) is without
