"""Patches in training: wholly rendered ones count, a step always has room for their rays, nothing waits."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from helpers_waiting import NoWaiting
from test_device_step import FIXED, SMALL, device_step_of, starve
from test_patch_losses import StubNetwork
from test_resume import differences
from tiny import (
    WITHOUT_MASKS,
    Judged,
    before_step,
    history,
    judge,
    new_trainer,
    parameters_of,
    raiser,
    resumed_trainer,
    tiny_config,
    tiny_model,
    tiny_scene,
)

from process_data.batches import Priors, RayBatches
from systems import checkpoint, patch_losses
from systems.neus import NeuSSystem
from systems.patch_losses import patch_ssim
from systems.step import composite_masked
from utils import metrics
from utils.errors import ConfigError
from utils.types import Batch, Budget, Progress

SSIM = ("system.loss.ssim=0.5", "system.patch_size=5", "system.num_patches=3")
"""75 rays of up to 96."""


def judge_patches(overrides: tuple[str, ...], batch: Batch, budget: Budget | None) -> Judged:
    return judge(tiny_config(*overrides, *SSIM), batch, budget)


def batch_of(*overrides: str) -> Batch:
    """Three patches of the object and nine single rays."""
    config, scene = tiny_config(*overrides, *SSIM), tiny_scene(*overrides)
    system = NeuSSystem(config.system, 4, scene.masks is not None)
    share = 0.0 if scene.masks is None else 1.0
    return RayBatches(scene, seed=4, foreground_fraction=share, priors=system.priors).draw(84)


@pytest.mark.parametrize("overrides", [(), WITHOUT_MASKS], ids=["masks", "background"])
def test_same_numbers_as_packed(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # Packed steps ask nothing of the background where next to nothing of it is seen; here they do.
    monkeypatch.setattr("models.bounded._HIDDEN", 0.0)
    batch = batch_of(*overrides)
    packed, terms, gradients = judge_patches(overrides, batch, None)
    by_hand = patch_ssim(packed.rgb[:75].view(3, 5, 5, 3), batch.rgb[:75].view(3, 5, 5, 3))
    assert float(terms["ssim"].detach()) == float(by_hand.detach()) > 0.01
    budget = Budget(torch.tensor(84), 6000, 5000)
    padded, fixed_terms, fixed_gradients = judge_patches(overrides, batch, budget)
    assert padded.is_served is not None
    assert padded.is_served.all()
    assert fixed_terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(fixed_terms[name], term, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fixed_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(("num_rays", "whole"), [(75, 3), (74, 2), (50, 2), (26, 1), (24, 0), (0, 0)])
def test_patches_without_room_for_all_rays_do_not_count(num_rays: int, whole: int) -> None:
    batch = batch_of()
    render, terms, gradients = judge_patches((), batch, Budget(torch.tensor(num_rays), 6000, 5000))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert render.is_served is not None
    assert int(render.is_served.sum()) == num_rays
    if whole == 0:
        assert float(terms["ssim"].detach()) == 0.0
        return
    expected = patch_ssim(batch.patches(render.rgb)[:whole], batch.patches(batch.rgb)[:whole])
    torch.testing.assert_close(terms["ssim"], expected)


def test_patches_are_served_first() -> None:
    """Buffers that run full cut off single rays, and then the last patch."""
    batch = batch_of()
    everything = int(judge_patches((), batch, Budget(torch.tensor(84), 6000, 5000))[0].num_samples)
    for rendered in (everything - 1, everything // 2):
        render, _, _ = judge_patches((), batch, Budget(torch.tensor(84), 6000, rendered))
        assert render.is_served is not None
        served = int(render.is_served.sum())
        assert 0 < served < 84
        assert render.is_served[:served].all()
        assert batch.whole_patches(render.is_served).tolist() == [served >= end for end in (25, 50, 75)]


@pytest.mark.parametrize("term", ["ssim", "lpips"])
def test_a_term_without_weight_is_not_computed(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_losses, f"patch_{term}", raiser(AssertionError("computed")))
    batch, model = batch_of(), tiny_model(tiny_config())
    system = NeuSSystem(tiny_config(*SSIM).system, 4, True)
    without, alone = (Progress(0.5, 1.0, 4.0, {name: 1.0}) for name in ("rgb_l1", term))
    render = model.render(batch.rays, without, torch.ones(3))
    field = partial(model.query_field, progress=without)
    assert list(system.loss_terms(render, batch, without, field, torch.Generator())) == ["rgb_l1"]
    with pytest.raises(AssertionError, match="computed"):
        system.loss_terms(render, batch, alone, field, torch.Generator())


def test_what_the_terms_ask_for() -> None:
    late = tiny_config("system.loss.ssim=[[0,0],[0.5,0],[1,1]]", "system.patch_size=7").system
    assert NeuSSystem(late, 4, True).priors == Priors(patches="system.patch_size", patch_size=7)
    off = replace(NeuSSystem(tiny_config("system.patch_size=7").system, 4, True).priors, patch_size=11)
    assert off == Priors()


# Enough rays


@pytest.mark.parametrize("buffers", ["fixed", "packed"])
def test_a_small_budget_keeps_the_patches(tmp_path: Path, buffers: str) -> None:
    """A tenth of the samples that the patches' rays have."""
    options = (f"trainer.buffers={buffers}", "trainer.samples_per_step=50", "trainer.initial_rays=1")
    training = new_trainer(tmp_path, *SSIM, *options)
    for _ in range(12):
        record = training.train_step()
        training.step += 1
        asked = training.num_rays
        if training.device_step is not None:
            asked = int(training.device_step.budget.num_rays)
            assert record.num_samples <= 50
        else:
            assert record.num_rays == 75
        assert asked == 75


def test_fewer_rays_at_most_than_the_patches_have(tmp_path: Path) -> None:
    line = r"^trainer\.max_rays: 96 are fewer than the 100 rays of the patches; set it to 100, or "
    with pytest.raises(ConfigError, match=line):
        new_trainer(tmp_path, *SSIM, "system.num_patches=4")


def test_pictures_smaller_than_a_patch(tmp_path: Path) -> None:
    line = (
        r"^system\.patch_size: picture .* has 32 x 32 pixels, less than a patch of 33; set it to at most 32"
    )
    with pytest.raises(ConfigError, match=line):
        new_trainer(tmp_path, *SSIM, "system.patch_size=33", "trainer.max_rays=9999")


def test_out_of_memory_keeps_the_patches(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, FIXED, *SSIM, "trainer.max_steps=8")
    before_step(training, 5, lambda: starve(training, above=200))
    training.train()
    assert training.step == 8
    assert int(device_step_of(training).budget.num_rays) >= 75


@pytest.mark.parametrize("buffers", ["fixed", "packed"])
def test_patches_join_a_run_that_had_none(tmp_path: Path, buffers: str) -> None:
    options = (f"trainer.buffers={buffers}", "trainer.samples_per_step=50")
    first = new_trainer(tmp_path, *options, "trainer.max_steps=40")
    first.train()
    assert checkpoint.load(first.run.checkpoints / "last.pth")["num_rays"] < 75
    second = resumed_trainer(first, *options, *SSIM, "trainer.max_steps=43")
    second.train()
    assert second.step == 43
    assert float(history(second.run)["ssim"][-1]) >= 0.0


# Training


@pytest.mark.parametrize(
    "overrides",
    [(FIXED,), ("trainer.foreground_share=0.5",), (FIXED, *WITHOUT_MASKS)],
    ids=["fixed", "packed", "background"],
)
def test_resume_is_exact(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    overrides = (*overrides, *SSIM, "trainer.max_steps=16", "trainer.samples_per_step=1500")
    straight = new_trainer(tmp_path / "straight", *overrides)
    straight.train()
    first = new_trainer(tmp_path / "broken", *overrides)
    before_step(first, 8, raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = resumed_trainer(first, *overrides)
    second.train()
    states = [checkpoint.load(run.run.checkpoints / "last.pth") for run in (straight, second)]
    for state in states:
        del state["train_seconds"], state["random"]
    assert differences(*states) == []


@pytest.mark.parametrize("buffers", ["fixed", "packed"])
def test_ssim_alone_brings_the_surface_nearer(tmp_path: Path, buffers: str) -> None:
    """The sphere starts with radius 0.4 and is 0.5 in the photographs."""
    training = new_trainer(
        *(tmp_path, f"trainer.buffers={buffers}", *SSIM, "system.loss={mask: 0, rgb_l1: 0, ssim: 1}"),
        *("system.patch_size=11", "trainer.max_rays=375", "trainer.samples_per_step=8192"),
        "trainer.foreground_share=1",
    )
    surface = 0.5 * torch.nn.functional.normalize(torch.randn(500, 3), dim=1)

    progress = training.system.progress_at(1.0)
    # Single steps' values are those of three patches each; these are always the same.
    white = torch.ones(3)
    batch = composite_masked(batch_of(), white)

    def distances() -> tuple[float, float]:
        rgb = training.model.render(batch.rays, progress, white).rgb
        ssim = patch_ssim(batch.patches(rgb), batch.patches(batch.rgb))
        return float(training.model.query_sdf(surface, progress).abs().mean()), float(ssim.detach())

    before = distances()
    for _ in range(40):
        record = training.train_step()
        assert record.finite
        training.step += 1
    assert record.terms[-1] == "ssim"
    after = distances()
    assert after[0] < 0.7 * before[0]
    assert after[1] < 0.8 * before[1]


def test_lpips_trains_the_field_and_not_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = StubNetwork("alex", verbose=False).requires_grad_(False)
    monkeypatch.setattr(metrics, "_lpips_network", lambda device: network)
    monkeypatch.setattr(patch_losses, "lpips_missing", lambda: None)
    training = new_trainer(
        *(tmp_path, "system.loss={mask: 0, rgb_l1: 0, lpips: 1, eikonal: 0}", "system.num_patches=1"),
        *("system.patch_size=32", "trainer.max_rays=1100", "trainer.optimizer.warmup_steps=0"),
    )
    before, weight = parameters_of(training), network.weight.clone()
    record = training.train_step()
    assert record.finite
    assert record.terms == ("lpips",)
    assert float(record.loss) > 0
    assert torch.equal(network.weight, weight)
    changed = {
        name for name, value in parameters_of(training).items() if not torch.equal(value, before[name])
    }
    assert {"sdf_field.grid.table", "variance"} <= changed


@needs_triton
@pytest.mark.parametrize("overrides", [(), WITHOUT_MASKS], ids=["masks", "background"])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks this itself, see benchmarks/engine.py")
def test_a_step_waits_for_nothing(
    tmp_path: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = StubNetwork("alex", verbose=False).requires_grad_(False)
    monkeypatch.setattr(metrics, "_lpips_network", lambda device: network)
    monkeypatch.setattr(patch_losses, "check_lpips", lambda *_: None)
    training = new_trainer(
        *(tmp_path, FIXED, "model.backend=cuda", *overrides, *SMALL, "trainer.samples_per_step=60"),
        *("system.loss={ssim: 0.5, lpips: 0.1}", "system.patch_size=3", "system.num_patches=1"),
        *(() if overrides else ("trainer.foreground_share=0.5",)),
    )
    training.train_step()
    step = device_step_of(training)
    live = step._upload(training.system.progress_at(0.5), training.learning_rates())
    with NoWaiting():
        step._step(live)
