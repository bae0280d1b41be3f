"""Methods with a background have two surfaces: the unit sphere's, and what surrounds it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_scene

from models.surroundings import SurroundedSurface
from process_data.batches import full_image
from systems import SYSTEMS
from systems.neus import NeuSSystem
from systems.system import histogram_terms
from utils.types import Budget, Rays


@pytest.mark.parametrize("method", ["tiny", "tiny_ngp"])
@pytest.mark.parametrize("mode", ["none", "embedding"])
def test_a_model_with_a_background_has_both_surfaces(method: str, mode: str) -> None:
    appearance = f"model.appearance.mode={mode}"
    config = tiny_config(appearance, "model.background.enabled=true", method=method)
    model = tiny_model(config)
    progress = SYSTEMS[config.system.name][1](config.system, model.num_levels, True).progress_at(1.0)
    assert not isinstance(model.frozen_at(progress), SurroundedSurface)
    assert model.reach == float("inf")
    # The background is dense everywhere, up to the sphere; the surface inside is its own.
    with torch.no_grad():
        model.background.density_field.density_network[-1].bias[0] = 12.0
    surface = model.frozen_at(progress, 1.5)
    assert isinstance(surface, SurroundedSurface)
    directions = torch.nn.functional.normalize(torch.randn(64, 3), dim=1)
    assert (surface.query_sdf(1.01 * directions) < 0).all()
    inner = model.frozen_at(progress).query_sdf(0.3 * directions)
    torch.testing.assert_close(surface.query_sdf(0.3 * directions), inner.clamp(-0.7, 0.7))
    both = torch.cat([0.3 * directions, 1.2 * directions])
    colors = surface.query_color(both, -directions.repeat(2, 1))
    assert ((colors >= 0) & (colors <= 1)).all()
    inside = model.frozen_at(progress).query_color(0.3 * directions, -directions)
    torch.testing.assert_close(colors[:64], inside)


def test_without_a_background_there_is_one_surface() -> None:
    model = tiny_model(tiny_config())
    assert model.reach == 1.0


@pytest.mark.parametrize("sampler", ["inverse_distance", "proposal"])
def test_what_nobody_sees_of_the_background_is_not_asked_for(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("model.background.enabled=true", f"model.background.sampler={sampler}")
    model, scene = tiny_model(config), tiny_scene()
    rays = full_image(scene, 0).rays
    # A sphere as sharp as a wall.
    progress = NeuSSystem(config.system, model.num_levels, True).progress_at(1.0)
    progress = replace(progress, inv_s=2000.0)
    asked: list[int] = []
    forward = model.background.forward

    def counting(rays: Rays, *rest: Any) -> Any:
        asked.append(len(rays))
        return forward(rays, *rest)

    monkeypatch.setattr(model.background, "forward", counting)
    color = torch.ones(3)
    with torch.no_grad():
        shown = model.render(rays, progress, color)
        # Buffers of fixed size ask for all of it.
        everything = model.render(rays, progress, color, None, Budget(torch.tensor(len(rays)), 10**5, 10**5))
    assert everything.is_served is not None
    assert everything.is_served.all()
    is_hidden = shown.opacity >= 1.0 - 1e-3
    assert 0.1 * len(rays) < is_hidden.sum() < 0.9 * len(rays)
    assert asked == [int((~is_hidden).sum()), len(rays)]
    torch.testing.assert_close(shown.rgb, everything.rgb, atol=1e-3, rtol=0)
    assert all(len(histogram.weights) == asked[0] for histogram in shown.histograms)
    # Where nothing is seen of it at all, there is nothing to learn, and no error.
    some = rays[is_hidden.nonzero().squeeze(1)[:5]]
    render = model.render(some, progress, color, torch.Generator().manual_seed(0))
    terms = histogram_terms(render)
    if sampler == "proposal":
        assert terms["interlevel"]().detach().item() == 0.0
    render.rgb.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
