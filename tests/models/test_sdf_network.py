"""The SDF network: the fast softplus, and values, normals and all parameter gradients against autograd."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import needs_triton
from torch import Tensor

from encoder import HashGridConfig
from encoder.hashgrid import GridGeometry
from models.sdf_network import cpu, reference, sdf_only, sdf_with_gradient

BETA = 100.0
GRID = HashGridConfig(num_levels=3, log2_table_size=9, base_resolution=4, max_resolution=16)
GEOMETRY = GridGeometry.from_config(GRID, bound=1.0)
ENCODING_WIDTH = 3 + 3 * 2


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_network(
    hidden_layers: int, width: int = 16, outputs: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases whose pre-activations are a few 1 / beta wide, where softplus bends."""
    widths = [ENCODING_WIDTH] + [width] * hidden_layers + [outputs]
    weights = [torch.randn(b, a) * math.sqrt(0.2 / a) for a, b in itertools.pairwise(widths)]
    return weights, [torch.randn(b) * 0.02 for b in widths[1:]]


def random_positions(count: int, margin: float = 0.02) -> Tensor:
    """Positions clear of cell borders, where the grid's derivatives jump."""
    positions = torch.rand(20 * count + 20, 3) * 2 - 1
    cells = torch.from_numpy(GEOMETRY.cells)[:, None, None]
    fraction = ((positions.double() + 1) / 2 * cells).frac()
    is_clear = ((fraction > margin) & (fraction < 1 - margin)).all(dim=2).all(dim=0)
    assert int(is_clear.sum()) >= count
    return positions[is_clear][:count]


def random_table() -> Tensor:
    return torch.rand(GEOMETRY.num_entries, 2) * 0.2 - 0.1


def value_and_derivatives(
    positions: Tensor,
    table: Tensor,
    network: tuple[list[Tensor], list[Tensor]],
    active_levels: float,
    backend: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Both results, and the derivatives of a random function of both in the table and in each parameter."""
    draw = torch.Generator().manual_seed(3)
    entries = table.to(dtype).requires_grad_()
    weights, biases = ([p.to(dtype).requires_grad_() for p in group] for group in network)
    outputs, gradient = sdf_with_gradient(
        positions.to(dtype), entries, GEOMETRY, active_levels, weights, biases, BETA, backend
    )
    loss = (outputs * torch.randn(outputs.shape, generator=draw).to(dtype)).sum()
    loss = loss + (gradient * torch.randn(gradient.shape, generator=draw).to(dtype)).sum()
    parameters = {"table": entries}
    parameters |= {f"weight {layer}": weight for layer, weight in enumerate(weights)}
    parameters |= {f"bias {layer}": bias for layer, bias in enumerate(biases)}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    found = {"outputs": outputs.detach(), "gradient": gradient.detach()}
    return found | dict(zip(parameters, gradients, strict=True))


def test_one_unit_by_hand(backend: str) -> None:
    # sdf = 3 softplus(2 x) - 1, the grid plays no part. softplus(0.5) = 0.5 + log(1 + e^-50) / 100.
    width = 3 + 3 * 2
    weights = [torch.zeros(1, width), torch.tensor([[3.0]])]
    weights[0][0, 0] = 2.0
    biases = [torch.zeros(1), torch.tensor([-1.0])]
    positions = torch.tensor([[0.25, 0.1, 0.1], [0.0, 0.1, 0.1], [-0.25, 0.1, 0.1]])
    outputs, gradient = sdf_with_gradient(
        positions, random_table(), GEOMETRY, 3.0, weights, biases, BETA, backend
    )
    torch.testing.assert_close(outputs[:, 0], torch.tensor([0.5, 3 * math.log(2) / 100 - 1, -1.0]))
    expected = torch.tensor([[6.0, 0, 0], [3.0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_gradient_against_finite_differences(backend: str) -> None:
    network = random_network(2)
    positions, table = random_positions(20), random_table()
    _, gradient = sdf_with_gradient(positions, table, GEOMETRY, 3.0, *network, BETA, backend)
    weights, biases = ([p.double() for p in group] for group in network)
    step = 1e-5
    for axis in range(3):
        shift = torch.eye(3, dtype=torch.float64)[axis] * step
        ahead, behind = (
            sdf_only(
                positions.double() + s, table.double(), GEOMETRY, 3.0, weights, biases, BETA, "reference"
            )
            for s in (shift, -shift)
        )
        torch.testing.assert_close(
            gradient[:, axis].double(), (ahead - behind) / (2 * step), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("active_levels", [3.0, 1.5, 0.0])
def test_all_parameter_gradients(backend: str, hidden_layers: int, active_levels: float) -> None:
    # 300 samples: more than one block of every kernel, and a last one that is not full.
    inputs = random_positions(300), random_table(), random_network(hidden_layers), active_levels
    actual = value_and_derivatives(*inputs, backend, torch.float32)
    expected = value_and_derivatives(*inputs, "reference", torch.float64)
    assert actual.keys() == expected.keys()
    for name in expected:
        if name == "table" and active_levels == 0.0:
            assert not actual[name].any()
            continue
        # beta = 100 turns roundings of 1e-7 in a pre-activation into 1e-5 in a slope.
        assert_same_gradient(actual[name], expected[name], tolerance=1e-4)


@pytest.mark.parametrize("hidden_layers", [1, 2])
@pytest.mark.parametrize("active_levels", [3.0, 1.5])
def test_gradients_in_the_positions(backend: str, hidden_layers: int, active_levels: float) -> None:
    """Of both results; what cameras are refined by."""
    positions, table, network = random_positions(300), random_table(), random_network(hidden_layers)
    draw = torch.Generator().manual_seed(3)
    found = []
    for dtype, version in ((torch.float32, backend), (torch.float64, "reference")):
        at = positions.to(dtype).requires_grad_()
        weights, biases = ([p.to(dtype) for p in group] for group in network)
        draw.manual_seed(3)
        outputs, gradient = sdf_with_gradient(
            at, table.to(dtype), GEOMETRY, active_levels, weights, biases, BETA, version
        )
        loss = (outputs * torch.randn(outputs.shape, generator=draw).to(dtype)).sum()
        loss = loss + (gradient * torch.randn(gradient.shape, generator=draw).to(dtype)).sum()
        found += torch.autograd.grad(loss, at)
    assert_same_gradient(*found, tolerance=1e-4)


def test_saturated_units_have_finite_gradients(backend: str) -> None:
    # Pre-activations of +-300 / beta and more: there exp overflows in float32.
    weights, biases = random_network(2)
    weights, biases = [300.0 * weight for weight in weights], [300.0 * bias for bias in biases]
    inputs = random_positions(100), random_table(), (weights, biases), 3.0
    actual = value_and_derivatives(*inputs, backend, torch.float32)
    expected = value_and_derivatives(*inputs, "reference", torch.float64)
    for name in expected:
        assert actual[name].isfinite().all(), name
    # Units whose sign float32 can tell behave as in float64; the few others differ by a whole slope.
    difference = (actual["outputs"].double() - expected["outputs"]).abs().max()
    assert difference < 1e-4 * expected["outputs"].abs().max()


@pytest.mark.parametrize("count", [0, 1])
def test_few_samples(backend: str, count: int) -> None:
    inputs = random_positions(count), random_table(), random_network(2), 3.0
    actual = value_and_derivatives(*inputs, backend, torch.float32)
    expected = value_and_derivatives(*inputs, "reference", torch.float64)
    # Five outputs of the last layer, then the encoding.
    assert actual["outputs"].shape == (count, 5 + ENCODING_WIDTH)
    assert actual["gradient"].shape == (count, 3)
    for name in expected:
        assert_same_gradient(actual[name], expected[name], tolerance=1e-4)


def test_each_result_alone_has_a_gradient(backend: str) -> None:
    weights, biases = ([p.requires_grad_() for p in group] for group in random_network(1))
    table = random_table().requires_grad_()
    for chosen in (0, 1):
        results = sdf_with_gradient(
            random_positions(20), table, GEOMETRY, 3.0, weights, biases, BETA, backend
        )
        found = torch.autograd.grad(results[chosen].sum(), [table, *weights], allow_unused=True)
        assert all(gradient is not None and gradient.any() for gradient in found)


def test_non_contiguous_positions(backend: str) -> None:
    positions, table, network = random_positions(30), random_table(), random_network(1)
    strided = positions.t().contiguous().t()
    assert not strided.is_contiguous()
    plain = sdf_with_gradient(positions, table, GEOMETRY, 3.0, *network, BETA, backend)
    other = sdf_with_gradient(strided, table, GEOMETRY, 3.0, *network, BETA, backend)
    assert torch.equal(plain[0], other[0])
    assert torch.equal(plain[1], other[1])
    alone = sdf_only(strided, table, GEOMETRY, 3.0, *network, BETA, backend)
    torch.testing.assert_close(alone, plain[0][:, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_sdf_only_is_the_first_output(backend: str, hidden_layers: int, count: int) -> None:
    weights, biases = ([p.requires_grad_() for p in group] for group in random_network(hidden_layers))
    positions, table = random_positions(count), random_table().requires_grad_()
    outputs, _ = sdf_with_gradient(positions, table, GEOMETRY, 2.5, weights, biases, BETA, backend)
    sdf = sdf_only(positions, table, GEOMETRY, 2.5, weights, biases, BETA, backend)
    assert not sdf.requires_grad
    torch.testing.assert_close(sdf, outputs[:, 0].detach(), atol=1e-6, rtol=1e-6)


def test_outside_of_autograd(backend: str) -> None:
    network = random_network(1)
    table = random_table().requires_grad_()
    positions = random_positions(10)
    with torch.no_grad():
        outputs, gradient = sdf_with_gradient(positions, table, GEOMETRY, 3.0, *network, BETA, backend)
    assert not outputs.requires_grad
    assert not gradient.requires_grad
    with_grad = sdf_with_gradient(positions, table, GEOMETRY, 3.0, *network, BETA, backend)
    assert torch.equal(gradient, with_grad[1].detach())


def test_reference_has_the_derivatives_of_finite_differences() -> None:
    geometry = GridGeometry.from_config(
        HashGridConfig(
            num_levels=1, features_per_level=1, log2_table_size=5, base_resolution=2, max_resolution=2
        ),
        1.0,
    )
    weights = [torch.randn(2, 4).double().requires_grad_(), torch.randn(2, 2).double().requires_grad_()]
    biases = [torch.randn(2).double().requires_grad_(), torch.randn(2).double().requires_grad_()]
    table = torch.randn(27, 1).double().requires_grad_()
    positions = torch.tensor([[0.3, -0.4, 0.6], [-0.2, 0.7, 0.35]]).double().requires_grad_()

    def function(p: Tensor, t: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return reference.sdf_with_gradient(p, t, geometry, 1.0, parameters[:2], parameters[2:], 3.0)

    torch.autograd.gradcheck(function, (positions, table, *weights, *biases))


def test_fast_softplus_against_double_precision() -> None:
    # Dense where it bends, both sides of the block size, and far into both tails.
    bend = np.linspace(-0.5, 0.5, 20001)
    tails = np.array([0.0, -0.0, 1e-30, -1e-30, 0.88, -0.88, 1.0, -1.0, 50.0, -50.0, 1e4, -1e4, 3e38, -3e38])
    powers = np.concatenate([10.0 ** np.arange(-8, 5, 0.01), -(10.0 ** np.arange(-8, 5, 0.01))])
    z = np.concatenate([bend, tails, powers]).astype(np.float32)
    for beta in (100.0, 1.0):
        hidden, slope = z.copy(), np.empty_like(z)
        cpu._softplus_kernel(hidden, slope, np.float32(beta))
        scaled = beta * z.astype(np.float64)
        expected = np.logaddexp(0.0, scaled) / beta
        # The bounds that the kernel promises, and for large z the spacing of float32.
        assert (np.abs(hidden - expected) <= 2e-7 / beta + 1.2e-7 * np.abs(expected)).all()
        sigmoid = np.exp(-np.logaddexp(0.0, -scaled))
        assert np.abs(slope - sigmoid).max() <= 1e-6
        assert (hidden >= 0).all()
        assert ((slope >= 0) & (slope <= 1)).all()


def test_fast_softplus_never_falls() -> None:
    # A bend the wrong way between two pieces of the polynomial would show here.
    z = np.linspace(-0.3, 0.3, 50001).astype(np.float32)
    hidden, slope = z.copy(), np.empty_like(z)
    cpu._softplus_kernel(hidden, slope, np.float32(100.0))
    assert np.diff(hidden).min() >= -1e-8
    assert np.diff(slope).min() >= -1e-6
