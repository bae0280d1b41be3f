"""What is special to the hash grid's Triton kernels; what all versions share is tested elsewhere."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, Kernel, compile_ahead
from torch import Tensor

from encoder.hashgrid import GridGeometry, HashGridConfig, cpu, encode, reference

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
import triton.language as tl  # noqa: E402

from encoder.hashgrid import cuda  # noqa: E402
from encoder.hashgrid.cuda_cells import corner_row  # noqa: E402
from encoder.hashgrid.cuda_kernels import table_gradient_kernel  # noqa: E402

SMALL = HashGridConfig(
    num_levels=3, features_per_level=2, log2_table_size=8, base_resolution=4, max_resolution=16
)
"""One dense level (4 cells), two hashed ones (8, 16)."""
LARGEST = HashGridConfig(
    num_levels=32, features_per_level=8, log2_table_size=24, base_resolution=250, max_resolution=65536
)
COUNT = 40


@pytest.fixture
def geometry() -> GridGeometry:
    return GridGeometry.from_config(SMALL, bound=1.5)


@pytest.fixture
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three for 40 samples, the last one partly filled."""
    monkeypatch.setattr(cuda, "BLOCK", 16)


def drawn(geometry: GridGeometry) -> dict[str, Tensor]:
    """Whatever the operations take."""
    width = 3 + 2 * geometry.num_levels
    return {
        "positions": (torch.rand(COUNT, 3) * 2.2 - 1.1) * geometry.bound,
        "table": torch.rand(geometry.num_entries, 2) * 2 - 1,
        "d_features": torch.randn(COUNT, width),
        "cotangent": torch.randn(COUNT, width),
        "direction": torch.randn(COUNT, 3),
    }


def features(module, tensors, *grid):  # type: ignore[no-untyped-def]
    return module.features(tensors["positions"], tensors["table"], *grid)


def input_gradient(module, tensors, *grid):  # type: ignore[no-untyped-def]
    return module.input_gradient(tensors["positions"], tensors["table"], tensors["cotangent"], *grid)


def direction_gradient(module, tensors, *grid):  # type: ignore[no-untyped-def]
    return module.direction_gradient(tensors["positions"], tensors["table"], tensors["direction"], *grid)


def mixed_gradient(module, tensors, *grid):  # type: ignore[no-untyped-def]
    given = (tensors[name] for name in ("positions", "table", "cotangent", "direction"))
    return module.mixed_gradient(*given, *grid)


def table_gradient(*names: str) -> Callable[..., Tensor]:
    def run(module, tensors, geometry, active, count):  # type: ignore[no-untyped-def]
        given = [
            tensors[name] if name in names else None for name in ("d_features", "cotangent", "direction")
        ]
        return module.table_gradient(tensors["positions"], geometry, active, 2, *given, count)

    return run


OPERATIONS = {
    "features": features,
    "input gradient": input_gradient,
    "direction gradient": direction_gradient,
    "mixed gradient": mixed_gradient,
    "table gradient": table_gradient("d_features"),
    "table gradient, second order": table_gradient("cotangent", "direction"),
    "table gradient, both": table_gradient("d_features", "cotangent", "direction"),
}


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("count", [None, 0, 16, 37, 99])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_those_of_the_cpu(geometry: GridGeometry, name: str, count: int | None) -> None:
    tensors, real = drawn(geometry), None if count is None else torch.tensor(count)
    expected = OPERATIONS[name](cpu, tensors, geometry, 2.25, real)
    there = {key: tensor.to(DEVICE) for key, tensor in tensors.items()}
    active = torch.tensor(2.25, device=DEVICE)
    real = None if real is None else real.to(DEVICE)
    if count is not None:
        # Zeros times NaN would show.
        for key in ("positions", "d_features", "cotangent", "direction"):
            there[key][count:] = float("nan")
    actual = OPERATIONS[name](cuda, there, geometry, active, real)
    assert_same_gradient(actual.cpu(), expected, tolerance=1e-5)


def test_everything_is_written(geometry: GridGeometry, monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *shape: int, **options: object) -> Tensor:
        tensor = new_empty(self, *shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    tensors = {key: tensor.to(DEVICE) for key, tensor in drawn(geometry).items()}
    for run in (features, input_gradient, direction_gradient, mixed_gradient):
        for active, count in ((0.0, None), (1.5, 21)):
            real = None if count is None else torch.tensor(count, device=DEVICE)
            assert run(cuda, tensors, geometry, active, real).isfinite().all()


def test_a_bad_position_harms_no_other(geometry: GridGeometry) -> None:
    tensors = drawn(geometry)
    for row, bad in enumerate((float("nan"), float("inf"), -float("inf"), 1e38)):
        tensors["positions"][row, 0] = bad
    positions, table = tensors["positions"].to(DEVICE), tensors["table"].to(DEVICE)
    encoded = encode(positions, table, geometry, 3.0, "cuda").cpu()
    assert encoded[0].isnan().any()
    # Infinitely far away lies on the face.
    assert encoded[1:, 3:].isfinite().all()
    expected = reference.encode(tensors["positions"][4:], tensors["table"], geometry, 3.0)
    torch.testing.assert_close(encoded[4:], expected, atol=1e-5, rtol=0)


def test_half_precision_is_read_and_single_precision_returned(geometry: GridGeometry) -> None:
    halved = replace(geometry, reads_half=True)
    tensors = {key: tensor.to(DEVICE) for key, tensor in drawn(geometry).items()}
    positions, cotangent = tensors["positions"].requires_grad_(), tensors["cotangent"]
    table = tensors["table"].requires_grad_()
    rounded = tensors["table"].detach().half().float().requires_grad_()

    def gradients(table: Tensor, geometry: GridGeometry) -> list[Tensor]:
        encoded = encode(positions, table, geometry, 2.25, "cuda")
        assert encoded.dtype == torch.float32
        (slope,) = torch.autograd.grad((encoded * cotangent).sum(), positions, create_graph=True)
        loss = encoded.square().sum() + slope.square().sum()
        return [encoded, slope, *torch.autograd.grad(loss, table)]

    expected = gradients(rounded, geometry)
    for given, layout in ((table, halved), (rounded.detach().half().requires_grad_(), geometry)):
        actual = gradients(given, layout)
        assert actual[2].dtype == given.dtype
        for tensor, wanted in zip(actual[:2], expected, strict=False):
            assert torch.equal(tensor, wanted)
        tolerance = 1e-5 if given.dtype == torch.float32 else 1e-3
        assert_same_gradient(actual[2], expected[2], tolerance)


def test_derivative_of_the_tables_gradient_is_not_rounded(geometry: GridGeometry) -> None:
    tensors = {key: tensor.to(DEVICE) for key, tensor in drawn(geometry).items()}
    table, d_features = tensors["table"].requires_grad_(), tensors["d_features"].requires_grad_()
    encoded = encode(tensors["positions"], table, replace(geometry, reads_half=True), 3.0, "cuda")
    (d_table,) = torch.autograd.grad(encoded, table, d_features, create_graph=True)
    # In half precision 1e6 is infinite.
    (found,) = torch.autograd.grad(d_table.sum() * 1e6, d_features)
    torch.testing.assert_close(found[:, 3:], torch.full_like(found[:, 3:], 1e6))
    assert not found[:, :3].any()


@triton.jit
def rows_kernel(corners, cells, offset, mask, rows, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    x, y, z = tl.load(corners + 3 * i), tl.load(corners + 3 * i + 1), tl.load(corners + 3 * i + 2)
    tl.store(rows + i, corner_row(x, y, z, tl.load(cells), tl.load(offset), tl.load(mask)))


def test_vertices_of_the_largest_grids() -> None:
    for cells, mask in ((65536, 0), (65536, 2**24 - 1), (5, 0), (3000, 2**10 - 1)):
        corners = torch.randint(0, cells + 1, (64, 3), dtype=torch.int32)
        corners[0] = cells
        offset = 2**33 + 5
        scalars = [
            torch.tensor(value, dtype=dtype, device=DEVICE)
            for value, dtype in ((cells, torch.int32), (offset, torch.int64), (mask, torch.int32))
        ]
        rows = torch.zeros(64, dtype=torch.int64, device=DEVICE)
        rows_kernel[(1,)](corners.to(DEVICE), *scalars, rows, SIZE=64)
        for (x, y, z), row in zip(corners.tolist(), rows.tolist(), strict=True):
            dense = (z * (cells + 1) + y) * (cells + 1) + x
            hashed = x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)
            assert row == offset + (hashed % (mask + 1) if mask else dense)


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="a file that is mostly holes serves as memory of the CPU only"
)
def test_numbers_of_the_largest_table_are_found(tmp_path: Path) -> None:
    geometry = GridGeometry.from_config(LARGEST, bound=1.0)
    # The last level alone: its entries lie beyond 2^31 numbers, and so would 32-bit products of row and F.
    chosen = {name: getattr(geometry, name)[-1:] for name in ("cells", "offsets", "masks")}
    geometry = replace(geometry, **chosen, _on_device={})
    assert geometry.offsets[0] * 8 > 2**31
    numbers = geometry.num_entries * 8

    def holes(name: str) -> Tensor:
        return torch.from_file(str(tmp_path / name), shared=True, size=numbers).view(-1, 8)

    table, d_table = holes("table"), holes("gradient")
    positions = torch.rand(5, 3) * 2 - 1
    for position in positions.tolist():
        cell = [int(np.float32((x + 1) / 2) * geometry.cells[0]) for x in position]
        for corner in range(8):
            x, y, z = (cell[axis] + (corner >> axis & 1) for axis in range(3))
            hashed = (x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % 2**24
            table[int(geometry.offsets[0]) + hashed] = torch.randn(8)
    expected = cpu.features(positions, table, geometry, 1.0)
    assert expected[:, 3:].all()
    torch.testing.assert_close(cuda.features(positions, table, geometry, 1.0), expected, atol=1e-5, rtol=0)
    cotangent = torch.randn(5, 11)
    torch.testing.assert_close(
        cuda.input_gradient(positions, table, cotangent, geometry, 1.0),
        cpu.input_gradient(positions, table, cotangent, geometry, 1.0),
        rtol=1e-5,
        atol=1e-5 * float(geometry.cells[0]),
    )
    levels = geometry.on(torch.device("cpu"))
    table_gradient_kernel[(1,)](
        *(positions, cotangent, None, None, levels.cells, levels.offsets, levels.masks, torch.ones(1)),
        *(1.0, None, 5, d_table),
        NUM_LEVELS=1,
        NUM_FEATURES=8,
        PADDED_FEATURES=8,
        BLOCK=16,
    )
    # <d table, table> = <cotangent, features>, the features being linear in the table.
    touched = d_table[int(geometry.offsets[0]) :]
    product = (touched * table[int(geometry.offsets[0]) :]).sum()
    torch.testing.assert_close(product, (cotangent * expected)[:, 3:].sum(), rtol=1e-4, atol=1e-4)


def kernels(levels: int, features: int, table: str, count: str) -> list[Kernel]:
    """Every kernel with every choice of its optional inputs, as it is launched."""
    constants = {
        "NUM_LEVELS": levels,
        "NUM_FEATURES": features,
        "PADDED_FEATURES": 1 << (features - 1).bit_length(),
        "BLOCK": 128,
    }
    grid = {
        **{"cells": "*i32", "offsets": "*i64", "masks": "*i32", "level_weights": "*fp32", "bound": "fp32"},
        **{"count": count, "num_samples": "i32"},
    }
    absent, given = "constexpr", "*fp32"
    forms = [
        ("interpolate_kernel", {"directions": absent, "table": table}, "result"),
        ("interpolate_kernel", {"directions": given, "table": table}, "result"),
        ("input_gradient_kernel", {"directions": absent, "table": table, "cotangent": given}, "gradient"),
        ("input_gradient_kernel", {"directions": given, "table": table, "cotangent": given}, "gradient"),
        *(
            (
                "table_gradient_kernel",
                {"d_features": first, "cotangent": second, "directions": second},
                "d_table",
            )
            for first, second in ((given, absent), (absent, given), (given, given))
        ),
    ]
    found = []
    for name, own, result in forms:
        signature = {"positions": given, **own, **grid, result: given, **dict.fromkeys(constants, absent)}
        absents = {key: None for key, kind in signature.items() if kind == absent}
        found.append(Kernel("encoder.hashgrid.cuda_kernels", name, signature, absents | constants))
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spilling(capability: int) -> None:
    wanted = [*kernels(12, 2, "*fp32", absent := "constexpr"), *kernels(16, 2, "*fp16", "*i64")]
    wanted += kernels(5, 3, "*fp32", absent)[:3]
    for kernel, result in zip(wanted, compile_ahead(wanted, capability), strict=True):
        assert result["error"] == "", (kernel.name, result["error"])
        # At the very least three programs of 128 threads share a multiprocessor's 65536 registers.
        assert int(result["registers"]) <= 168, (kernel.name, result)
        assert int(result["spilled"]) == 0, (kernel.name, result)


def test_the_package_does_not_import_them() -> None:
    program = "import sys, encoder.hashgrid; assert 'encoder.hashgrid.cuda' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_step_can_be_recorded(geometry: GridGeometry) -> None:
    tensors = {key: tensor.to(DEVICE) for key, tensor in drawn(geometry).items()}
    positions, table = tensors["positions"].requires_grad_(), tensors["table"].requires_grad_()
    active, count = torch.tensor(3.0, device=DEVICE), torch.tensor(COUNT, device=DEVICE)

    def step(active: Tensor | float, backend: str, count: Tensor | None) -> Tensor:
        encoded = encode(positions, table, geometry, active, backend, count)
        (slope,) = torch.autograd.grad(encoded.square().sum(), positions, create_graph=True)
        return torch.autograd.grad(slope.square().sum() + encoded.sum(), table)[0]

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step(active, "cuda", count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step(active, "cuda", count)
    for levels, real in ((3.0, COUNT), (1.5, 23)):
        active.fill_(levels)
        count.fill_(real)
        graph.replay()
        expected = step(levels, "reference", torch.tensor(real, device=DEVICE))
        assert_same_gradient(result, expected, tolerance=1e-4)
