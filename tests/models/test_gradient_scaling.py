"""Gradients that get fainter near the camera: closed form, values untouched, memory bounded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_neus import DONE, GREEN, random_rays, small_config, three_views
from torch import Tensor

from models.backends import Backends
from models.gradient_scaling import scale_gradients
from models.neus import NeuS


def samples(count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    alpha = torch.rand(count, dtype=torch.float64, requires_grad=True)
    rgb = torch.rand(count, 3, dtype=torch.float64, requires_grad=True)
    return alpha, rgb, torch.linspace(0.0, 3.0, count, dtype=torch.float64)


def test_gradients_are_the_closed_form_and_values_stay() -> None:
    alpha, rgb, distances = samples()
    shown_alpha, shown_rgb = scale_gradients(alpha, rgb, distances, 1.5)
    assert torch.equal(shown_alpha, alpha)
    assert torch.equal(shown_rgb, rgb)
    (shown_alpha.square().sum() + shown_rgb.sin().sum()).backward()
    share = torch.tensor([min((float(t) / 1.5) ** 2, 1.0) for t in distances], dtype=torch.float64)
    torch.testing.assert_close(alpha.grad, 2 * alpha.detach() * share)
    torch.testing.assert_close(rgb.grad, rgb.detach().cos() * share[:, None])
    by_hand = torch.zeros(3, requires_grad=True)
    scaled, _ = scale_gradients(by_hand, torch.zeros(3, 3), torch.tensor([0.0, 0.5, 2.0]), 1.0)
    scaled.sum().backward()
    assert by_hand.grad is not None
    assert by_hand.grad.tolist() == [0.0, 0.25, 1.0]


def test_nothing_is_kept_but_the_distances() -> None:
    alpha, rgb, distances = samples()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shown = scale_gradients(alpha, rgb, distances, 1.0)
    assert [tensor.data_ptr() for tensor in kept] == [distances.data_ptr()]
    assert [tensor.data_ptr() for tensor in shown] == [alpha.data_ptr(), rgb.data_ptr()]


@pytest.mark.parametrize("background", [False, True], ids=["plain", "background"])
def test_a_picture_stays_and_what_is_near_learns_less(background: bool) -> None:
    torch.manual_seed(0)
    rays = random_rays(40)
    gradients: list[dict[str, Any]] = []
    pictures = []
    for reach in (0.0, 10.0):
        torch.manual_seed(1)
        config = replace(small_config(background=background), gradient_scaling=reach)
        model = NeuS(config, three_views(), Backends.all("cpu"))
        render = model.render(rays, DONE, GREEN)
        pictures.append(render.rgb)
        render.rgb.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*pictures)
    off, on = gradients
    assert off.keys() == on.keys()
    # The surface is between 2 and 4 from the cameras: of 10 that is a share between 0.04 and 0.16.
    table = "sdf_field.grid.table"
    assert 0.03 < float(on[table].norm() / off[table].norm()) < 0.2
    if background:
        last = "background.density_field.color_network.2.bias"
        assert 0.05 < float(on[last].norm() / off[last].norm()) < 0.999


def test_the_eikonal_term_is_not_scaled() -> None:
    """It keeps the field a distance everywhere, whatever the cameras see."""
    found = []
    for reach in (0.0, 10.0):
        torch.manual_seed(1)
        model = NeuS(replace(small_config(), gradient_scaling=reach), three_views(), Backends.all("cpu"))
        torch.manual_seed(0)
        render = model.render(random_rays(20), DONE, GREEN)
        (render.gradient.norm(dim=1) - 1).square().sum().backward()
        found.append(model.sdf_field.grid.table.grad)
    assert torch.equal(*found)


def test_reach_is_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.gradient_scaling: must lie in 0\.\.10, got -1"):
        replace(small_config(), gradient_scaling=-1.0)
