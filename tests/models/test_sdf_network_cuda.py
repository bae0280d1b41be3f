"""The fused SDF network: shapes to be padded, padding at the end, half tables, compilation for GPUs."""

import functools
import itertools
import math

import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, Kernel, compile_ahead, needs_triton
from torch import Tensor

from encoder import HashGridConfig
from encoder.hashgrid import GridGeometry
from models.sdf_network import sdf_only, sdf_with_gradient

BETA = 100.0
BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=needs_triton)]
Network = tuple[list[Tensor], list[Tensor]]


def grid(levels: int, features: int, dtype: str = "float32") -> GridGeometry:
    # Two dense levels and hashed ones beyond.
    config = HashGridConfig(
        num_levels=levels,
        features_per_level=features,
        log2_table_size=9,
        base_resolution=4,
        max_resolution=16,
        table_dtype=dtype,
    )
    return GridGeometry.from_config(config, bound=1.5)


def network(geometry: GridGeometry, features: int, hidden: list[int], outputs: int) -> Network:
    """Pre-activations a few 1 / beta wide, where softplus bends."""
    widths = [3 + geometry.num_levels * features, *hidden, outputs]
    weights = [torch.randn(b, a) * math.sqrt(0.2 / a) for a, b in itertools.pairwise(widths)]
    return weights, [torch.randn(b) * 0.02 for b in widths[1:]]


def positions_inside_cells(geometry: GridGeometry, count: int) -> Tensor:
    """Positions clear of cell borders, where the grid's derivatives jump."""
    positions = (torch.rand(40 * count, 3) * 2 - 1) * geometry.bound
    cells = torch.from_numpy(geometry.cells)[:, None, None]
    fraction = ((positions.double() / geometry.bound + 1) / 2 * cells).frac()
    is_clear = ((fraction > 0.01) & (fraction < 0.99)).all(dim=2).all(dim=0)
    assert int(is_clear.sum()) >= count
    return positions[is_clear][:count]


def evaluate(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    parameters: Network,
    backend: str,
    active_levels: float | Tensor,
    count: int | None = None,
) -> dict[str, Tensor]:
    """Results, and derivatives of a random function of them; in double precision for the reference."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    move = functools.partial(torch.Tensor.to, device=device, dtype=dtype)
    if isinstance(active_levels, Tensor):
        active_levels = active_levels.to(device)
    entries = move(table).detach().clone().requires_grad_()
    weights, biases = ([move(p).detach().clone().requires_grad_() for p in group] for group in parameters)
    rows = None if count is None else torch.tensor(count, device=device)
    arguments = move(positions), entries, geometry, active_levels, weights, biases, BETA, backend, rows
    outputs, gradient = sdf_with_gradient(*arguments)
    draw = torch.Generator().manual_seed(3)
    loss = (outputs * move(torch.randn(outputs.shape, generator=draw))).sum()
    loss = loss + (gradient * move(torch.randn(gradient.shape, generator=draw))).sum()
    differentiable = {"table": entries}
    differentiable |= {f"weight {layer}": weight for layer, weight in enumerate(weights)}
    differentiable |= {f"bias {layer}": bias for layer, bias in enumerate(biases)}
    found = {"outputs": outputs, "gradient": gradient, "sdf": sdf_only(*arguments)}
    gradients = torch.autograd.grad(loss, list(differentiable.values()))
    found |= dict(zip(differentiable, gradients, strict=True))
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        # Values differ by float32's roundings; beta = 100 makes 1e-5 of them in a slope, thus in gradients.
        limit = min(tolerance, 1e-5) if name in ("outputs", "sdf") else tolerance
        assert_same_gradient(actual[name], expected[name], tolerance=limit)


@needs_triton
@pytest.mark.parametrize(
    ("levels", "features", "hidden", "outputs", "count"),
    [
        (12, 2, [64], 16, 33),  # one sample more than a block
        (16, 2, [64], 16, 32),
        (3, 1, [16], 1, 5),
        (2, 4, [20, 20], 3, 40),
        (5, 3, [64, 64], 17, 31),
        (4, 8, [64], 64, 3),
        (4, 2, [16, 32], 5, 9),  # not fused: widths differ
        (3, 2, [65], 2, 4),  # not fused: too wide
    ],
)
def test_shapes(levels: int, features: int, hidden: list[int], outputs: int, count: int) -> None:
    geometry = grid(levels, features)
    inputs = positions_inside_cells(geometry, count), torch.rand(geometry.num_entries, features) * 0.2 - 0.1
    parameters = network(geometry, features, hidden, outputs)
    actual, expected = (
        evaluate(*inputs, geometry, parameters, backend, levels - 0.5) for backend in ("cuda", "reference")
    )
    assert_same(actual, expected)


@needs_triton
def test_many_blocks_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.sdf_network import cuda

    monkeypatch.setattr(cuda, "NUM_PROGRAMS", 2)
    geometry = grid(3, 2)
    inputs = positions_inside_cells(geometry, 5 * 32 + 1), torch.rand(geometry.num_entries, 2) * 0.2 - 0.1
    parameters = network(geometry, 2, [16], 4)
    actual, expected = (
        evaluate(*inputs, geometry, parameters, backend, 3.0) for backend in ("cuda", "reference")
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_layers", [1, 3])
@pytest.mark.parametrize("count", [0, 33, 70])
def test_padding(backend: str, hidden_layers: int, count: int) -> None:
    geometry = grid(3, 2)
    positions, table = positions_inside_cells(geometry, 70), torch.rand(geometry.num_entries, 2) * 0.2 - 0.1
    parameters = network(geometry, 2, [16] * hidden_layers, 4)
    padded = positions.clone()
    padded[count:] = torch.nan
    actual = evaluate(padded, table, geometry, parameters, backend, 3.0, count)
    for name in ("outputs", "gradient", "sdf"):
        assert len(actual[name]) == 70
        assert not actual[name][count:].any()
        actual[name] = actual[name][:count]
    # The same draws for the loss: rows of an upstream gradient come one after another.
    whole = evaluate(positions, table, geometry, parameters, "reference", 3.0, count)
    for name in ("outputs", "gradient", "sdf"):
        whole[name] = whole[name][:count]
    assert_same(actual, whole)
    alone = evaluate(positions[:count], table, geometry, parameters, "reference", 3.0)
    for name in ("outputs", "gradient", "sdf"):
        torch.testing.assert_close(whole[name], alone[name])


@needs_triton
def test_half_table_is_read_and_the_gradient_is_single() -> None:
    geometry = grid(3, 2, "float16")
    positions, table = positions_inside_cells(geometry, 40), torch.rand(geometry.num_entries, 2) * 0.2 - 0.1
    parameters = network(geometry, 2, [16], 4)
    actual = evaluate(positions, table, geometry, parameters, "cuda", 3.0)
    assert actual["table"].dtype == torch.float32
    assert_same(actual, evaluate(positions, table.half(), geometry, parameters, "reference", 3.0))
    # Were the table itself read, this would hold.
    single = evaluate(positions, table, geometry, parameters, "reference", 3.0)
    assert (actual["outputs"] - single["outputs"]).abs().max() > 1e-5


@needs_triton
@pytest.mark.parametrize("active_levels", [0.0, 1.25])
def test_closed_levels_as_a_tensor(active_levels: float) -> None:
    geometry = grid(3, 2)
    positions, table = positions_inside_cells(geometry, 20), torch.rand(geometry.num_entries, 2) * 0.2 - 0.1
    # Whatever a closed level holds reaches nothing.
    wild = table.clone()
    wild[int(geometry.offsets[2]) :] = torch.inf
    parameters = network(geometry, 2, [16], 4)
    actual = evaluate(positions, wild, geometry, parameters, "cuda", torch.tensor(active_levels))
    expected = evaluate(positions, table, geometry, parameters, "reference", active_levels)
    assert_same(actual, expected)
    assert not actual["table"][int(geometry.offsets[2]) :].any()


@needs_triton
def test_positions_outside_have_no_slope_in_the_grid() -> None:
    geometry = grid(3, 2)
    positions = torch.tensor([[1.8, 0.1, 0.2], [-1.7, -1.9, 0.3], [2.0, 2.0, -2.0]])
    table, parameters = torch.rand(geometry.num_entries, 2) * 0.2 - 0.1, network(geometry, 2, [16], 4)
    actual, expected = (
        evaluate(positions, table, geometry, parameters, backend, 3.0) for backend in ("cuda", "reference")
    )
    assert_same(actual, expected)


def test_unknown_backend() -> None:
    geometry = grid(2, 1)
    weights, biases = network(geometry, 1, [4], 1)
    arguments = torch.zeros(1, 3), torch.zeros(geometry.num_entries, 1), geometry, 2.0, weights, biases, BETA
    with pytest.raises(ValueError, match="SDF network: backend must be one of"):
        sdf_with_gradient(*arguments, "gpu")
    with pytest.raises(ValueError, match="SDF network: backend must be one of"):
        sdf_only(*arguments, "gpu")


def kernel(name: str, levels: int, hidden_layers: int, table: str) -> Kernel:
    """A kernel as ``cuda.py`` launches it for a network of the default size."""
    from models.sdf_network import cuda, cuda_kernels

    constants: dict[str, object] = dict(cuda.sizes(levels, 2, 64, 16), BLOCK=cuda.BLOCK)
    if hidden_layers == 1:
        constants |= {"weight_2": None, "bias_2": None}
    types = {"table": table, "cells": "*i32", "masks": "*i32", "offsets": "*i64", "count": "*i64"}
    types |= {"num_samples": "i32", "bound": "fp32", "beta": "fp32"}
    names = getattr(cuda_kernels, name).arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in names}
    constants = {arg: value for arg, value in constants.items() if arg in names}
    launch = cuda.SDF_LAUNCH if name == "sdf_kernel" else cuda.LAUNCH
    options = {option: launch.get(option) for option in ("num_warps", "num_stages", "maxnreg")}
    return Kernel(cuda_kernels.__name__, name, signature, constants, **options)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    kernels = [
        kernel("sdf_kernel", 12, 1, "*fp32"),
        kernel("forward_kernel", 16, 1, "*fp16"),
        kernel("backward_kernel", 16, 1, "*fp32"),
    ]
    for found, asked in zip(compile_ahead(kernels, capability), kernels, strict=True):
        assert found["error"] == "", (asked.name, found["error"])
        # A thread has 255 registers, four bytes each; the backward pass keeps addresses in local memory.
        assert int(found["spilled"]) <= (2000 if asked.name == "backward_kernel" else 256), (asked, found)
