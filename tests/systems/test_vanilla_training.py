"""The original NeRF through the trainer: no seed fails, steps wait for nothing, resume is exact."""

from pathlib import Path

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from helpers_waiting import NoWaiting
from test_device_step import device_step_of
from tiny import new_trainer, parameters_of, resumed_trainer, same_tensors

from systems.rendering import render_view
from systems.trainer import Trainer

NERF = "tiny_nerf"
FEW = ("trainer.max_rays=64", "trainer.initial_rays=64", "model.num_coarse=8", "model.num_fine=8")


def train(trainer: Trainer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(trainer.train_step().psnr))
        trainer.step += 1
    return found


def held_out_psnr(trainer: Trainer) -> float:
    index = trainer.scene.test_indices[0]
    view = render_view(trainer.model, trainer.scene.cameras, index, trainer.system.progress_at(1.0))
    photo = trainer.scene.images.image(index).float() / 255
    return float(-10 * (view.rgb - photo).square().mean().log10())


@pytest.mark.parametrize("buffers", ["packed", "fixed"])
def test_a_run_learns_and_both_networks_do(tmp_path: Path, buffers: str) -> None:
    trainer = new_trainer(tmp_path, f"trainer.buffers={buffers}", method=NERF)
    before = parameters_of(trainer)
    psnr = train(trainer, 50)
    assert sum(psnr[-5:]) > sum(psnr[:5]) + 5 * 3
    after = parameters_of(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_no_seed_stays_where_it_starts(tmp_path: Path) -> None:
    """The white of most pixels is worth 15.7 dB, which is where a density that is dead at the start ends."""
    options = ("trainer.max_rays=96", "trainer.initial_rays=96", "model.num_coarse=10", "model.num_fine=8")
    found = []
    for seed in range(10):
        trainer = new_trainer(tmp_path, f"seed={seed}", "trainer.max_steps=100", *options, method=NERF)
        train(trainer, 100)
        trainer.run.close()
        found.append(held_out_psnr(trainer))
    mean = sum(found) / len(found)
    assert mean > 20
    assert all(abs(psnr - mean) < 1.2 for psnr in found), found


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    whole = new_trainer(tmp_path, *FEW, method=NERF)
    train(whole, 3)
    whole.save_checkpoint()
    train(whole, 3)
    resumed = resumed_trainer(whole, *FEW, method=NERF)
    train(resumed, 3)
    assert same_tensors(parameters_of(whole), parameters_of(resumed))


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks this itself, see benchmarks/engine.py")
def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    options = ("trainer.buffers=fixed", "model.backend=cuda", "trainer.max_rays=16")
    trainer = new_trainer(tmp_path, *options, "trainer.samples_per_step=300", method=NERF)
    trainer.train_step()
    step = device_step_of(trainer)
    live = step._upload(trainer.system.progress_at(0.5), trainer.learning_rates())
    with NoWaiting():
        step._step(live)
