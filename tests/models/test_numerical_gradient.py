"""Gradients from differences: known fields, the reference's differences, the step, derivatives, padding."""

import math

import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, needs_triton
from torch import Tensor

from encoder import HashGridConfig
from encoder.hashgrid import GridGeometry
from models.backends import Backends
from models.fields import SOFTPLUS_BETA, SDFConfig, SDFField
from models.numerical_gradient import TAPS, numerical_derivatives, tap_distance
from models.sdf_network import reference

GRID = HashGridConfig(num_levels=4, log2_table_size=9, base_resolution=4, max_resolution=32)
GEOMETRY = GridGeometry.from_config(GRID, bound=1.0)
TETRAHEDRON = [(1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)]
AXES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)]


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def field_of(backend: str, taps: int = 4, layers: int = 1) -> SDFField:
    """A field that is nothing like a sphere."""
    torch.manual_seed(3)
    config = SDFConfig(GRID, 8, layers, feature_width=3, gradient="numerical", taps=taps)
    field = SDFField(config, Backends.all(backend))
    with torch.no_grad():
        field.grid.table.uniform_(-0.1, 0.1)
        for weight in field.weights:
            weight.add_(0.2 * torch.randn_like(weight))
    return field.to(DEVICE if backend == "cuda" else "cpu")


def exact_sdf(field: SDFField, positions: Tensor, levels: float) -> Tensor:
    """The reference's, in float64."""
    parameters = [[p.detach().cpu().double() for p in group] for group in (field.weights, field.biases)]
    table = field.grid.table.detach().cpu().double()
    return reference.sdf_only(positions.double(), table, GEOMETRY, levels, *parameters, SOFTPLUS_BETA)


@pytest.mark.parametrize("taps", [4, 6])
def test_a_known_field(taps: int) -> None:
    """f = x^T A x / 2 + b x: gradient A x + b, Laplacian trace A; four taps leave a share of A eps."""
    matrix = torch.tensor([[2.0, 0.5, -1.0], [0.5, -3.0, 0.25], [-1.0, 0.25, 4.0]], dtype=torch.float64)
    slope = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    positions = torch.rand(7, 3, dtype=torch.float64) * 2 - 1

    def values(at: Tensor) -> Tensor:
        return 0.5 * (at @ matrix * at).sum(dim=1) + at @ slope

    directions = TAPS[taps].double()
    for distance in (0.1, 0.01):
        gradient, laplacian = numerical_derivatives(
            values, positions, values(positions), directions, distance
        )
        torch.testing.assert_close(laplacian, torch.full((7,), 3.0, dtype=torch.float64), rtol=1e-4, atol=0)
        error = (gradient - positions @ matrix - slope).abs().max()
        assert error < (1e-6 if taps == 6 else 1.5 * distance)
        # Where the Hessian is that of a sphere, four taps are exact, too.
        round_field = lambda at: at.square().sum(dim=1)  # noqa: E731
        gradient, _ = numerical_derivatives(
            round_field, positions, round_field(positions), directions, distance
        )
        torch.testing.assert_close(gradient, 2 * positions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("taps", [4, 6])
def test_mean_curvature_of_a_sphere(taps: int) -> None:
    """|x| - 1/2 has the Laplacian 2 / |x|, and an error of the order of eps^2."""
    positions = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1) * 0.5

    def values(at: Tensor) -> Tensor:
        return at.norm(dim=1) - 0.5

    gradient, laplacian = numerical_derivatives(
        values, positions, values(positions), TAPS[taps].double(), 0.01
    )
    torch.testing.assert_close(laplacian, torch.full((20,), 4.0, dtype=torch.float64), rtol=0.03, atol=0)
    torch.testing.assert_close(gradient, positions / 0.5, rtol=0, atol=0.02 if taps == 4 else 1e-3)


@pytest.mark.parametrize(("taps", "vectors"), [(4, TETRAHEDRON), (6, AXES)])
@pytest.mark.parametrize("levels", [2.0, 3.4])
def test_differences_of_the_reference(
    backend: str, taps: int, vectors: list[tuple[int, ...]], levels: float
) -> None:
    """Neuralangelo's own formulas, tap by tap: k f / (4 eps'), (sum f / 2 - 2 f) / eps'^2 for four taps."""
    field = field_of(backend, taps)
    positions = torch.rand(9, 3) * 1.6 - 0.8
    outputs, gradient, laplacian = field.with_laplacian(positions.to(field.tap_directions.device), levels)
    assert laplacian is not None
    growth = 8 ** (1 / 3)
    step = 2 / (4 * growth ** (levels - 1))
    center = exact_sdf(field, positions, levels)
    if taps == 4:
        short = step / 3**0.5
        around = [exact_sdf(field, positions.double() + short * torch.tensor(k), levels) for k in vectors]
        slope = sum(f[:, None] * torch.tensor(k) for f, k in zip(around, vectors, strict=True)) / (4 * short)
        trace = (torch.stack(around).sum(dim=0) / 2 - 2 * center) / short**2
    else:
        around = [exact_sdf(field, positions.double() + step * torch.tensor(k), levels) for k in vectors]
        slope = torch.stack([(around[d] - around[d + 3]) / (2 * step) for d in range(3)], dim=1)
        trace = (torch.stack(around).sum(dim=0) - 6 * center) / step**2
    torch.testing.assert_close(outputs[:, 0].cpu().double(), center, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(laplacian.cpu().double(), trace, rtol=1e-3, atol=6e-6 / step**2)


@pytest.mark.parametrize("taps", [4, 6])
def test_the_limit_is_the_analytic_gradient(taps: int) -> None:
    """Within cells: at eps = 1e-5 in float64 nothing but rounding and eps H is left."""
    field = field_of("reference", taps).double()
    positions = torch.rand(400, 3, dtype=torch.float64) * 1.8 - 0.9
    cells = torch.from_numpy(GEOMETRY.cells)[:, None, None]
    fraction = ((positions + 1) / 2 * cells).frac()
    positions = positions[((fraction > 0.01) & (fraction < 0.99)).all(dim=2).all(dim=0)]
    assert len(positions) > 100
    _, analytic = reference.sdf_with_gradient(
        *(positions, field.grid.table, GEOMETRY, 4.0, list(field.weights), list(field.biases), SOFTPLUS_BETA)
    )
    numerical, _ = numerical_derivatives(
        lambda at: exact_sdf(field, at, 4.0),
        positions,
        exact_sdf(field, positions, 4.0),
        TAPS[taps].double(),
        1e-5,
    )
    torch.testing.assert_close(numerical, analytic, rtol=1e-2, atol=2e-3)


def test_tap_distance_by_hand() -> None:
    grid = GridGeometry.from_config(HashGridConfig(3, 2, 10, 16, 64), bound=1.0)
    expected = {0.0: 1 / 8, 1.0: 1 / 8, 2.0: 1 / 16, 2.5: 2**-4.5, 3.0: 1 / 32, 7.0: 1 / 32}
    for levels, distance in expected.items():
        assert tap_distance(grid, levels) == pytest.approx(distance, rel=1e-6)
        on_device = tap_distance(grid, torch.tensor(levels))
        assert isinstance(on_device, Tensor)
        assert on_device.shape == ()
        assert float(on_device) == pytest.approx(distance, rel=1e-6)
    # The edge of a cell of the finest open level, whatever the growth; resolutions are rounded down.
    for levels in range(1, 5):
        cell = 2.0 / GEOMETRY.cells[levels - 1]
        assert tap_distance(GEOMETRY, float(levels)) == pytest.approx(cell, rel=1.0 / GEOMETRY.cells[0])
    wide = GridGeometry.from_config(GRID, bound=2.0)
    assert tap_distance(wide, 3.0) == pytest.approx(2 * float(tap_distance(GEOMETRY, 3.0)))


def loss_and_gradients(field: SDFField, positions: Tensor, rows: slice, count: Tensor | None) -> list[Tensor]:
    """Derivatives of a function of all three results."""
    draw = torch.Generator().manual_seed(5)
    device, dtype = field.tap_directions.device, field.grid.table.dtype
    results = field.with_laplacian(positions.to(device, dtype), 2.6, count)
    loss = torch.zeros((), dtype=dtype, device=device)
    for result, weight in zip(results, (1.0, 1.0, 0.01), strict=True):
        assert result is not None
        chosen = result[rows]
        factors = torch.randn(chosen.shape, generator=draw).to(device, dtype)
        loss = loss + weight * (chosen * factors).sum()
    return list(torch.autograd.grad(loss, list(field.parameters())))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("taps", [4, 6])
def test_versions_have_the_same_derivatives(backend: str, taps: int, layers: int) -> None:
    field, judge = field_of(backend, taps, layers), field_of("reference", taps, layers).double()
    positions = torch.rand(11, 3) * 1.6 - 0.8
    expected = loss_and_gradients(judge, positions, slice(None), None)
    for actual, wanted in zip(loss_and_gradients(field, positions, slice(None), None), expected, strict=True):
        assert_same_gradient(actual.cpu(), wanted, tolerance=2e-3)


@pytest.mark.parametrize("taps", [4, 6])
def test_derivatives_against_finite_differences(taps: int) -> None:
    """Of the eikonal term and of the Laplacian, along random directions of all parameters."""
    field = field_of("reference", taps).double()
    positions = torch.rand(6, 3, dtype=torch.float64) * 1.6 - 0.8
    parameters = list(field.parameters())

    def loss() -> Tensor:
        outputs, gradient, laplacian = field.with_laplacian(positions, 2.6)
        assert laplacian is not None
        return (gradient.norm(dim=1) - 1).square().sum() + 1e-3 * laplacian.square().sum() + outputs.sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        step, found = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                found.append(float(loss()))
                parameter.sub_(sign * step * direction)
        expected = float((gradient * direction).sum())
        assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_padding_has_no_part(backend: str) -> None:
    field = field_of(backend)
    device = field.tap_directions.device
    positions = torch.rand(9, 3) * 1.6 - 0.8
    alone = loss_and_gradients(field, positions[:6], slice(None), None)
    positions[6:] = float("nan")
    count = torch.tensor(6, device=device)
    results = field.with_laplacian(positions.to(device), 2.6, count)
    assert all(result is not None and not result[6:].any() for result in results)
    for actual, expected in zip(loss_and_gradients(field, positions, slice(6), count), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_nothing_and_outside_of_autograd(backend: str) -> None:
    field = field_of(backend)
    device = field.tap_directions.device
    with torch.no_grad():
        outputs, gradient = field(torch.zeros(0, 3, device=device), 4.0)
        assert (outputs.shape, gradient.shape) == ((0, field.output_width), (0, 3))
        outputs, gradient = field(torch.rand(5, 3, device=device), 4.0)
    assert not outputs.requires_grad
    assert not gradient.requires_grad


def test_taps_are_no_part_of_a_checkpoint() -> None:
    numerical, analytic = field_of("cpu"), SDFField(SDFConfig(GRID, 8, feature_width=3), Backends.all("cpu"))
    analytic.load_state_dict(numerical.state_dict())
    assert analytic.with_laplacian(torch.zeros(2, 3), 4.0)[2] is None


def test_directions_balance() -> None:
    for taps, directions in TAPS.items():
        assert len(directions) == taps
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(taps))
        torch.testing.assert_close(directions.sum(dim=0), torch.zeros(3))
        torch.testing.assert_close(directions.t() @ directions, torch.eye(3) * taps / 3)


def test_other_numbers_of_taps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.sdf\.taps: must be 4 or 6, got 5"):
        SDFConfig(taps=5)
    assert math.isclose(float(TAPS[4][0, 0]), 3**-0.5, rel_tol=1e-6)
