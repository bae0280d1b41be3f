"""Loss terms: values by hand, finite gradients where they bite, and zeros with a gradient for empty input."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from systems import losses

Keep = Tensor | None


def sloped(x: Tensor, keep: Keep = None) -> Tensor:
    """Curvature of gradients that are x here and x squared there, along y."""
    along_y = torch.zeros_like(x).index_fill(1, torch.tensor([1]), 1.0)
    return losses.curvature(x, x.square() + 1.0, along_y, 0.5, keep)


def quarter(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.25)


TERMS: dict[str, Callable[[Tensor, Keep], Tensor]] = {
    "rgb_l1": lambda x, keep: losses.rgb_l1(x, quarter(x), keep),
    "rgb_l2": lambda x, keep: losses.rgb_l2(x, quarter(x), keep),
    "rgb_charbonnier": lambda x, keep: losses.rgb_charbonnier(x, quarter(x), keep),
    "eikonal": losses.eikonal,
    "mask_bce": lambda x, keep: losses.mask_bce(x[:, 0], torch.ones_like(x[:, 0]), keep),
    "mask_iou": lambda x, keep: losses.mask_iou(x[:, 0], quarter(x[:, 0]), keep),
    "opacity_entropy": lambda x, keep: losses.opacity_entropy(x[:, 0], keep),
    "sparsity": lambda x, keep: losses.sparsity(x[:, 0], 20.0, keep),
    "depth_l1": lambda x, keep: losses.depth_l1(x[:, 0], quarter(x[:, 0]), keep),
    "normal_prior": lambda x, keep: losses.normal_prior(x, quarter(x), keep),
    "curvature": sloped,
    "depth_prior": lambda x, keep: losses.depth_prior(
        x.flatten(), x.detach().flatten().cos().cumsum(0), torch.arange(x.numel()) % 2, flat(x, keep)
    ),
    "sparse_points": lambda x, _: losses.sparse_points(x[:, 0]),
    "free_space": lambda x, keep: losses.free_space(x[:, 0], keep),
    "laplacian": lambda x, keep: losses.laplacian(
        losses.second_differences(x[:, 0], x.repeat(1, 2).square(), 0.5), keep
    ),
}


def flat(x: Tensor, keep: Keep) -> Keep:
    """One entry for each number of x."""
    return None if keep is None else keep[:, None].expand(x.shape).flatten()


def test_colour_terms_by_hand() -> None:
    rgb = torch.tensor([[0.5, 0.0, 1.0], [0.2, 0.2, 0.2]])
    target = torch.tensor([[0.0, 0.0, 0.6], [0.2, 0.2, 0.5]])
    assert float(losses.rgb_l1(rgb, target)) == pytest.approx((0.5 + 0.4 + 0.3) / 6)
    assert float(losses.rgb_l2(rgb, target)) == pytest.approx((0.25 + 0.16 + 0.09) / 6)
    by_hand = sum(math.sqrt(r * r + 1e-6) for r in (0.5, 0, 0.4, 0, 0, 0.3)) / 6
    assert float(losses.rgb_charbonnier(rgb, target)) == pytest.approx(by_hand)
    assert float(losses.rgb_charbonnier(rgb, rgb)) == pytest.approx(1e-3)


def test_eikonal_by_hand() -> None:
    gradient = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -0.5]])
    assert float(losses.eikonal(gradient)) == pytest.approx((16.0 + 0.0 + 1.0 + 0.25) / 4, rel=1e-5)


def test_mask_bce_by_hand() -> None:
    opacity, mask = torch.tensor([0.8, 0.3, 0.5]), torch.tensor([1.0, 0.0, 0.5])
    by_hand = -(math.log(0.8) + math.log(0.7) + math.log(0.5)) / 3
    assert float(losses.mask_bce(opacity, mask)) == pytest.approx(by_hand, rel=1e-5)
    # A ray that is wrong beyond doubt costs -log(0.001), not infinity.
    assert float(losses.mask_bce(torch.zeros(2), torch.ones(2))) == pytest.approx(-math.log(1e-3), rel=1e-4)


def test_opacity_entropy_by_hand() -> None:
    assert float(losses.opacity_entropy(torch.tensor([0.5]))) == pytest.approx(math.log(2), rel=1e-6)
    by_hand = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(losses.opacity_entropy(torch.tensor([0.9, 0.1]))) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.opacity_entropy(torch.tensor([0.0, 1.0]))) < 0.01


def test_sparsity_by_hand() -> None:
    sdf = torch.tensor([0.0, 0.1, -0.1, 10.0])
    assert float(losses.sparsity(sdf, 20.0)) == pytest.approx((1 + 2 * math.exp(-2)) / 4, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_nothing_gives_a_zero_that_can_be_differentiated(name: str) -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    value = TERMS[name](empty, None)
    assert value.shape == ()
    assert float(value.detach()) == 0.0
    value.backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_gradients_stay_finite_at_the_edges(name: str, value: float) -> None:
    x = torch.full((4, 3), value, requires_grad=True)
    loss = TERMS[name](x, None)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_nan_comes_out_as_nan(name: str) -> None:
    """An exception instead (PyTorch's cross entropy raises one) would end a run that can skip the step."""
    x = torch.rand(8, 3)
    x[1] = torch.nan
    assert torch.isnan(TERMS[name](x, None))


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    x = torch.rand(8, 3, dtype=torch.float64) * 0.3 + 0.3
    x.requires_grad_()
    given = x.detach().flatten().cos().cumsum(0)
    views = torch.arange(24) % 2

    def term(rows: Tensor) -> Tensor:
        # What is given must not move with the rows.
        return (
            losses.depth_prior(rows.flatten(), given, views)
            if name == "depth_prior"
            else TERMS[name](rows, None)
        )

    if name in ("mask_bce", "opacity_entropy"):
        assert torch.autograd.gradcheck(term, (x,), atol=1e-6)
        return
    assert torch.autograd.gradcheck(term, (x,), eps=1e-7, atol=1e-5)


def test_a_descent_step_moves_the_right_way() -> None:
    opacity = torch.tensor([0.4, 0.6], requires_grad=True)
    losses.mask_bce(opacity, torch.tensor([1.0, 0.0])).backward()
    assert opacity.grad is not None
    assert opacity.grad[0] < 0 < opacity.grad[1]
    gradient = torch.tensor([[0.5, 0.0, 0.0], [2.0, 0.0, 0.0]], requires_grad=True)
    losses.eikonal(gradient).backward()
    assert gradient.grad is not None
    assert gradient.grad[0, 0] < 0 < gradient.grad[1, 0]


@pytest.mark.parametrize("name", sorted(TERMS.keys() - {"sparse_points", "depth_prior"}))
def test_only_the_rows_to_keep_count(name: str) -> None:
    values = torch.rand(7, 3)
    keep = torch.tensor([True, False, True, True, False, True, False])
    poisoned = torch.where(keep[:, None], values, torch.nan)
    torch.testing.assert_close(TERMS[name](poisoned, keep), TERMS[name](values[keep], None))
    assert float(TERMS[name](values, torch.zeros(7, dtype=torch.bool))) == 0.0


def test_mask_iou_by_hand() -> None:
    opacity, mask = torch.tensor([0.8, 0.3, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    assert float(losses.mask_iou(opacity, mask)) == pytest.approx(1 - 0.8 / (1.0 + 0.3 + 1.0))
    assert float(losses.mask_iou(mask, mask)) == 0.0
    assert float(losses.mask_iou(1 - mask, mask)) == 1.0
    assert float(losses.mask_iou(torch.zeros(4), torch.zeros(4))) == 0.0


def test_points_and_depths_by_hand() -> None:
    assert float(losses.sparse_points(torch.tensor([0.1, -0.3, 0.0]))) == pytest.approx(0.4 / 3)


def test_free_space_counts_what_is_inside() -> None:
    sdf = torch.tensor([0.5, -0.2, -0.4, 0.0, -9.0])
    assert float(losses.free_space(sdf[:4])) == pytest.approx(0.6 / 4)
    assert float(losses.free_space(sdf, torch.tensor([True, True, True, True, False]))) == pytest.approx(0.15)
    depth, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 2.0])
    assert float(losses.depth_l1(depth, target)) == pytest.approx(0.5)


def test_normal_prior_by_hand() -> None:
    normal = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    target = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(losses.normal_prior(normal, target)) == pytest.approx((2 + 2 + 0.4 + 0.8 + 0.4) / 3)


# Depth up to scale and shift


def explained_badly(depth: Tensor, target: Tensor, views: Tensor, keep: Tensor) -> float:
    """The same with one least-squares problem per view, in double precision."""
    error = spread = 0.0
    for view in sorted(set(views.tolist())):
        chosen = keep & (views == view)
        given, rendered = target[chosen].double().numpy(), depth[chosen].detach().double().numpy()
        if len(given) < losses.MIN_RAYS or np.ptp(given) == 0 or np.ptp(rendered) == 0:
            continue
        columns = np.stack([rendered, np.ones_like(rendered)], axis=1)
        solution = np.linalg.lstsq(columns, given, rcond=None)[0]
        error += float(np.square(columns @ solution - given).sum())
        spread += float(np.square(given - given.mean()).sum())
    return error / spread


def test_depth_prior_is_least_squares_per_view() -> None:
    # Views far apart and in no order; one is seen by too few rays, one shows a wall and one is told one.
    views = torch.tensor([90, 3, 41, 7, 12, 5])[torch.randint(6, (200,))]
    views[torch.where(views == 3)[0][5:]] = 90
    depth, keep = torch.rand(200) + 2.0, torch.rand(200) < 0.8
    target = (torch.rand(6) * 9)[views % 6] * depth + torch.randn(200) * 0.3
    depth = torch.where(views == 7, 2.5, depth)
    target = torch.where(views == 12, 4.0, target)
    poisoned = [torch.where(keep, values, torch.nan) for values in (depth, target)]
    found = losses.depth_prior(poisoned[0], poisoned[1], views, keep)
    assert float(found) == pytest.approx(explained_badly(depth, target, views, keep), rel=1e-4)
    everything = torch.ones_like(keep)
    found = losses.depth_prior(depth, target, views)
    assert float(found) == pytest.approx(explained_badly(depth, target, views, everything), rel=1e-4)


def test_depth_prior_does_not_know_the_unit() -> None:
    views = torch.arange(60) % 3
    depth = torch.rand(60, dtype=torch.float64) + 2.0
    scale, shift = torch.tensor([0.5, 300.0, 7.0])[views], torch.tensor([0.0, -9.0, 4.0])[views]
    assert float(losses.depth_prior(depth, scale * depth + shift, views)) < 1e-20
    target = depth + 0.1 * torch.randn(60, dtype=torch.float64)
    share = losses.depth_prior(depth, target, views)
    assert 0 < float(share) < 1
    torch.testing.assert_close(losses.depth_prior(depth, 1000 * target - 3, views), share)
    assert float(losses.depth_prior(torch.rand(60), torch.rand(60), views)) <= 1


@pytest.mark.parametrize("case", ["no rays", "few rays", "a wall", "a wall is given", "nothing kept"])
def test_views_without_a_scale_do_not_count(case: str) -> None:
    count = {"no rays": 0, "few rays": losses.MIN_RAYS - 1}.get(case, 50)
    depth, target = torch.rand(count), torch.rand(count)
    if case == "a wall":
        depth = torch.full((count,), 2.7)
    if case == "a wall is given":
        target = torch.full((count,), 0.3)
    depth.requires_grad_()
    keep = torch.zeros(count, dtype=torch.bool) if case == "nothing kept" else None
    loss = losses.depth_prior(depth, target, torch.zeros(count, dtype=torch.int64), keep)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert depth.grad is not None
    assert not depth.grad.any()


# Curvature


@pytest.mark.parametrize("radius", [0.2, 0.5, 2.0])
def test_curvature_of_a_sphere(radius: float) -> None:
    positions = radius * torch.nn.functional.normalize(torch.randn(500, 3, dtype=torch.float64), dim=1)
    noise, step = torch.randn(500, 3, dtype=torch.float64), 1e-3

    def field(at: Tensor) -> Tensor:
        return torch.nn.functional.normalize(at, dim=1)

    tangent = losses.tangents(3.0 * field(positions), noise)
    torch.testing.assert_close(tangent.norm(dim=1), torch.ones(500, dtype=torch.float64))
    assert (tangent * field(positions)).sum(dim=1).abs().max() < 1e-12
    found = losses.curvature(field(positions), field(positions + step * tangent), tangent, step)
    assert float(found) == pytest.approx(1 / math.hypot(radius, step), rel=1e-9)
    # The Laplacian is the sum over two perpendicular tangents.
    other = torch.linalg.cross(field(positions), tangent)
    second = losses.curvature(field(positions), field(positions + step * other), other, step)
    assert float(found + second) == pytest.approx(2 / radius, rel=1e-4)


def test_curvature_of_a_plane_and_of_a_saddle() -> None:
    flat_gradient = torch.tensor([[0.0, 0.6, 0.8]]).expand(20, 3)
    tangent = losses.tangents(flat_gradient, torch.randn(20, 3))
    assert float(losses.curvature(flat_gradient, flat_gradient, tangent, 0.01)) == 0.0
    # f = z - (x^2 - y^2) / 2 at the origin: the Laplacian is 0, |cos(2 angle)| is 2 / pi on average.
    up = torch.tensor([[0.0, 0.0, 1.0]]).expand(20_000, 3)
    tangent = losses.tangents(up, torch.randn(20_000, 3))
    shifted = up + 0.01 * tangent * torch.tensor([-1.0, 1.0, 0.0])
    found = losses.curvature(up, shifted, tangent, 0.01)
    assert float(found) == pytest.approx(2 / math.pi, abs=0.02)


# Laplacian


def laplacian_of(field: Callable[[Tensor], Tensor], positions: Tensor, step: float) -> float:
    neighbours = losses.axis_neighbours(positions, step)
    return float(losses.laplacian(losses.second_differences(field(positions), field(neighbours), step)))


def test_neighbours_along_the_axes() -> None:
    found = losses.axis_neighbours(torch.tensor([[1.0, 2.0, 3.0]]), 0.5)[0].tolist()
    assert sorted(found) == sorted(
        [[1.5, 2, 3], [0.5, 2, 3], [1, 2.5, 3], [1, 1.5, 3], [1, 2, 3.5], [1, 2, 2.5]]
    )


@pytest.mark.parametrize("radius", [0.2, 0.5, 2.0])
def test_laplacian_of_a_sphere(radius: float) -> None:
    positions = radius * torch.nn.functional.normalize(torch.randn(500, 3, dtype=torch.float64), dim=1)
    found = laplacian_of(lambda at: at.norm(dim=-1) - 0.3, positions, 1e-3)
    assert float(found) == pytest.approx(2 / radius, rel=1e-4)


def test_laplacian_of_quadrics() -> None:
    positions = torch.randn(50, 3, dtype=torch.float64)
    matrix = torch.randn(3, 3, dtype=torch.float64)

    def quadric(at: Tensor) -> Tensor:
        return (at * (at @ matrix)).sum(dim=-1) + at[..., 0] - 2.0

    # Second differences of a quadric are exact whatever the step.
    for step in (1e-2, 0.7):
        assert laplacian_of(quadric, positions, step) == pytest.approx(2 * abs(float(matrix.trace())))
    saddle = laplacian_of(lambda at: at[..., 0] ** 2 - at[..., 1] ** 2 + at[..., 2], positions, 0.1)
    assert saddle < 1e-10
