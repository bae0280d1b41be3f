"""Resume is exact to the last bit, and the first steps of a run are the same wherever they are taken."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    WITHOUT_MASKS,
    before_step,
    history,
    new_trainer,
    raiser,
    resumed_trainer,
)
from torch import Tensor

from systems import checkpoint
from utils.errors import CheckpointError


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists by its path."""
    if not isinstance(state, (dict, list, tuple)):
        return {name: state}
    parts = state if isinstance(state, dict) else dict(enumerate(state))
    return {path: leaf for key, part in parts.items() for path, leaf in flat(part, f"{name}/{key}").items()}


def differences(first: Any, second: Any) -> list[str]:
    """Paths at which two nested states are not the same to the last bit."""
    one, two = flat(first), flat(second)
    assert one.keys() == two.keys()
    return [
        path
        for path, leaf in one.items()
        if not (torch.equal(leaf, two[path]) if isinstance(leaf, Tensor) else leaf == two[path])
    ]


def losses_of_steps(outputs: Path, steps: int) -> list[str]:
    training = new_trainer(outputs)
    losses = []
    for _ in range(steps):
        losses.append(float(training.train_step().loss).hex())
        training.step += 1
    training.run.close()
    return losses


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.foreground_share=0.5", "trainer.optimizer.decay=cosine", "trainer.optimizer.clip_norm=0.1"),
        WITHOUT_MASKS,
    ],
    ids=["masks", "foreground", "background"],
)
def test_resume_is_exact(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    straight = new_trainer(tmp_path / "straight", *overrides)
    straight.train()

    first = new_trainer(tmp_path / "broken", *overrides)
    before_step(first, 30, raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    # What happens to the global generators between the two must not matter.
    random.seed(99)
    torch.manual_seed(99)
    second = resumed_trainer(first, *overrides)
    assert second.step == 30
    assert second.model is not first.model
    second.train()

    one, two = (history(training.run) for training in (straight, second))
    assert one["step"] == two["step"] == [str(step) for step in range(1, 61)]
    unmeasured = {name for name in one if name not in ("minutes", "rays_per_second", "samples_per_second")}
    assert {"loss", "rgb_l1", "eikonal", "rays", "samples", "marched", "psnr"} <= unmeasured
    for name in sorted(unmeasured):
        assert one[name] == two[name], name
    ends = [checkpoint.load(training.run.checkpoints / "last.pth") for training in (straight, second)]
    for state in ends:
        # Tensorboard's files take their names from Python's generator, and a resumed run opens one more.
        del state["train_seconds"], state["random"]["python"]
    assert differences(*ends) == []
    assert ends[0]["step"] == 60


def test_the_comparison_sees_a_step_that_differs(tmp_path: Path) -> None:
    """The test above would be worth nothing if other seeds passed it, too."""
    states = []
    for seed in (7, 8):
        training = new_trainer(tmp_path / str(seed), f"seed={seed}", "trainer.max_steps=2")
        training.train()
        states.append(checkpoint.load(training.run.checkpoints / "last.pth"))
    different = differences(*states)
    assert "/batches/generator" in different
    assert "/generator" in different
    assert "/model/sdf_field.grid.table" in different


def test_global_generators_are_restored(tmp_path: Path) -> None:
    training = new_trainer(tmp_path)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    draw()
    training.save_checkpoint()
    expected = draw()
    draw()
    resumed_trainer(training)
    assert draw() == expected


def test_first_steps_repeat_within_and_across_processes(tmp_path: Path) -> None:
    first = losses_of_steps(tmp_path / "first", 20)
    assert len(set(first)) == 20
    assert losses_of_steps(tmp_path / "second", 20) == first
    program = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from test_resume import losses_of_steps\n"
        "print(*losses_of_steps(Path(sys.argv[1]), 20))\n"
    )
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    command = [sys.executable, "-c", program, str(tmp_path / "third")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == first


def test_resume_with_a_rate_from_the_new_config(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=2")
    training.train()
    resumed = resumed_trainer(training, "trainer.max_steps=4", "trainer.optimizer.grid=0.003")
    assert {group["name"]: group["base_lr"] for group in resumed.optimizer.param_groups} == {
        "grid": 0.003,
        "networks": 2e-3,
        "variance": 2e-3,
    }


def test_resume_of_another_model_changes_nothing(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=2")
    training.train()
    with pytest.raises(CheckpointError, match="belongs to another model"):
        resumed_trainer(training, "model.radiance.hidden_width=8")
    assert history(training.run)["step"] == ["1", "2"]


def test_resume_with_another_meaning_of_the_weights_changes_nothing(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=2")
    training.train()
    what = r"was trained with model\.density=neus, this config has volsdf; set model\.density=neus"
    with pytest.raises(CheckpointError, match=what):
        resumed_trainer(training, "model.density=volsdf")
    assert history(training.run)["step"] == ["1", "2"]
    # Nothing else keeps a run from going on with what does not change the weights' meaning.
    resumed_trainer(training, "model.min_step=0.01", "system.loss.sparsity=0.1").train()


def test_more_steps_on_resume(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, "trainer.max_steps=5")
    training.train()
    assert training.fraction_done() == 1.0
    resumed = resumed_trainer(training, "trainer.max_steps=8")
    assert resumed.fraction_done() == 5 / 8
    resumed.train()
    assert history(resumed.run)["step"] == [str(step) for step in range(1, 9)]
    assert resumed.run.folder == training.run.folder


def test_resume_from_an_older_checkpoint_takes_back_what_came_after(tmp_path: Path) -> None:
    options = ("trainer.max_steps=6", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=4")
    training = new_trainer(tmp_path, *options)
    training.train()
    resumed = resumed_trainer(training, *options, checkpoint="ckpt_000002.pth")
    assert history(resumed.run)["step"] == ["1", "2"]
    resumed.train()
    assert history(resumed.run)["step"] == [str(step) for step in range(1, 7)]
    assert resumed.last_checkpoint is not None
    assert resumed.last_checkpoint.is_file()
