"""mip-NeRF 360 through the trainer: it learns, with buffers of either kind, and goes on where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, SECTIONS, build_trainer, new_run, parameters_of, same_tensors
from torch import Tensor

from models.proposal import composite_weights
from systems.histogram_losses import distortion, interlevel
from systems.radiance import RadianceLossConfig, RadianceSystem, RadianceSystemConfig
from systems.record import Run
from systems.rendering import render_view
from systems.trainer import OptimizerConfig, Trainer
from utils.config import Config, load_config
from utils.errors import ConfigError
from utils.types import Batch, RayHistogram, Rays, RenderOutput


def tiny(*overrides: str) -> Config:
    return load_config(Path(__file__).with_name("tiny_mipnerf360.yaml"), overrides, SECTIONS)


def new_trainer(outputs: Path, *overrides: str) -> Trainer:
    config = tiny(*overrides)
    return build_trainer(config, new_run(config, outputs))


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
    trainer = new_trainer(tmp_path, f"trainer.buffers={buffers}")
    before = held_out_psnr(trainer)
    train(trainer, 40)
    # White alone, the colour of most pixels, is worth 15.7 dB.
    assert held_out_psnr(trainer) > max(before + 5, 19)


def test_both_kinds_of_buffers_see_the_same(tmp_path: Path) -> None:
    packed, fixed = (new_trainer(tmp_path / kind, f"trainer.buffers={kind}") for kind in ("packed", "fixed"))
    assert train(packed, 3) == pytest.approx(train(fixed, 3), rel=1e-4)


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    whole = new_trainer(tmp_path)
    train(whole, 3)
    whole.save_checkpoint()
    train(whole, 3)
    run = Run.reopen(whole.run.folder, tmp_path / "tf-logs")
    resumed = build_trainer(tiny(), run)
    resumed.restore(run.checkpoints / "last.pth")
    train(resumed, 3)
    assert same_tensors(parameters_of(whole), parameters_of(resumed))


@pytest.mark.parametrize("buffers", ["packed", "fixed"])
def test_optimiser_is_the_papers(tmp_path: Path, buffers: str) -> None:
    groups = new_trainer(tmp_path, f"trainer.buffers={buffers}").optimizer.param_groups
    assert [group["name"] for group in groups] == ["networks", "proposals"]
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-6 for group in groups)


@pytest.mark.parametrize(("key", "value"), [("beta2", 1.0), ("eps", -1.0), ("proposals", -0.1)])
def test_impossible_optimisers_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.optimizer\.{key}: "):
        OptimizerConfig(**{key: value})


# The system's part


def system(**keys: Any) -> RadianceSystem:
    loss = RadianceLossConfig(interlevel=2.0, distortion=0.5)
    return RadianceSystem(RadianceSystemConfig(name="mipnerf360", loss=loss, **keys), 0, False)


def hand_made(num_proposals: int) -> tuple[RenderOutput, Batch]:
    """Four rays, of which the last is not served."""
    torch.manual_seed(0)
    histograms = []
    for count in (*[6] * num_proposals, 4):
        edges = torch.rand(4, count + 1).sort(dim=1).values
        weights = composite_weights(torch.rand(4 * count) * 5, edges.diff(dim=1), False, "reference")
        histograms.append(RayHistogram(edges, weights))
    ray = torch.zeros(4, 3)
    render = RenderOutput(
        rgb=torch.rand(4, 3),
        opacity=torch.rand(4),
        depth=torch.rand(4),
        normal=ray,
        positions=torch.zeros(16, 3),
        weights=histograms[-1].weights.flatten(),
        num_marched=16,
        is_served=torch.tensor([True, True, True, False]),
        histograms=tuple(histograms) if num_proposals else (),
    )
    rays = Rays(ray, ray, ray[:, 0], ray[:, 0], torch.zeros(4, dtype=torch.int64))
    return render, Batch(rays, torch.rand(4, 3), None)


def no_field(positions: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError(f"nobody asks for a signed distance at {positions}")


def test_terms_of_histograms() -> None:
    (render, batch), judge = hand_made(2), system()
    terms = judge.loss_terms(render, batch, judge.progress_at(0.5), no_field, torch.Generator(CPU))
    first, second, last = render.histograms
    keep = render.is_served
    torch.testing.assert_close(terms["distortion"], distortion(last, keep))
    torch.testing.assert_close(
        terms["interlevel"], interlevel(first, last, keep) + interlevel(second, last, keep)
    )
    assert terms["interlevel"] > 0


def test_terms_of_histograms_need_proposals() -> None:
    (render, batch), judge = hand_made(0), system()
    with pytest.raises(ConfigError, match=r"^system\.loss\.interlevel: .*; set it to 0"):
        judge.loss_terms(render, batch, judge.progress_at(0.5), no_field, torch.Generator(CPU))


def test_proposals_are_believed_more_and_more() -> None:
    def exponents(end: float) -> list[float]:
        progresses = [system(proposal_anneal_end=end).progress_at(f) for f in (0.0, 0.25, 0.5, 1.0)]
        return [float(progress.proposal_anneal) for progress in progresses]

    # Schlick's bias 10 f / (9 f + 1).
    assert exponents(1.0) == pytest.approx([0, 2.5 / 3.25, 5 / 5.5, 1])
    assert exponents(0.5) == pytest.approx([0, 5 / 5.5, 1, 1])
    assert exponents(0.0) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"system\.proposal_anneal_end"):
        system(proposal_anneal_end=1.5)
