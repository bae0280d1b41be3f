"""Steps that are not finite are skipped, named and rolled back; steps that meet nothing are no such steps."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    WITHOUT_MASKS,
    before_step,
    history,
    new_trainer,
    parameters_of,
    same_tensors,
    tiny_scene,
)
from torch import Tensor

from systems import checkpoint
from systems.trainer import Trainer
from utils.errors import TrainingError
from utils.types import Scene

GRADIENT_NAN, LOSS_INFINITE = "gradient", "loss"


def moments_of(training: Trainer) -> dict[str, Tensor]:
    """Copies of Adam's running means and step counts."""
    state = training.optimizer.state_dict()["state"]
    return {f"{key} {name}": value.clone() for key, entry in state.items() for name, value in entry.items()}


def poison(training: Trainer, is_bad: Callable[[int], bool], kind: str = "eikonal") -> None:
    """Make a loss term, its value or its gradient alone, not finite at the calls for which ``is_bad``."""
    compute, calls = training.system.loss_terms, iter(range(10**9))

    def loss_terms(*arguments: Any) -> dict[str, Tensor]:
        terms = compute(*arguments)
        if not is_bad(next(calls)):
            return terms
        if kind == GRADIENT_NAN:
            # The square root's value at zero is fine, its slope is not.
            zero = 0.0 * next(training.model.parameters()).sum()
            return {**terms, "rgb_l1": terms["rgb_l1"] + zero.sqrt()}
        if kind == LOSS_INFINITE:
            return {**terms, "rgb_l1": terms["rgb_l1"] + torch.inf}
        return {**terms, kind: terms[kind] * torch.nan}

    vars(training.system)["loss_terms"] = loss_terms


@pytest.mark.parametrize("kind", ["eikonal", "rgb_l1", "mask", GRADIENT_NAN, LOSS_INFINITE])
def test_a_bad_step_changes_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    training = new_trainer(tmp_path)
    poison(training, lambda call: call == 3, kind)
    for _ in range(3):
        assert training.train_step().finite
        training.step += 1
    parameters = parameters_of(training)
    moments = moments_of(training)
    with caplog.at_level(logging.WARNING):
        record = training.train_step()
    assert not record.finite
    assert training.bad_steps.in_a_row == 1
    assert same_tensors(parameters, parameters_of(training))
    assert same_tensors(moments, moments_of(training))
    (line,) = (entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING)
    assert line.startswith("step 3 skipped: ")
    culprit = {GRADIENT_NAN: "a gradient", LOSS_INFINITE: "rgb_l1"}.get(kind, kind)
    assert f"{culprit} is not finite (1 in a row; rays from views" in line
    views = {int(view) for view in line.partition("views [")[2].partition("]")[0].split(", ")}
    assert views <= set(training.scene.train_indices)
    training.step += 1
    assert training.train_step().finite
    assert training.bad_steps.in_a_row == 0
    assert not same_tensors(parameters, parameters_of(training))


def test_bad_steps_are_counted_in_the_history(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=8", "trainer.log_every=4")
    poison(training, lambda call: call in (1, 2, 6))
    training.train()
    assert history(training.run)["skipped"] == ["2", "1"]
    assert all(torch.isfinite(value).all() for value in parameters_of(training).values())


def test_many_bad_steps_roll_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("trainer.max_steps=20", "trainer.checkpoint_every=10", "trainer.max_bad_steps=3")
    training = new_trainer(tmp_path, *options)
    poison(training, lambda call: call in (14, 15, 16))
    drawn: list[Tensor] = []
    draw = training.batches.draw

    def remember(num_rays: int) -> Any:
        batch = draw(num_rays)
        drawn.append(batch.rays.directions)
        return batch

    vars(training.batches)["draw"] = remember
    seen: list[bool] = []
    load = training._load

    def compare(*arguments: Any, **options: Any) -> None:
        load(*arguments, **options)
        stored = checkpoint.load(training.run.checkpoints / "ckpt_000010.pth")["model"]
        seen.append(same_tensors(stored, training.model.state_dict()))
        seen.append(training.step == 10)

    vars(training)["_load"] = compare
    with caplog.at_level(logging.WARNING):
        training.train()
    assert seen == [True, True]
    assert (training.step, training.bad_steps.rollbacks, training.bad_steps.in_a_row) == (20, 1, 0)
    assert "rolling back to" in caplog.text
    assert "ckpt_000010.pth (1 of 3)" in caplog.text
    # Other rays than those that led astray: the generators are not turned back.
    assert all(not torch.equal(rays[:5], drawn[10][:5]) for rays in drawn[11:])
    steps = [int(step) for step in history(training.run)["step"]]
    assert steps == sorted(set(steps)), "a rolled-back run writes each step once"


def test_roll_backs_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    options = ("trainer.max_steps=50", "trainer.checkpoint_every=5", "trainer.max_bad_steps=2")
    training = new_trainer(tmp_path, *options)
    poison(training, lambda call: call >= 7)
    with pytest.raises(TrainingError) as caught:
        training.train()
    assert "eikonal is not finite in 2 steps in a row; resume from" in str(caught.value)
    assert training.bad_steps.rollbacks == 3
    last = checkpoint.load(training.run.checkpoints / "last.pth")
    assert all(torch.isfinite(value).all() for value in last["model"].values() if value.is_floating_point())


@pytest.mark.parametrize(
    "name", ["sdf_field.weights.0", "radiance.network.0.weight", "sdf_field.grid.table", "variance"]
)
def test_a_poisoned_parameter_is_healed_by_the_roll_back(tmp_path: Path, name: str) -> None:
    options = ("trainer.max_steps=30", "trainer.checkpoint_every=10", "trainer.max_bad_steps=4")
    training = new_trainer(tmp_path, *options)

    def spoil() -> None:
        if training.bad_steps.rollbacks == 0:
            with torch.no_grad():
                dict(training.model.named_parameters())[name].fill_(float("nan"))

    before_step(training, 18, spoil)
    training.train()
    assert (training.step, training.bad_steps.rollbacks) == (30, 1)
    assert all(torch.isfinite(value).all() for value in parameters_of(training).values())


# Batches without anything in them


def looking_away(scene: Scene) -> Scene:
    """The same scene with every camera turned by half a turn: no ray meets the unit sphere."""
    c2w = scene.cameras.c2w.clone()
    c2w[:, :, 0] *= -1
    c2w[:, :, 2] *= -1
    return replace(scene, cameras=replace(scene.cameras, c2w=c2w))


@pytest.mark.parametrize("overrides", [(), WITHOUT_MASKS], ids=["masks", "background"])
@pytest.mark.parametrize("case", ["missing rays", "empty grid"])
def test_steps_without_samples(tmp_path: Path, overrides: tuple[str, ...], case: str) -> None:
    scene = tiny_scene(*overrides)
    training = new_trainer(
        tmp_path, *overrides, scene=looking_away(scene) if case == "missing rays" else scene
    )
    if case == "empty grid":
        training.model.occupancy.observable.zero_()  # type: ignore[union-attr,operator]
        training.model.occupancy.occupied.zero_()  # type: ignore[union-attr,operator]
    parameters = parameters_of(training)
    for _ in range(10):
        record = training.train_step()
        training.step += 1
        assert record.num_samples == 0
        assert torch.isfinite(record.loss)
        assert record.finite
    assert training.bad_steps.in_a_row == 0
    assert training.num_rays == training.config.max_rays or training.num_rays > 48
    learned = parameters_of(training)
    assert all(torch.isfinite(value).all() for value in learned.values())
    assert all(
        torch.equal(value, parameters[name]) == (not name.startswith("background"))
        for name, value in learned.items()
        if not name.endswith("bias")
    )
