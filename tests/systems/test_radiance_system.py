"""The radiance family's training rules: which terms there are, and whole runs in small."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import bare_model, new_trainer, resumed_trainer, tiny_config, tiny_model

from systems import losses
from systems.histogram_losses import distortion, interlevel
from systems.neus import NeuSSystem
from systems.radiance import RadianceSystem, RadianceSystemConfig
from utils.errors import ConfigError
from utils.types import Batch, RayHistogram, Rays, RenderOutput

NGP, PROPOSALS = "tiny_ngp", "tiny_nerf_proposal"


def system_of(**weights: object) -> RadianceSystem:
    config = tiny_config(method=NGP).system
    assert isinstance(config, RadianceSystemConfig)
    loss = replace(config.loss, **weights)
    return RadianceSystem(replace(config, loss=loss), 4, has_masks=False)


def a_render() -> tuple[RenderOutput, Batch]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def histogram(count: int) -> RayHistogram:
        edges = torch.cat([torch.zeros(5, 1), random(5, count).cumsum(1)], dim=1)
        return RayHistogram(edges / edges[:, -1:], random(5, count) / count)

    one = torch.ones(5)
    rays = Rays(random(5, 3), random(5, 3), one, 2 * one, torch.zeros(5, dtype=torch.int64))
    render = RenderOutput(
        *(random(5, 3), random(5), random(5), random(5, 3), random(20, 3), random(20), 20),
        histograms=(histogram(6), histogram(7), histogram(4)),
        rgb_coarse=random(5, 3),
    )
    return render, Batch(rays, random(5, 3), None)


def test_terms_are_those_with_a_weight_and_what_they_say() -> None:
    system = system_of(
        rgb_charbonnier=0.5, rgb_coarse=[[0.0, 1.0], [0.5, 0.0]], interlevel=1.0, distortion=0.01
    )
    render, batch = a_render()
    progress = system.progress_at(0.25)
    assert progress.loss_weights == {
        "rgb_l2": 1.0, "rgb_charbonnier": 0.5, "rgb_coarse": 0.5, "interlevel": 1.0, "distortion": 0.01,
    }  # fmt: skip
    terms = system.loss_terms(render, batch, progress, _no_surface, torch.Generator())
    first, second, last = render.histograms
    expected = {
        "rgb_l2": losses.rgb_l2(render.rgb, batch.rgb),
        "rgb_charbonnier": losses.rgb_charbonnier(render.rgb, batch.rgb),
        "rgb_coarse": ((render.rgb_coarse - batch.rgb) ** 2).mean(),
        "interlevel": interlevel(first, last) + interlevel(second, last),
        "distortion": distortion(last),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert "rgb_coarse" not in system.progress_at(0.7).loss_weights


def _no_surface(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("a radiance field has no signed distance")


def test_the_proposals_are_followed_sooner_or_later() -> None:
    assert system_of().progress_at(0.0).proposal_anneal == 1.0
    later = RadianceSystem(replace(system_of().config, proposal_anneal_end=0.5), 4, has_masks=False)
    assert [later.progress_at(f).proposal_anneal for f in (0.0, 0.5, 1.0)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("term", ["interlevel", "distortion", "rgb_coarse"])
def test_terms_that_the_model_does_not_serve_are_refused(term: str) -> None:
    system = system_of(**{term: 0.1})
    with pytest.raises(ConfigError, match=rf"system\.loss\.{term}: this model"):
        system.check_training(bare_model())


def test_what_must_learn_has_a_term() -> None:
    model = bare_model(num_proposals=2, has_coarse_network=True)
    with pytest.raises(ConfigError, match=r"system\.loss\.interlevel: is 0, but the proposals"):
        system_of().check_training(model)
    with pytest.raises(ConfigError, match=r"system\.loss\.rgb_coarse: is 0, but the coarse network"):
        system_of(interlevel=1.0).check_training(model)
    system_of(interlevel=1.0, distortion=0.01, rgb_coarse=1.0).check_training(model)


@pytest.mark.parametrize("term", ["mask", "mask_iou", "opacity"])
def test_opacities_that_say_nothing_are_not_judged(term: str) -> None:
    config = tiny_config(f"system.loss.{term}=0.1", method=NGP).system
    system, model = RadianceSystem(config, 4, has_masks=True), bare_model()
    system.check_training(model)
    model.is_opaque = True
    with pytest.raises(ConfigError, match=rf"system\.loss\.{term}: every ray ends in this model"):
        system.check_training(model)


def test_a_system_of_distances_is_refused() -> None:
    config = tiny_config("system.name=neus", method=NGP).system
    with pytest.raises(ConfigError, match=r"system\.name: neus judges signed distances, which NGP does not"):
        NeuSSystem(config, 4, has_masks=True).check_training(tiny_model(tiny_config(method=NGP)))


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"system\.loss\.mask: needs masks"):
        system_of(mask=0.1)
    for change in ({"proposal_anneal_end": 1.5}, {"patch_size": 2}, {"num_patches": 0}):
        with pytest.raises(ValueError, match=rf"system\.{next(iter(change))}"):
            replace(RadianceSystemConfig(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [NGP, PROPOSALS])
def test_a_run_learns_and_resumes_exactly(method: str, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "a", method=method)
    before = [float(trainer.train_step().psnr) for _ in range(10)]
    trainer.train()
    late = [float(trainer.train_step().psnr) for _ in range(10)]
    assert sum(late) / 10 > sum(before) / 10 + 3
    half = new_trainer(tmp_path / "b", "trainer.max_steps=60", "trainer.checkpoint_every=30", method=method)
    half.train()
    again = resumed_trainer(half, "trainer.max_steps=60", checkpoint="ckpt_000030.pth", method=method)
    again.train()
    for name, value in half.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("method", [NGP, PROPOSALS])
def test_fixed_buffers_learn_as_well(method: str, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, "trainer.buffers=fixed", "trainer.lookahead=4", method=method)
    before = [float(trainer.train_step().psnr) for _ in range(10)]
    trainer.train()
    late = [float(trainer.train_step().psnr) for _ in range(10)]
    assert sum(late) / 10 > sum(before) / 10 + 3


def test_the_model_says_where_it_is() -> None:
    now = system_of().progress_at(0.0)
    model = tiny_model(tiny_config(method=NGP))
    assert (model.device.type, model.num_levels, model.stage(now)) == ("cpu", 4, False)
    with pytest.raises(NotImplementedError, match="NGP has no signed distance"):
        model.query_field(torch.zeros(1, 3), now)
