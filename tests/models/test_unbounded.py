"""What mip-NeRF 360 and NeRF with proposals share: light per image, fainter gradients, pixels' last steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_mipnerf360 import DONE, config, make
from test_nerf_proposal import small_model
from test_neus import GREEN, random_rays
from torch import Tensor

from models.appearance import AppearanceConfig
from models.mipnerf360 import MipNeRF360Config
from models.unbounded import Shading, UnboundedModel
from utils.types import Budget, RayHistogram, Rays

EMBEDDING, EXPOSURE = AppearanceConfig("embedding", 4), AppearanceConfig("exposure")
OPEN = {"spacing": "linear", "near": 1.0, "far": 6.0, "unit": 1.0, "opaque_background": False}


def mip(**keys: Any) -> UnboundedModel:
    return make(config(**keys))


def mip_before_a_color(**keys: Any) -> UnboundedModel:
    """Of which rays see the background colour, too."""
    model = make(config(contracted=False, **OPEN, **keys))
    with torch.no_grad():
        model.radiance.density.weight.mul_(0.1)
        model.radiance.density.bias.fill_(-0.5)
    return model


MODELS = [
    pytest.param(mip, id="mipnerf360"),
    pytest.param(mip_before_a_color, id="mipnerf360, bounded"),
    pytest.param(small_model, id="nerf-proposal"),
]
Maker = Callable[..., UnboundedModel]


def rays_of(views: list[int]) -> Rays:
    """The same rays of each of these views."""
    torch.manual_seed(5)
    rays = random_rays(12)
    count = len(views)
    return Rays(
        *(rays.origins.repeat(count, 1), rays.directions.repeat(count, 1)),
        *(rays.near.repeat(count), rays.far.repeat(count)),
        torch.tensor(views).repeat_interleave(12),
        torch.full((12 * count,), 0.01),
    )


def table_of(model: UnboundedModel) -> Tensor:
    module = model.embedding or model.exposure
    assert module is not None
    return module.per_image


@pytest.mark.parametrize("maker", MODELS)
def test_embeddings_change_colors_and_nothing_else(maker: Maker) -> None:
    model = maker(appearance=EMBEDDING)
    with torch.no_grad():
        table_of(model)[1] += 3.0
        render = model.render(rays_of([0, 1, -1]), DONE, GREEN)
    first, second, unknown = render.rgb.split(12)
    assert float((first - second).abs().max()) > 0.01
    assert not torch.equal(first, unknown)
    for name in ("opacity", "depth", "normal"):
        ours, theirs, _ = getattr(render, name).split(12)
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("maker", MODELS)
def test_exposure_changes_what_the_field_shows_and_not_the_color_behind_it(maker: Maker) -> None:
    model = maker(appearance=EXPOSURE)
    with torch.no_grad():
        plain = model.render(rays_of([0]), DONE, GREEN)
        table_of(model)[0] = torch.tensor([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])
        shown = model.render(rays_of([0, -1]), DONE, GREEN)
    # A third of the logarithm and of the offset is the mean of the three images.
    behind = (1 - plain.opacity[:, None]) * GREEN
    expected = math.exp(2 / 3) * (plain.rgb - behind) + 0.2 * 2 / 3 * plain.opacity[:, None] + behind
    torch.testing.assert_close(shown.rgb[:12], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shown.rgb[12:], plain.rgb)
    assert (float(behind.max()) > 0.1) == (maker is mip_before_a_color)


@pytest.mark.parametrize("maker", MODELS)
def test_colors_of_the_mesh_are_those_of_the_mean(maker: Maker) -> None:
    model = maker(appearance=EMBEDDING)
    positions = torch.rand(30, 3) - 0.5
    directions = torch.nn.functional.normalize(positions + 0.1)
    with torch.no_grad():
        table_of(model)[0] += 8.0
        asked = model.query_color(positions, directions)
        table_of(model)[:] = table_of(model).mean(dim=0)
        torch.testing.assert_close(model.query_color(positions, directions), asked)
        table_of(model).zero_()
        assert float((model.query_color(positions, directions) - asked).abs().max()) > 0.01


@pytest.mark.parametrize("appearance", [EMBEDDING, EXPOSURE], ids=["embedding", "exposure"])
@pytest.mark.parametrize("maker", MODELS)
def test_gradients_reach_the_images_of_a_batch(maker: Maker, appearance: AppearanceConfig) -> None:
    model = maker(appearance=appearance)
    table = table_of(model)
    render = model.render(rays_of([2]), DONE, GREEN, torch.Generator().manual_seed(0))
    render.rgb.square().sum().backward()
    assert table.grad is not None
    assert bool((table.grad[2].abs() > 0).all())
    groups = model.parameter_groups()
    assert any(parameter is table for parameter in groups["networks"])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("maker", MODELS)
def test_off_there_is_nothing(maker: Maker) -> None:
    model, exposed = maker(), maker(appearance=EXPOSURE)
    state = model.state_dict()
    assert model.embedding is None
    assert model.exposure is None
    assert not any("per_image" in name or "row_of_view" in name for name in state)
    if maker is not small_model:
        # What images have for themselves is drawn last.
        assert all(torch.equal(exposed.state_dict()[name], value) for name, value in state.items())


def test_an_embedding_widens_one_layer() -> None:
    plain, wide = mip().state_dict(), mip(appearance=EMBEDDING).state_dict()
    assert wide.keys() - plain.keys() == {"embedding.per_image", "embedding.row_of_view"}
    differ = {name for name, value in plain.items() if wide[name].shape != value.shape}
    assert differ == {"color.view.weight"}
    assert wide["color.view.weight"].shape[1] == plain["color.view.weight"].shape[1] + 4


@pytest.mark.parametrize("is_opaque", [True, False])
def test_weights_are_those_of_the_paper_and_gradients_get_fainter(is_opaque: bool) -> None:
    torch.manual_seed(0)
    density = torch.rand(12, dtype=torch.float64)
    rgb, lengths = torch.rand(12, 3, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    t_middle = torch.linspace(0.1, 3.0, 12, dtype=torch.float64).view(3, 4)
    found = []
    for reach in (0.0, 1.5):
        model = make(config(gradient_scaling=reach, opaque_background=is_opaque))
        inputs = density.clone().requires_grad_(), rgb.clone().requires_grad_()
        weights, colors = model.weigh(*inputs, lengths, t_middle)
        for ray in range(3):
            light = 1.0
            for k in range(4):
                ends = is_opaque and k == 3
                alpha = 1.0 if ends else 1.0 - math.exp(-float(density.view(3, 4)[ray, k] * lengths[ray, k]))
                assert float(weights[ray, k].detach()) == pytest.approx(light * alpha, abs=1e-12)
                light *= 1.0 - alpha
        assert torch.equal(colors, rgb)
        (weights.flatten().square().sum() + colors.sin().sum()).backward()
        found.append([given.grad for given in inputs])
    share = torch.tensor([min(float(t) / 1.5, 1.0) ** 2 for t in t_middle.flatten()], dtype=torch.float64)
    torch.testing.assert_close(found[1][0], found[0][0] * share)
    torch.testing.assert_close(found[1][1], found[0][1] * share[:, None])
    assert 0 < int((share < 1).sum()) < 12


@pytest.mark.parametrize("maker", MODELS)
def test_a_picture_stays_and_what_is_near_learns_less(maker: Maker) -> None:
    pictures, norms = [], []
    for reach in (0.0, 10.0):
        model = maker(gradient_scaling=reach)
        render = model.render(rays_of([0]), DONE, GREEN, torch.Generator().manual_seed(1))
        pictures.append(render.rgb)
        render.rgb.square().sum().backward()
        grads = [p.grad for p in model.parameter_groups()["networks"] if p.grad is not None]
        norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads)))
    assert torch.equal(*pictures)
    assert 0.0 < norms[1] < 0.9 * norms[0]


def test_reach_is_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.gradient_scaling: must lie in 0\.\.10, got -1"):
        MipNeRF360Config(gradient_scaling=-1.0)


def test_last_steps_by_hand() -> None:
    """Two intervals at 1 and 4 units of 2, a quarter and half of the light: 2^(1/3) 8^(2/3) away."""
    model = make(config(unit=2.0))
    proposed = (RayHistogram(torch.tensor([[0.0, 1.0]]), torch.ones(1, 1)),)
    shading = Shading(
        *(proposed, torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[1.0, 4.0]]), torch.zeros(2, 3)),
        *(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5]])),
        *(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([0.75])),
    )
    rays = rays_of([0])[:1]
    render = model.composite(rays, shading, DONE, torch.ones(3), Budget(torch.tensor(0), 9, 9))
    torch.testing.assert_close(render.rgb, torch.tensor([[0.35, 0.45, 0.55]]))
    torch.testing.assert_close(render.depth, torch.tensor([0.75 * 2 ** (1 / 3) * 8 ** (2 / 3)]))
    torch.testing.assert_close(render.normal, torch.tensor([[0.5, 0.0, 0.25]]))
    assert render.is_served is not None
    assert render.is_sample is not None
    assert (render.is_served.tolist(), render.is_sample.tolist()) == ([False], [False, False])
    assert int(render.num_marched) == 0
    free = model.composite(rays, shading, replace(DONE, learns_from_geometry=True), torch.ones(3), None)
    # 6 and 7 of the proposals, and 2.
    assert free.num_marched == 15
    assert [len(h.weights[0]) for h in free.histograms] == [1, 2]
    assert torch.equal(free.weights, torch.tensor([0.25, 0.5]))
