"""Proposal sampling: geometry by hand, learning to find a shell, padding, backends and gradients."""

import dataclasses

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from torch import Tensor

from models.backends import Backends
from models.proposal import (
    ProposalConfig,
    ProposalSampler,
    RayIntervals,
    composite_weights,
    ray_intervals,
)
from systems.histogram_losses import interlevel
from utils.types import RayHistogram, Rays

TINY = ProposalConfig(
    (12, 10), (8, 16), num_levels=2, log2_table_size=8, base_resolution=4, hidden_width=8, precision="float32"
)


def make_sampler(
    num_samples: int = 8, backend: str = "cpu", contraction: str | None = "l2", ends: bool = True
) -> ProposalSampler:
    return ProposalSampler(
        TINY,
        num_samples,
        spacing="piecewise",
        contraction=contraction,  # type: ignore[arg-type]
        bound=2.0,
        ends=ends,
        backends=Backends.all(backend),
    )


def rays_towards_the_centre(num: int = 20) -> Rays:
    """From random places at a distance of 3, to random points near the centre."""
    origins = 3.0 * torch.nn.functional.normalize(torch.randn(num, 3), dim=1)
    directions = torch.nn.functional.normalize(0.3 * torch.rand(num, 3) - origins, dim=1)
    blank = torch.zeros(num)
    return Rays(origins, directions, blank, blank, torch.zeros(num, dtype=torch.int64))


def stretch(rays: Rays, near: float = 0.05, far: float = 1e3) -> tuple[Tensor, Tensor]:
    return torch.full_like(rays.near, near), torch.full_like(rays.near, far)


def test_intervals_by_hand() -> None:
    rays = Rays(
        torch.tensor([[0.0, 0.0, -3.0]]),
        torch.tensor([[0.0, 0.0, 1.0]]),
        *(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    )
    # With near 0 and far infinity s is g: 1/3 is 2/3 from the camera, 5/6 is 3, 15/16 is 8 from it.
    s = torch.tensor([[1 / 3, 5 / 6, 15 / 16]])
    made = ray_intervals(rays, s, torch.zeros(1), torch.tensor([1e6]), "piecewise", "l2")
    torch.testing.assert_close(made.t, torch.tensor([[2 / 3, 3.0, 8.0]]), atol=1e-4, rtol=1e-4)
    # Middles at 11/6 (7/6 in front of the centre) and 5.5 (2.5 behind it), which are contracted.
    expected = torch.tensor([[0.0, 0.0, -(2 - 6 / 7)], [0.0, 0.0, 1.6]])
    torch.testing.assert_close(made.positions, expected, atol=1e-4, rtol=1e-4)
    # From -7/3, contracted to -(2 - 3/7), to the centre, to 5, contracted to 1.8.
    torch.testing.assert_close(made.lengths, torch.tensor([[2 - 3 / 7, 1.8]]), atol=1e-4, rtol=1e-4)
    plain = ray_intervals(rays, s, torch.zeros(1), torch.tensor([1e6]), "piecewise", None)
    torch.testing.assert_close(plain.lengths, torch.tensor([[7 / 3, 5.0]]), atol=1e-4, rtol=1e-4)


def test_weights_by_hand() -> None:
    density = torch.tensor([1.0, 2.0, 0.5, 0.0, 4.0, 0.0])
    lengths = torch.tensor([[0.5, 0.25, 1.0], [1.0, 1.0, 1.0]])
    passed = torch.exp(-torch.tensor([[0.0, 0.5, 1.0, 1.5], [0.0, 0.0, 4.0, 4.0]]))
    expected = passed[:, :-1] - passed[:, 1:]
    weights = composite_weights(density, lengths, False, "reference")
    torch.testing.assert_close(weights, expected)
    expected[:, 2] = passed[:, 2]
    weights = composite_weights(density, lengths, True, "reference")
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("seed", [None, 0])
def test_shapes_order_and_range(seed: int | None) -> None:
    rays = rays_towards_the_centre()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    near, far = stretch(rays)
    intervals, histograms = make_sampler()(rays, near, far, 0.5, generator)
    assert [tuple(h.weights.shape) for h in histograms] == [(20, 12), (20, 10)]
    assert intervals.s.shape == intervals.t.shape == (20, 9)
    assert intervals.positions.shape == (160, 3)
    for edges in (intervals.s, *(h.edges for h in histograms)):
        assert (edges.diff(dim=1) >= 0).all()
        assert ((edges >= 0) & (edges <= 1)).all()
    assert ((intervals.t >= 0.05) & (intervals.t <= 1e3)).all()
    assert (intervals.positions.norm(dim=1) <= 2.0 + 1e-5).all()
    for histogram in histograms:
        torch.testing.assert_close(histogram.weights.sum(dim=1), torch.ones(20))
    assert not intervals.s.requires_grad


def test_first_intervals_are_even() -> None:
    rays = rays_towards_the_centre()
    _, histograms = make_sampler()(rays, *stretch(rays), 1.0, None)
    torch.testing.assert_close(histograms[0].edges[0], torch.linspace(0, 1, 13), atol=1e-6, rtol=0)


def test_at_exponent_zero_the_weights_have_no_say() -> None:
    rays = rays_towards_the_centre()
    intervals, _ = make_sampler()(rays, *stretch(rays), 0.0, None)
    torch.testing.assert_close(intervals.s[0], torch.linspace(0, 1, 9), atol=1e-5, rtol=0)


def test_rays_learn_from_the_final_samples_alone() -> None:
    rays = rays_towards_the_centre()
    origins = rays.origins.requires_grad_()
    rays = dataclasses.replace(rays, origins=origins)
    intervals, histograms = make_sampler()(rays, *stretch(rays), 1.0, None)
    torch.stack([h.weights.square().sum() for h in histograms]).sum().backward()
    assert origins.grad is None
    intervals.positions.square().sum().backward()
    assert origins.grad is not None
    assert origins.grad.all()


def ball_weights(intervals: RayIntervals) -> Tensor:
    """Weights of a dense ball of radius 0.5."""
    density = torch.where(intervals.positions.norm(dim=1) < 0.5, 30.0, 0.0)
    return composite_weights(density, intervals.lengths, True, "reference")


def test_proposals_learn_where_a_ball_is() -> None:
    sampler = make_sampler(num_samples=16)
    optimizer = torch.optim.Adam(sampler.parameters(), 2e-2, eps=1e-15)
    generator = torch.Generator().manual_seed(0)

    def share_near_front() -> float:
        """Of the samples, those from 0.2 in front of the ball to 0.1 within it, where all light ends."""
        rays = rays_towards_the_centre(64)
        intervals, _ = sampler(rays, *stretch(rays, 1.0, 6.0), 1.0, None)
        radius = intervals.positions.norm(dim=1).view(64, 16)
        is_front = (radius > 0.4) & (radius < 0.7) & (intervals.t_middle < 3.0)
        return float(is_front.float().mean())

    before = share_near_front()
    for step in range(80):
        rays = rays_towards_the_centre(64)
        intervals, histograms = sampler(rays, *stretch(rays, 1.0, 6.0), min(step / 20, 1.0), generator)
        inner = RayHistogram(intervals.s, ball_weights(intervals))
        loss = torch.stack([interlevel(outer, inner) for outer in histograms]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = share_near_front()
    assert before < 0.15
    assert after > 0.6


def test_gradients_reach_everything() -> None:
    sampler = make_sampler()
    with torch.no_grad():
        for parameter in sampler.parameters():
            if parameter.dim() == 2:
                parameter.uniform_(-1, 1)
    rays = rays_towards_the_centre(200)
    _, histograms = sampler(rays, *stretch(rays), 1.0, torch.Generator().manual_seed(0))
    torch.stack([(h.weights * torch.randn_like(h.weights)).sum() for h in histograms]).sum().backward()
    for name, parameter in sampler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def seen(
    sampler: ProposalSampler, rays: Rays, num_rays: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Final edges, and the derivatives of a function of the real rays' proposals in all parameters."""
    intervals, histograms = sampler(rays, *stretch(rays), 0.7, None, num_rays)
    count = len(rays) if num_rays is None else num_rays
    is_real = torch.arange(len(rays), device=rays.near.device) < count
    target = torch.ones_like(intervals.lengths)
    inner = RayHistogram(intervals.s, target)
    loss = torch.stack([interlevel(outer, inner, is_real) for outer in histograms]).sum() * is_real.sum()
    names, parameters = zip(*sampler.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return intervals.t.cpu(), {n: g.cpu() for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("num_rays", [None, 7, 0])
@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("cuda", marks=needs_triton)])
def test_versions_agree(backend: str, num_rays: int | None) -> None:
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    fast, slow = make_sampler(backend=backend), make_sampler(backend="reference")
    with torch.no_grad():
        for field in fast.fields:
            field.grid.table.uniform_(-0.5, 0.5)  # type: ignore[union-attr, operator]
    slow.load_state_dict(fast.state_dict())
    rays = rays_towards_the_centre(10)
    if num_rays is not None:
        # What padding holds must not matter.
        rays.origins[num_rays:] = float("nan")
    real = None if num_rays is None else torch.tensor(num_rays, device=device)
    edges, gradients = seen(fast.to(device), rays.to(device), real)
    expected, expected_gradients = seen(slow, rays[:num_rays])
    torch.testing.assert_close(edges[:num_rays], expected, atol=1e-4, rtol=1e-3)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)


def test_an_empty_stretch_gives_finite_results() -> None:
    rays = rays_towards_the_centre(3)
    intervals, histograms = make_sampler()(rays, torch.ones(3), torch.zeros(3), 1.0, None)
    assert intervals.positions.isfinite().all()
    assert all(h.weights.isfinite().all() for h in histograms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": ()}, r"^proposal\.num_samples: must be one number per proposal"),
        ({"num_samples": (64, 1)}, r"^proposal\.num_samples: .*at least 2"),
        ({"num_samples": (64,)}, r"^proposal\.max_resolutions: must be as many"),
        ({"hidden_width": 0}, r"^proposal\.hidden_width"),
        ({"padding": -0.1}, r"^proposal\.padding"),
        (
            {"max_resolutions": (64, 8)},
            r"^proposal\.max_resolutions: must not be below base_resolution 16, got 8",
        ),
        ({"num_levels": 0}, r"^proposal\.num_levels: must be between 1 and 32, got 0"),
    ],
)
def test_config_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProposalConfig(**change)  # type: ignore[arg-type]
