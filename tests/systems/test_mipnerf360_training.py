"""mip-NeRF 360 through the trainer: it learns, with buffers of either kind, and goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from helpers_waiting import NoWaiting
from test_device_step import device_step_of
from tiny import new_trainer, parameters_of, resumed_trainer, same_tensors

from systems.optimizer import OptimizerConfig
from systems.rendering import render_view
from systems.trainer import Trainer

MIP = "tiny_mipnerf360"
EMBEDDING = ("model.appearance.mode=embedding", "model.appearance.width=4", "model.gradient_scaling=3")
EXPOSURE = ("model.appearance.mode=exposure",)


def train(trainer: Trainer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(float(trainer.train_step().loss))
        trainer.step += 1
    return losses


def held_out_psnr(trainer: Trainer) -> float:
    index = trainer.scene.test_indices[0]
    view = render_view(trainer.model, trainer.scene.cameras, index, trainer.system.progress_at(1.0))
    error = view.rgb - trainer.scene.images.image(index).float() / 255
    return float(-10 * error.square().mean().log10())


@pytest.mark.parametrize("buffers", ["packed", "fixed"])
def test_held_out_views_get_better(tmp_path: Path, buffers: str) -> None:
    trainer = new_trainer(tmp_path, f"trainer.buffers={buffers}", method=MIP)
    before = held_out_psnr(trainer)
    train(trainer, 40)
    # White alone, the colour of most pixels, is worth 15.7 dB.
    assert held_out_psnr(trainer) > max(before + 5, 19)


@pytest.mark.parametrize("overrides", [(), EMBEDDING, EXPOSURE], ids=["plain", "embedding", "exposure"])
def test_both_kinds_of_buffers_see_the_same(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    packed, fixed = (
        new_trainer(tmp_path / kind, f"trainer.buffers={kind}", *overrides, method=MIP)
        for kind in ("packed", "fixed")
    )
    assert train(packed, 3) == pytest.approx(train(fixed, 3), rel=1e-4)


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks this itself when it records a step")
@pytest.mark.parametrize(
    "overrides",
    [("model.precision=float32",), ("model.precision=bfloat16",), EMBEDDING, EXPOSURE],
    ids=["float32", "bfloat16", "embedding", "exposure"],
)
def test_a_step_waits_for_nothing(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    trainer = new_trainer(
        *(tmp_path, "trainer.buffers=fixed", "model.backend=cuda", "trainer.max_rays=4"),
        *("model.encoding.contracted=true", "model.opaque_background=true", *overrides),
        method=MIP,
    )
    trainer.train_step()
    step = device_step_of(trainer)
    live = step._upload(trainer.system.progress_at(0.5), trainer.learning_rates())
    with NoWaiting():
        step._step(live)


@pytest.mark.parametrize("overrides", [(), EMBEDDING], ids=["plain", "embedding"])
def test_resumed_training_is_the_same_training(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    whole = new_trainer(tmp_path, *overrides, method=MIP)
    train(whole, 3)
    whole.save_checkpoint()
    train(whole, 3)
    resumed = resumed_trainer(whole, *overrides, method=MIP)
    train(resumed, 3)
    assert same_tensors(parameters_of(whole), parameters_of(resumed))


def test_the_model_says_what_it_has(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, method=MIP)
    trainer.system.check_training(trainer.model)
    assert (trainer.model.num_levels, trainer.model.num_proposals) == (0, 2)
    with pytest.raises(NotImplementedError, match="MipNeRF360 has no signed distance"):
        trainer.model.query_field(torch.zeros(1, 3), trainer.system.progress_at(0.0))


@pytest.mark.parametrize("buffers", ["packed", "fixed"])
def test_optimiser_is_the_papers(tmp_path: Path, buffers: str) -> None:
    groups = new_trainer(tmp_path, f"trainer.buffers={buffers}", method=MIP).optimizer.param_groups
    assert [group["name"] for group in groups] == ["networks", "proposals"]
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-6 for group in groups)


@pytest.mark.parametrize(("key", "value"), [("beta2", 1.0), ("eps", -1.0), ("proposals", -0.1)])
def test_impossible_optimisers_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.optimizer\.{key}: "):
        OptimizerConfig(**{key: value})
