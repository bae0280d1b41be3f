"""Each operation's implementations against one another, in alternation within one run."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_cases import grid_case, march_case, network_case, packed_case, sdf_case
from benchmarks.engine_tools import Clock, Report, Sizes, active_implementations, first_line
from encoder import hashgrid
from models import compositing, marching, mlp, sdf_network
from models.fields import SOFTPLUS_BETA
from systems import adam


@dataclass(frozen=True)
class Race:
    """An operation with inputs, and what makes a function to time from an implementation's name."""

    title: str
    package: ModuleType
    prepare: Callable[[str], Callable[[], Any]]


def run_backends(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Every operation that there is more than one implementation of."""
    clock = Clock(device)
    table = report.table(
        "Implementations against the reference",
        *("operation", "implementation", "median ms", "times as fast", "note"),
    )
    for race in races(sizes, device):
        ready: dict[str, Callable[[], Any]] = {}
        for name in [*_able(race.package, device), "reference"]:
            try:
                function = race.prepare(name)
                function()
                ready[name] = function
            except Exception as error:
                table.add(race.title, name, None, None, first_line(error))
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(sizes.rounds):
            for name, function in ready.items():
                times[name] += clock.times(function, 1 if name == "reference" else 3, warmup=1)
        for name, measured in times.items():
            median = statistics.median(measured)
            ratio = statistics.median(times["reference"]) / median if "reference" in times else None
            table.add(race.title, name, median, ratio, None)
    for title, package in _PACKAGES.items():
        for name, reason in active_implementations(package, device, with_optional=True).items():
            if reason is not None and name != "cpu":
                print(f"{title}: {name} left out ({reason})", flush=True)


def _able(package: ModuleType, device: torch.device) -> list[str]:
    """Implementations to time; one that is interpreted has no time worth telling."""
    reasons = active_implementations(package, device, with_optional=True)
    able = [name for name, reason in reasons.items() if reason is None]
    return [name for name in able if not (name == "cuda" and device.type == "cpu")]


_PACKAGES: dict[str, ModuleType] = {
    "hash grid": hashgrid,
    "SDF network": sdf_network,
    "ReLU network": mlp,
    "marching": marching,
    "compositing": compositing,
    "Adam": adam,
}


def races(sizes: Sizes, device: torch.device) -> list[Race]:
    """All operations at the benchmark's size."""
    samples, few = sizes.samples[-1], sizes.slow_samples
    return [
        Race(f"hash grid, {samples} samples: features", hashgrid, functools.partial(_grid, sizes, device, 0)),
        Race(
            f"hash grid, {samples} samples: and first derivatives",
            hashgrid,
            functools.partial(_grid, sizes, device, 1),
        ),
        Race(
            f"hash grid, {samples} samples: and second derivatives",
            hashgrid,
            functools.partial(_grid, sizes, device, 2),
        ),
        Race(
            f"SDF network, {samples} samples: distance alone",
            sdf_network,
            functools.partial(_sdf, sizes, device, "sdf"),
        ),
        Race(
            f"SDF network, {samples} samples: forward",
            sdf_network,
            functools.partial(_sdf, sizes, device, "forward"),
        ),
        Race(
            f"SDF network, {samples} samples: forward and backward",
            sdf_network,
            functools.partial(_sdf, sizes, device, "both"),
        ),
        Race(
            f"ReLU network 70-64-64-3, {samples} rows: forward",
            mlp,
            functools.partial(_network, sizes, device, False),
        ),
        Race(
            f"ReLU network 70-64-64-3, {samples} rows: forward and backward",
            mlp,
            functools.partial(_network, sizes, device, True),
        ),
        Race(f"march, {sizes.rays} rays", marching, functools.partial(_march, sizes, device)),
        Race(
            f"drop hidden, {few} samples (the reference walks in Python)",
            marching,
            functools.partial(_drop, few, sizes, device),
        ),
        Race(
            f"compositing, {few} samples (the reference walks in Python): forward",
            compositing,
            functools.partial(_composite, few, sizes, device, False),
        ),
        Race(
            f"compositing, {few} samples (the reference walks in Python): forward and backward",
            compositing,
            functools.partial(_composite, few, sizes, device, True),
        ),
        Race(f"Adam, {sizes.optimizer_elements} elements", adam, functools.partial(_adam, sizes, device)),
    ]


def _grid(sizes: Sizes, device: torch.device, order: int, backend: str) -> Callable[[], Any]:
    case = grid_case(sizes.samples[-1], sizes.grid, device)
    entries = hashgrid.num_table_entries(case.geometry, backend)
    # tiny-cuda-nn has a table of its own size.
    table = case.table if entries == len(case.table) else case.table.new_zeros(entries, case.table.shape[1])
    positions, table = case.positions.clone().requires_grad_(order > 0), table.requires_grad_(order > 0)
    cotangent = case.cotangent.requires_grad_(order > 1)

    def run() -> Any:
        features = hashgrid.encode(positions, table, case.geometry, case.active_levels, backend)
        if order == 0:
            return features
        slope, d_table = torch.autograd.grad(features, (positions, table), cotangent, create_graph=order > 1)
        return d_table if order == 1 else torch.autograd.grad(slope, (table, cotangent), case.direction)

    return run


def _sdf(sizes: Sizes, device: torch.device, what: str, backend: str) -> Callable[[], Any]:
    case = sdf_case(grid_case(sizes.samples[-1], sizes.grid, device))
    grid = case.grid
    entries = (
        hashgrid.num_table_entries(grid.geometry, backend) if backend == "tinycudann" else len(grid.table)
    )
    table = grid.table if entries == len(grid.table) else grid.table.new_zeros(entries, grid.table.shape[1])
    parameters = [tensor.requires_grad_() for tensor in (table, *case.weights, *case.biases)]
    arguments = (
        grid.positions,
        table,
        grid.geometry,
        grid.active_levels,
        case.weights,
        case.biases,
        SOFTPLUS_BETA,
    )

    def run() -> Any:
        if what == "sdf":
            return sdf_network.sdf_only(*arguments, backend)
        results = sdf_network.sdf_with_gradient(*arguments, backend)
        if what == "forward":
            return results
        return torch.autograd.grad(results, parameters, (case.d_outputs, case.d_gradient))

    return run


def _network(sizes: Sizes, device: torch.device, derives: bool, backend: str) -> Callable[[], Any]:
    widths = [70, 64, 64, 3]
    case = network_case(sizes.samples[-1], widths, device)
    inputs = case.inputs.requires_grad_(derives)
    if backend == "tinycudann":
        # It owns its parameters: the choice is made where a network is built.
        from models.fields import make_network

        network = make_network(widths, backend).to(device)
        parameters, forward = [*network.parameters()], lambda: network(inputs)
    else:
        parameters = [tensor.requires_grad_(derives) for tensor in (*case.weights, *case.biases)]
        forward = functools.partial(mlp.relu_mlp, inputs, case.weights, case.biases, backend)

    def run() -> Any:
        outputs: Tensor = forward()
        return torch.autograd.grad(outputs, (inputs, *parameters), case.d_outputs) if derives else outputs

    return run


def _march(sizes: Sizes, device: torch.device, backend: str) -> Callable[[], Any]:
    case = march_case(sizes.rays, device, resolution=sizes.resolution)
    capacity = len(marching.march(case.rays, case.occupied, case.step, case.jitter, backend))
    step = torch.tensor(case.step, device=device)
    return lambda: marching.march(case.rays, case.occupied, step, case.jitter, backend, capacity)


def _drop(samples: int, sizes: Sizes, device: torch.device, backend: str) -> Callable[[], Any]:
    case = packed_case(samples, samples // 16, device)
    return lambda: marching.drop_hidden(
        case.samples, case.sdf, case.inv_s, case.step, 1e-3, "neus", backend, capacity=samples
    )


def _composite(
    samples: int, sizes: Sizes, device: torch.device, derives: bool, backend: str
) -> Callable[[], Any]:
    case = packed_case(samples, samples // 16, device)
    alpha, values = case.alpha.requires_grad_(derives), case.values.requires_grad_(derives)

    def run() -> Any:
        weights = compositing.render_weights(alpha, case.samples.offsets, backend)
        sums = compositing.accumulate(weights, values, case.samples.offsets, backend)
        return torch.autograd.grad(sums, (alpha, values), case.d_sums) if derives else sums

    return run


def _adam(sizes: Sizes, device: torch.device, backend: str) -> Callable[[], Any]:
    parameter = torch.nn.Parameter(torch.zeros(sizes.optimizer_elements, device=device))
    optimizer = adam.Adam([parameter], lr=1e-3, betas=(0.9, 0.99), eps=1e-15, backend=backend)
    parameter.grad = torch.ones_like(parameter)
    finite = torch.tensor(True, device=device)
    return lambda: optimizer.step(finite)
