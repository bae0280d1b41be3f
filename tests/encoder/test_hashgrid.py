"""Hash grid: layout, interpolation, level masking, and each version's first and second derivatives."""

import itertools

import numpy as np
import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, needs_triton
from torch import Tensor

from encoder import HashGrid, HashGridConfig, hashgrid
from encoder.hashgrid import IMPLEMENTATIONS, GridGeometry
from encoder.hashgrid.cpu import features_and_jacobian, table_gradient
from utils.backend import implementation

SMALL = HashGridConfig(
    num_levels=4, features_per_level=2, log2_table_size=10, base_resolution=4, max_resolution=32
)
"""Two dense levels (4, 8 cells), two hashed ones (16, 32)."""


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and DEVICE.type == "cpu":
        # The interpreter takes as long for a block of 1024 samples as for one of 16.
        monkeypatch.setattr(implementation("encoder.hashgrid", "cuda"), "BLOCK", 1024)
    return str(request.param)


@pytest.fixture
def geometry() -> GridGeometry:
    return GridGeometry.from_config(SMALL, bound=1.0)


def encode(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active: float | Tensor,
    backend: str,
    count: Tensor | None = None,
) -> Tensor:
    """The package's ``encode``, run where the backend runs, for tensors on the CPU."""
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    active = active.to(device) if isinstance(active, Tensor) else active
    count = None if count is None else count.to(device)
    inputs = positions.to(device), table.to(device)
    return hashgrid.encode(*inputs, geometry, active, backend, count).cpu()


def random_table(geometry: GridGeometry, features: int = 2) -> Tensor:
    return torch.rand(geometry.num_entries, features) * 2 - 1


def inside_cells(count: int, geometry: GridGeometry, margin: float = 0.02) -> Tensor:
    """Random positions whose distance to every level's cell borders is at least ``margin`` cells.

    Derivatives jump at the borders, and float32 may fall on the other side of one.
    """
    positions = (torch.rand(40 * count, 3) * 2 - 1) * geometry.bound
    cells = torch.from_numpy(geometry.cells)[:, None, None]
    fraction = ((positions.double() / geometry.bound + 1) / 2 * cells).frac()
    is_clear = ((fraction > margin) & (fraction < 1 - margin)).all(dim=2).all(dim=0)
    chosen = positions[is_clear][:count]
    assert len(chosen) == count
    return chosen


def encode_slowly(
    position: list[float], table: np.ndarray, geometry: GridGeometry, active: float
) -> list[float]:
    """One position, corner by corner, with 32-bit arithmetic for the hash."""
    bound = geometry.bound
    row = [x / bound for x in position]
    for level in range(geometry.num_levels):
        cells = int(geometry.cells[level])
        scaled = [min(max((x / bound + 1) / 2, 0), 1) * cells for x in position]
        cell = [min(int(x), cells - 1) for x in scaled]
        features = np.zeros(table.shape[1])
        for corner in itertools.product((0, 1), repeat=3):
            weight = 1.0
            for axis in range(3):
                fraction = scaled[axis] - cell[axis]
                weight *= fraction if corner[axis] else 1 - fraction
            x, y, z = (cell[axis] + corner[axis] for axis in range(3))
            if geometry.masks[level] == 0:
                entry = x + (cells + 1) * y + (cells + 1) ** 2 * z
            else:
                hashed = x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)
                entry = hashed % (int(geometry.masks[level]) + 1)
            features += weight * table[geometry.offsets[level] + entry]
        row += list(features * min(max(active - level, 0), 1))
    return row


def test_one_cell_by_hand(backend: str) -> None:
    geometry = GridGeometry.from_config(
        HashGridConfig(num_levels=1, features_per_level=1, base_resolution=1, max_resolution=1), bound=2.0
    )
    # Corners hold 0..7 with x fastest, so the interpolated value is ux + 2 uy + 4 uz.
    table = torch.arange(8.0)[:, None]
    positions = torch.tensor([[-2.0, -2.0, -2.0], [2.0, -2.0, -2.0], [0.0, 1.0, 2.0], [-1.0, 0.0, 1.0]])
    expected = torch.tensor(
        [[-1, -1, -1, 0], [1, -1, -1, 1], [0, 0.5, 1, 0.5 + 1.5 + 4], [-0.5, 0, 0.5, 0.25 + 1 + 3]]
    )
    torch.testing.assert_close(encode(positions, table, geometry, 1.0, backend), expected)


def test_layout_switches_from_dense_to_hashed(geometry: GridGeometry) -> None:
    assert geometry.cells.tolist() == [4, 8, 16, 32]
    # 5^3 = 125 and 9^3 = 729 vertices fit into 1024 entries, 17^3 = 4913 and 33^3 do not.
    assert geometry.masks.tolist() == [0, 0, 1023, 1023]
    assert geometry.offsets.tolist() == [0, 125, 125 + 729, 125 + 729 + 1024]
    assert geometry.num_entries == 125 + 729 + 1024 + 1024


def test_a_level_that_just_fits_is_dense() -> None:
    config = HashGridConfig(num_levels=2, log2_table_size=9, base_resolution=7, max_resolution=8)
    assert GridGeometry.from_config(config, 1.0).masks.tolist() == [0, 511]


@pytest.mark.parametrize("levels", [1, 2, 5, 8, 12, 16, 20])
@pytest.mark.parametrize(
    ("base", "finest"), [(16, 512), (16, 1024), (16, 2048), (8, 1000), (32, 32), (3, 4097)]
)
def test_finest_level_has_exactly_the_resolution_asked_for(levels: int, base: int, finest: int) -> None:
    config = HashGridConfig(num_levels=levels, base_resolution=base, max_resolution=finest)
    cells = GridGeometry.from_config(config, 1.0).cells
    assert cells[0] == base
    assert levels == 1 or cells[-1] == finest
    assert (np.diff(cells) >= 0).all()


@pytest.mark.parametrize(
    ("active", "expected"),
    [(0.0, [0, 0, 0, 0]), (1.0, [1, 0, 0, 0]), (2.25, [1, 1, 0.25, 0]), (4.0, [1] * 4), (9.0, [1] * 4)],
)
def test_level_weights(geometry: GridGeometry, active: float, expected: list[float]) -> None:
    assert geometry.level_weights(active).tolist() == expected


@pytest.mark.parametrize("active", [0.0, 1.0, 2.25, 4.0])
@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_values_against_a_loop(backend: str, active: float, bound: float) -> None:
    geometry = GridGeometry.from_config(SMALL, bound)
    table = random_table(geometry)
    positions = (torch.rand(60, 3) * 2.4 - 1.2) * bound
    encoded = encode(positions, table, geometry, active, backend)
    expected = [encode_slowly(p, table.double().numpy(), geometry, active) for p in positions.tolist()]
    # Positions carry 6e-8, times 32 cells, times differences of up to 2 along three axes.
    torch.testing.assert_close(encoded.double(), torch.tensor(expected).double(), atol=2e-5, rtol=0)


def test_values_on_cell_borders_and_faces(backend: str, geometry: GridGeometry) -> None:
    # Multiples of 1/16 are vertices of all four levels; -1 and 1 are the faces, edges and corners of the box.
    ticks = [-1.0, -0.5, -0.0625, 0.0, 0.4375, 1.0]
    positions = torch.tensor(list(itertools.product(ticks, repeat=3)))
    table = random_table(geometry)
    expected = [encode_slowly(p, table.double().numpy(), geometry, 4.0) for p in positions.tolist()]
    encoded = encode(positions, table, geometry, 4.0, backend)
    torch.testing.assert_close(encoded.double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_features_are_continuous_across_cell_borders(backend: str, geometry: GridGeometry) -> None:
    table = random_table(geometry)
    border = torch.tensor([[0.25, 0.3, -0.7]])
    shift = torch.tensor([[1e-5, 0.0, 0.0]])
    left, right = (encode(p, table, geometry, 4.0, backend) for p in (border - shift, border + shift))
    assert (left - right).abs().max() < 2e-5 * 2 * 16 * 2


def test_outside_the_box_features_are_those_of_the_face(backend: str, geometry: GridGeometry) -> None:
    table = random_table(geometry)
    outside = torch.tensor([[1.7, 0.21, 0.33], [0.1, -5.0, 0.7], [3.0, -2.0, 9.0]], requires_grad=True)
    encoded = encode(outside, table, geometry, 4.0, backend)
    at_face = encode(outside.detach().clamp(-1, 1), table, geometry, 4.0, backend)
    assert torch.equal(encoded[:, 3:], at_face[:, 3:])
    assert torch.equal(encoded[:, :3], outside)
    (slope,) = torch.autograd.grad(encoded[:, 3:].sum(), outside, retain_graph=True)
    is_outside = outside.detach().abs() > 1
    assert (slope[is_outside] == 0).all()
    assert (slope[~is_outside] != 0).all()
    # The position itself goes on, so that a network can tell how far outside it is.
    (slope,) = torch.autograd.grad(encoded[:, :3].sum(), outside)
    assert torch.equal(slope, torch.ones(3, 3))


def test_closed_levels_take_no_gradient(backend: str, geometry: GridGeometry) -> None:
    table = random_table(geometry).requires_grad_()
    encoded = encode(inside_cells(50, geometry), table, geometry, 1.5, backend)
    assert (encoded[:, 7:] == 0).all()
    (d_table,) = torch.autograd.grad(encoded.sum(), table)
    levels = d_table.split([125, 729, 1024, 1024])
    # Each position gives its weights, which sum to 1, to each feature of an open level.
    assert levels[0].sum(dim=0).tolist() == pytest.approx([50, 50], rel=1e-5)
    assert levels[1].sum(dim=0).tolist() == pytest.approx([25, 25], rel=1e-5)
    assert not levels[2].any()
    assert not levels[3].any()


def all_derivatives(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active: float,
    backend: str,
    dtype: torch.dtype,
    count: Tensor | None = None,
) -> dict[str, Tensor]:
    """Values, first derivatives, and the derivatives of a random function of the first derivatives."""
    draw = torch.Generator().manual_seed(7)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw).to(dtype)

    points = positions.to(dtype).requires_grad_()
    entries = table.to(dtype).requires_grad_()
    features = encode(points, entries, geometry, active, backend, count)
    cotangent = random(features).requires_grad_()
    first = torch.autograd.grad((features * cotangent).sum(), [points, entries], create_graph=True)
    mixed = (first[0] * random(points)).sum() + (first[1] * random(entries)).sum()
    second = torch.autograd.grad(mixed, [points, entries, cotangent])
    names = ["features", "d positions", "d table", "dd positions", "dd table", "dd cotangent"]
    found = [features, *first, *second]
    return {name: tensor.detach() for name, tensor in zip(names, found, strict=True)}


@pytest.mark.parametrize("active", [4.0, 2.25])
@pytest.mark.parametrize("bound", [1.0, 1.5])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_derivatives_against_double_precision(backend: str, active: float, bound: float, count: int) -> None:
    geometry = GridGeometry.from_config(SMALL, bound)
    positions, table = inside_cells(max(count, 1), geometry)[:count], random_table(geometry)
    actual = all_derivatives(positions, table, geometry, active, backend, torch.float32)
    expected = all_derivatives(positions, table, geometry, active, "reference", torch.float64)
    for name in expected:
        # A fraction inside a cell is known to 32 * 6e-8 = 2e-6; products of three and sums keep below 1e-5.
        assert_same_gradient(actual[name], expected[name], tolerance=2e-5)


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_derivatives_on_the_faces_are_those_of_the_outermost_cells(
    backend: str, axis: int, side: float
) -> None:
    geometry = GridGeometry.from_config(SMALL, 1.0)
    positions, table = inside_cells(30, geometry), random_table(geometry)
    positions[:, axis] = side
    actual = all_derivatives(positions, table, geometry, 4.0, backend, torch.float32)
    expected = all_derivatives(positions, table, geometry, 4.0, "reference", torch.float64)
    for name in expected:
        assert_same_gradient(actual[name], expected[name], tolerance=2e-5)
    # Within a cell features are linear along one axis: a small step inwards gives the same slope.
    inwards = positions.double()
    inwards[:, axis] -= side * 1e-6
    table = table.double()
    near, at = (encode(p, table, geometry, 4.0, "reference") for p in (inwards, positions.double()))
    # One copy of the positions per feature, so that one backward pass gives the slopes of all.
    points = positions.repeat(8, 1).requires_grad_()
    features = encode(points, table.float(), geometry, 4.0, backend)
    chosen = torch.eye(8).repeat_interleave(len(positions), dim=0)
    (slopes,) = torch.autograd.grad((features[:, 3:] * chosen).sum(), points)
    measured = ((at - near)[:, 3:] / (side * 1e-6)).t().reshape(-1)
    torch.testing.assert_close(slopes[:, axis].double(), measured, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("features", [1, 4])
def test_other_numbers_of_features(backend: str, features: int) -> None:
    config = HashGridConfig(
        num_levels=2, features_per_level=features, log2_table_size=8, base_resolution=5, max_resolution=9
    )
    geometry = GridGeometry.from_config(config, 1.0)
    positions, table = inside_cells(30, geometry), random_table(geometry, features)
    actual = all_derivatives(positions, table, geometry, 2.0, backend, torch.float32)
    expected = all_derivatives(positions, table, geometry, 2.0, "reference", torch.float64)
    for name in expected:
        assert_same_gradient(actual[name], expected[name], tolerance=2e-5)


@pytest.mark.parametrize("count", [0, 20, 40, 50])
def test_padding_is_zero_and_gives_no_gradient(backend: str, geometry: GridGeometry, count: int) -> None:
    real, table = inside_cells(40, geometry)[:count], random_table(geometry)
    padding = torch.full((40 - len(real), 3), float("nan"))
    positions = torch.cat([real, padding])
    actual = all_derivatives(positions, table, geometry, 2.25, backend, torch.float32, torch.tensor(count))
    # The same without what is padding, whose cotangents must not count: they are drawn, not zero.
    valid = torch.cat([real, torch.zeros_like(padding)])
    expected = all_derivatives(
        valid, table, geometry, 2.25, "reference", torch.float64, torch.tensor(len(real))
    )
    for name, tensor in actual.items():
        if name != "d table" and name != "dd table":
            assert not tensor[count:].any(), name
        assert_same_gradient(tensor, expected[name], tolerance=2e-5)


def test_reference_skips_padding_like_a_shorter_batch(geometry: GridGeometry) -> None:
    positions, table = inside_cells(50, geometry), random_table(geometry).requires_grad_()
    padded = encode(positions, table, geometry, 4.0, "reference", torch.tensor(30))
    shorter = encode(positions[:30], table, geometry, 4.0, "reference")
    assert torch.equal(padded[:30], shorter)
    assert not padded[30:].any()
    gradients = [torch.autograd.grad(features.square().sum(), table)[0] for features in (padded, shorter)]
    torch.testing.assert_close(*gradients)


def test_open_levels_may_be_a_tensor(backend: str, geometry: GridGeometry) -> None:
    positions, table = inside_cells(20, geometry), random_table(geometry)
    for active in (0.0, 2.25, 7.0):
        expected = encode(positions, table, geometry, active, backend)
        assert torch.equal(encode(positions, table, geometry, torch.tensor(active), backend), expected)


def test_non_contiguous_inputs(backend: str, geometry: GridGeometry) -> None:
    positions, table = inside_cells(40, geometry), random_table(geometry)
    strided = positions.t().contiguous().t().requires_grad_()
    strided_table = torch.cat([table, table], dim=1)[:, ::2][:, [0, 1]].t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    assert not strided_table.is_contiguous()
    encoded = encode(strided, strided_table, geometry, 4.0, backend)
    plain, plain_table = (
        positions.clone().requires_grad_(),
        strided_table.detach().contiguous().requires_grad_(),
    )
    expected = encode(plain, plain_table, geometry, 4.0, backend)
    assert torch.equal(encoded, expected)
    # The gradient of a sum arrives as an expanded tensor without memory of its own.
    actual_gradients = torch.autograd.grad(encoded.sum(), [strided, strided_table])
    expected_gradients = torch.autograd.grad(
        (expected * torch.ones_like(expected)).sum(), [plain, plain_table]
    )
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_reference_has_the_derivatives_of_finite_differences() -> None:
    config = HashGridConfig(
        num_levels=2, features_per_level=1, log2_table_size=4, base_resolution=1, max_resolution=3
    )
    geometry = GridGeometry.from_config(config, 1.5)
    assert geometry.masks.tolist() == [0, 15]
    positions = inside_cells(3, geometry, margin=0.05).double().requires_grad_()
    table = random_table(geometry, 1).double().requires_grad_()

    def function(p: Tensor, t: Tensor) -> Tensor:
        return encode(p, t, geometry, 1.5, "reference")

    torch.autograd.gradcheck(function, (positions, table))
    torch.autograd.gradgradcheck(function, (positions, table))


@pytest.mark.parametrize("active", [4.0, 2.25])
def test_jacobian_against_the_reference(geometry: GridGeometry, active: float) -> None:
    positions, table = inside_cells(600, geometry), random_table(geometry)
    features, jacobian = features_and_jacobian(positions, table, geometry, active)
    points = positions.double().requires_grad_()
    expected = encode(points, table.double(), geometry, active, "reference")
    assert_same_gradient(features, expected.detach(), tolerance=2e-5)
    for column in range(expected.shape[1]):
        (wanted,) = torch.autograd.grad(expected[:, column].sum(), points, retain_graph=True)
        if column >= 3 and not wanted.any():
            assert not jacobian[:, :, column].any()
        else:
            assert_same_gradient(jacobian[:, :, column], wanted, tolerance=2e-5)


@pytest.mark.parametrize("with_second_order", [False, True])
def test_table_gradient_against_the_reference(geometry: GridGeometry, with_second_order: bool) -> None:
    positions, table = inside_cells(600, geometry), random_table(geometry)
    d_features, cotangent = torch.randn(2, 600, 3 + 8).unbind(0)
    direction = torch.randn(600, 3)
    extra = (cotangent, direction) if with_second_order else ()
    actual = table_gradient(positions, geometry, 2.5, 2, d_features, *extra)

    points, entries = positions.double().requires_grad_(), table.double().requires_grad_()
    features = encode(points, entries, geometry, 2.5, "reference")
    loss = (features * d_features).sum()
    if with_second_order:
        (slopes,) = torch.autograd.grad((features * cotangent).sum(), points, create_graph=True)
        loss = loss + (slopes * direction).sum()
    assert_same_gradient(actual, torch.autograd.grad(loss, entries)[0], tolerance=2e-5)


def test_table_gradient_is_bit_reproducible(geometry: GridGeometry) -> None:
    # Many samples in few cells: the order of the sums decides the last bits.
    positions, d_features = torch.rand(5000, 3) * 0.2, torch.randn(5000, 11)
    first, second = (table_gradient(positions, geometry, 4.0, 2, d_features) for _ in range(2))
    assert torch.equal(first, second)


def test_module_starts_small_and_passes_its_table_on(backend: str) -> None:
    grid = HashGrid(SMALL, bound=1.0, backend=backend)
    assert (grid.width, grid.num_levels) == (3 + 8, 4)
    table = grid.table.detach()
    assert table.abs().max() <= 1e-4
    assert table.abs().mean().item() == pytest.approx(5e-5, rel=0.1)
    positions, count = torch.rand(5, 3), torch.tensor(4)
    grid.to(DEVICE if backend == "cuda" else "cpu")
    device = grid.table.device
    expected = encode(positions, grid.table, grid.geometry, 3.5, backend, count)
    assert expected[:4].any()
    assert torch.equal(grid(positions.to(device), 3.5, count.to(device)).cpu(), expected)


def test_callers_mistakes_are_named(geometry: GridGeometry) -> None:
    names = r"\['cpu', 'cuda', 'reference', 'tinycudann'\]"
    with pytest.raises(ValueError, match=f"backend must be one of {names}, got 'gpu'"):
        encode(torch.zeros(1, 3), random_table(geometry), geometry, 4.0, "gpu")
    with pytest.raises(ValueError, match="table must have 2902 rows, got 8"):
        encode(torch.zeros(1, 3), torch.zeros(8, 2), geometry, 4.0, "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_levels": 0}, r"hash_grid\.num_levels: must be between 1 and 32, got 0"),
        ({"features_per_level": 9}, r"hash_grid\.features_per_level"),
        ({"log2_table_size": 30}, r"hash_grid\.log2_table_size"),
        ({"base_resolution": 64, "max_resolution": 32}, r"hash_grid\.max_resolution: must not be below"),
    ],
)
def test_config_out_of_range(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashGridConfig(**change)


def test_versions_say_where_they_run() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert list(IMPLEMENTATIONS) == ["cpu", "cuda", "reference"]
    assert IMPLEMENTATIONS["cpu"](cpu) is None
    assert "--device cpu" in str(IMPLEMENTATIONS["cpu"](cuda))
    assert IMPLEMENTATIONS["reference"](cuda) is None
