"""What each training image has for itself: light as the colour networks see it, and exposure."""

import math
from dataclasses import replace

import pytest
import torch
from test_neus import DONE, GREEN, random_rays, small_config, three_views
from torch import Tensor

from models.appearance import AppearanceConfig, Exposure, ImageEmbedding
from models.backends import Backends
from models.neus import NeuS
from models.per_image import row_of_view, rows_of
from utils.types import Rays, Scene

CPU = Backends.all("cpu")
EMBEDDING, EXPOSURE = AppearanceConfig("embedding", 4), AppearanceConfig("exposure")


def scene_with_held_out_view() -> Scene:
    return replace(three_views(), train_indices=(0, 2), test_indices=(1,))


def model_with(appearance: AppearanceConfig, head: str = "view", background: bool = False) -> NeuS:
    torch.manual_seed(3)
    config = small_config(background=background)
    config = replace(config, appearance=appearance, radiance=replace(config.radiance, head=head))
    return NeuS(config, scene_with_held_out_view(), CPU)


def rays_of(views: list[int]) -> Rays:
    """The same rays of each of these views."""
    torch.manual_seed(5)
    rays = random_rays(12)
    count = len(views)
    return Rays(
        *(rays.origins.repeat(count, 1), rays.directions.repeat(count, 1)),
        *(rays.near.repeat(count), rays.far.repeat(count)),
        torch.tensor(views).repeat_interleave(12),
    )


def colors_of(model: NeuS, views: list[int]) -> list[Tensor]:
    """What the model shows along the same rays as each of these views."""
    return list(model.render(rays_of(views), DONE, GREEN).rgb.split(12))


def test_rows_by_hand() -> None:
    rows = row_of_view(scene_with_held_out_view())
    assert rows.tolist() == [0, 2, 1, 2]
    table = torch.tensor([[1.0], [3.0]])
    chosen = rows_of(table, torch.tensor([7.0]), rows, torch.tensor([2, 1, -1, 0, 2]))
    assert chosen[:, 0].tolist() == [3.0, 7.0, 7.0, 1.0, 3.0]


def test_vectors_start_small_and_their_mean_serves_unknown_views() -> None:
    embedding = ImageEmbedding(64, scene_with_held_out_view())
    assert 0.0 < float(embedding.per_image.detach().abs().max()) < 0.1
    vectors = embedding(torch.tensor([0, 2, 1, -1]))
    assert torch.equal(vectors[:2], embedding.per_image)
    mean = embedding.per_image.mean(dim=0)
    assert torch.equal(vectors[2], mean)
    assert torch.equal(vectors[3], mean)
    assert torch.equal(embedding.mean(2), torch.stack([mean, mean]))


def test_exposure_by_hand() -> None:
    exposure = Exposure(scene_with_held_out_view())
    with torch.no_grad():
        exposure.per_image[0, 0], exposure.per_image[1, 0] = math.log(4.0), 0.0
        exposure.per_image[0, 4] = 0.2
    rgb = torch.full((4, 3), 0.25)
    shown = exposure(rgb, torch.tensor([0, 2, 1, -1]))
    # Gains of 2 and 1/2 in red and offsets of 0.1 and -0.1 in green: their means are 1 and 0.
    expected = [[0.5, 0.35, 0.25], [0.125, 0.15, 0.25], [0.25] * 3, [0.25] * 3]
    torch.testing.assert_close(shown, torch.tensor(expected))
    assert torch.equal(shown[2:], rgb[2:])
    half = exposure(rgb, torch.tensor([0, 2, 1, -1]), torch.full((4,), 0.5))
    torch.testing.assert_close(half[0], torch.tensor([0.5, 0.3, 0.25]))


def test_exposure_stays_the_identity_on_average_whatever_is_learned() -> None:
    exposure = Exposure(three_views())
    target = torch.rand(3, 3)
    optimizer = torch.optim.Adam(exposure.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (exposure(torch.full((3, 3), 0.4), torch.arange(3)) - target).square().sum().backward()
        optimizer.step()
    ones, zeros = torch.ones(3, 3), torch.zeros(3, 3)
    offset = exposure(zeros, torch.arange(3))
    gain = exposure(ones, torch.arange(3)) - offset
    assert float(offset.detach().abs().max()) > 0.05
    torch.testing.assert_close(gain.log().mean(dim=0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(offset.mean(dim=0), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("background", [False, True], ids=["plain", "background"])
@pytest.mark.parametrize("head", ["view", "reflection"])
def test_images_differ_in_color_alone(head: str, background: bool) -> None:
    model = model_with(EMBEDDING, head, background)
    with torch.no_grad():
        model.embedding.per_image[1] += 3.0
    first, held_out, third, unknown = colors_of(model, [0, 1, 2, -1])
    assert float((first - third).detach().abs().max()) > 0.01
    torch.testing.assert_close(held_out, unknown, atol=1e-6, rtol=0)
    render = model.render(rays_of([0, 2]), DONE, GREEN)
    for name in ("opacity", "depth", "normal"):
        ours, theirs = getattr(render, name).split(12)
        assert torch.equal(ours, theirs)
    # Where nothing but a plain colour is seen, no image has its own.
    misses = render.opacity[:12] == 0
    assert bool(misses.any())
    assert torch.equal(first[misses], third[misses]) != background


def test_exposure_leaves_a_known_background_alone_and_changes_a_learned_one() -> None:
    rays = rays_of([0])
    for background in (False, True):
        model = model_with(EXPOSURE, background=background)
        plain = model.render(rays, DONE, GREEN)
        with torch.no_grad():
            model.exposure.per_image[0] = torch.tensor([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])
        shown = model.render(rays, DONE, GREEN)
        # Half of the logarithm and of the offset: the other image has the opposite.
        own = plain.rgb if background else plain.rgb - (1 - plain.opacity[:, None]) * GREEN
        opacity = torch.ones(12, 1) if background else plain.opacity[:, None]
        expected = math.exp(0.5) * own + 0.1 * opacity
        if not background:
            expected = expected + (1 - opacity) * GREEN
        torch.testing.assert_close(shown.rgb, expected)


def test_colors_of_the_mesh_are_those_of_the_mean() -> None:
    model = model_with(EMBEDDING)
    with torch.no_grad():
        model.embedding.per_image[0] += 2.0
    positions = torch.nn.functional.normalize(torch.randn(30, 3), dim=1) * 0.5
    asked = model.query_color(positions, -2 * positions, DONE)
    outputs, gradient = model.sdf_field(positions, 3.0)
    normal = torch.nn.functional.normalize(gradient, dim=1)
    vectors = model.embedding(torch.full((30,), -1))
    rows = torch.arange(30)
    expected = model.radiance(outputs, -2 * positions, rows, normal, None, vectors)
    torch.testing.assert_close(asked, expected)


@pytest.mark.parametrize("appearance", [EMBEDDING, EXPOSURE], ids=["embedding", "exposure"])
def test_gradients_reach_each_image_of_the_batch(appearance: AppearanceConfig) -> None:
    model = model_with(appearance)
    rgb = model.render(rays_of([2]), DONE, GREEN).rgb
    (rgb * torch.linspace(0.5, 1.5, 36).view(12, 3)).sum().backward()
    (table,) = (p for name, p in model.named_parameters() if name.endswith("per_image"))
    assert table.grad is not None
    assert bool((table.grad[1].abs() > 0).all())
    networks = model.parameter_groups()["networks"]
    assert any(parameter is table for parameter in networks)
    grouped = [parameter for group in model.parameter_groups().values() for parameter in group]
    assert len(grouped) == len(list(model.parameters()))


def test_exposure_agrees_with_finite_differences() -> None:
    exposure = Exposure(three_views()).double()
    rgb = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    opacity = torch.rand(5, dtype=torch.float64, requires_grad=True)
    views = torch.tensor([0, 1, 2, 1, -1])

    def shown(rgb: Tensor, opacity: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(exposure, {"per_image": table}, (rgb, views, opacity), strict=False)

    table = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shown, (rgb, opacity, table))


def test_off_there_is_nothing() -> None:
    model = model_with(AppearanceConfig())
    assert model.embedding is None
    assert model.exposure is None
    assert not any("per_image" in name or "row_of_view" in name for name in model.state_dict())
    first, second = colors_of(model, [0, 2])
    assert torch.equal(first, second)


def test_width_is_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.appearance\.width: must lie in 1\.\.64, got 0"):
        AppearanceConfig("embedding", 0)
