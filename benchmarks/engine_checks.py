"""Is the engine right on this machine: its operations against plain PyTorch, and whole training steps.

An operation's error is ||a - b|| / ||b|| against the PyTorch reference in float64. A float32 position lies up
to 1e-4 of a cell off at the finest levels, whoever computes, so that the reference in float32 says how much
error is float32's own: an implementation may have four times as much, and at least 1e-5.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.engine_cases import (
    GridCase,
    MarchCase,
    NetworkCase,
    PackedCase,
    SDFCase,
    grid_case,
    march_case,
    network_case,
    packed_case,
    sdf_case,
)
from benchmarks.engine_tools import (
    Report,
    Sizes,
    Table,
    active_implementations,
    first_line,
    new_trainer,
    take_steps,
)
from encoder import hashgrid
from models import compositing, marching, mlp, sdf_network
from models.fields import SOFTPLUS_BETA
from models.opacity import DENSITIES, DensityName
from systems import adam
from systems.trainer import Trainer
from utils.types import RaySamples

Results = dict[str, Tensor]
Evaluate = Callable[[str, torch.dtype, slice, Tensor | None], tuple[Results, Results]]
"""(backend, dtype, rows, count) -> what there is per row, and sums over the rows."""

_FLOOR = 1e-5
_SLACK = 4.0
_CHUNK = 2**15
"""Rows that the reference takes at once: in float64 and differentiated twice it needs 100 kB for each."""
_RELU_TOLERANCE = {"float32": 2e-5, "tf32": 5e-3, "bfloat16": 5e-2}
"""Each factor is off by up to 2^-22, 2^-10 (digits may be cut off) or 2^-8, in four products in a row."""
_RELU_MARGIN = {"float32": 1e-4, "tf32": 4e-3, "bfloat16": 2e-2}
"""How close to a kink, in standard deviations of all units, rounding may decide on a unit."""
_DECISIONS = 2e-3
"""Share of samples whose fate may hang on rounding."""


def run_checks(
    report: Report, sizes: Sizes, device: torch.device, only: str = "", backend: str | None = None
) -> bool:
    """Run every check whose name contains ``only``, of one implementation or of all; whether all passed."""
    table = report.table(
        "Checks", "operation", "case", "quantity", "error", "of float32 PyTorch", "tolerance", "verdict"
    )
    judge = Judge(table, backend)
    for name, check in _CHECKS.items():
        if only in name:
            check(judge, sizes, device)
    print(f"\n{judge.passed} passed, {judge.failed} failed", flush=True)
    return judge.failed == 0


# ---- judging -----------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Turns errors into rows of the table, and counts."""

    table: Table
    backend: str | None
    """The only implementation that is looked at; ``None``: all of ours that run here."""
    passed: int = 0
    failed: int = 0

    def able(self, package: ModuleType, device: torch.device) -> list[str]:
        """Implementations to check."""
        reasons = active_implementations(package, device).items()
        return [name for name, reason in reasons if reason is None and self.backend in (None, name)]

    def decide(
        self, where: tuple[str, str, str], error: float, tolerance: float, baseline: float | None = None
    ) -> None:
        """PASS if the error is a number up to the tolerance."""
        is_good = error <= tolerance
        self.passed, self.failed = self.passed + is_good, self.failed + (not is_good)
        self.table.add(*where, error, baseline, tolerance, "PASS" if is_good else "FAIL")

    @contextlib.contextmanager
    def on(self, operation: str, case: str) -> Iterator[None]:
        """Whatever is raised inside is a failure of this case, and the others go on."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            self.table.add(operation, case, first_line(error), None, None, None, "FAIL")

    def compare(
        self,
        operation: str,
        case: str,
        backend: str,
        evaluate: Evaluate,
        shape: tuple[int, int],
        tolerance: float | None = None,
    ) -> None:
        """Judge a row-wise operation, of whose ``shape[0]`` rows the first ``shape[1]`` are no padding."""
        num_rows, count = shape
        with self.on(f"{operation} {backend}", case):
            exact, rounded = (
                _in_chunks(evaluate, dtype, num_rows, count) for dtype in (torch.float64, torch.float32)
            )
            on_device = (
                None if count == num_rows else torch.tensor(count, device=next(iter(exact.values())).device)
            )
            rows, sums = evaluate(backend, torch.float32, slice(0, num_rows), on_device)
            for name, found in (rows | sums).items():
                baseline = relative_error(rounded[name], exact[name])
                allowed = max(_FLOOR, _SLACK * baseline) if tolerance is None else tolerance
                error = relative_error(found, exact[name])
                self.decide((f"{operation} {backend}", case, name), error, allowed, baseline)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite where the shapes differ, 0 where both are empty."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    norm = float(expected.norm())
    return float((found - expected).norm()) / norm if norm > 0 else float(found.norm())


def _in_chunks(evaluate: Evaluate, dtype: torch.dtype, num_rows: int, count: int) -> Results:
    """The reference's results, computed for some rows at a time and without what is padding."""
    pieces: dict[str, list[Tensor]] = {}
    results: Results = {}
    for start in range(0, count, _CHUNK) if count > 0 else [0]:
        part = slice(start, min(start + _CHUNK, count))
        rows, sums = evaluate("reference", dtype, part, None)
        # Without their graphs, whose size is why there are chunks.
        for name, found in rows.items():
            pieces.setdefault(name, []).append(found.detach())
        for name, found in sums.items():
            results[name] = found.detach() + results.get(name, 0.0)
    for name, found in pieces.items():
        padding = found[0].new_zeros(num_rows - count, *found[0].shape[1:])
        results[name] = torch.cat([*found, padding])
    return results


# ---- row-wise operations -----------------------------------------------------------------------------------


def _table_for(case: GridCase, backend: str, dtype: torch.dtype) -> Tensor:
    # Kernels read a half copy on their own accord; the reference has to be given it.
    if case.geometry.reads_half and backend == "reference":
        return case.table.half().to(dtype)
    return case.table.to(dtype)


def evaluate_grid(case: GridCase) -> Evaluate:
    """Features with first and second derivatives."""

    def evaluate(
        backend: str, dtype: torch.dtype, rows: slice, count: Tensor | None
    ) -> tuple[Results, Results]:
        positions = case.positions[rows].to(dtype).requires_grad_()
        table = _table_for(case, backend, dtype).requires_grad_()
        cotangent = case.cotangent[rows].to(dtype).requires_grad_()
        direction = case.direction[rows].to(dtype)
        levels = _levels(case, backend, positions.device)
        features = hashgrid.encode(positions, table, case.geometry, levels, backend, count)
        slope, d_table = torch.autograd.grad(features, (positions, table), cotangent, create_graph=True)
        d2_table, d2_cotangent = torch.autograd.grad(slope, (table, cotangent), direction)
        return (
            {
                "position": features[:, :3],
                "features": features[:, 3:],
                "d/dposition": slope,
                "d2/dposition dcotangent": d2_cotangent[:, 3:],
            },
            {"d/dtable": d_table, "d2/dposition dtable": d2_table},
        )

    return evaluate


def _levels(case: GridCase, backend: str, device: torch.device) -> float | Tensor:
    """A number for the reference, for the others a number on the device where some levels are closed."""
    if backend == "reference" or case.active_levels == case.geometry.num_levels:
        return case.active_levels
    return torch.tensor(case.active_levels, device=device)


def evaluate_sdf(case: SDFCase) -> Evaluate:
    """The SDF network's outputs and its gradient, and the derivatives of both."""
    grid, width = case.grid, case.grid.cotangent.shape[1]

    def evaluate(
        backend: str, dtype: torch.dtype, rows: slice, count: Tensor | None
    ) -> tuple[Results, Results]:
        table = _table_for(grid, backend, dtype).requires_grad_()
        weights = [weight.to(dtype).requires_grad_() for weight in case.weights]
        biases = [bias.to(dtype).requires_grad_() for bias in case.biases]
        positions = grid.positions[rows].to(dtype)
        arguments = (grid.geometry, _levels(grid, backend, positions.device), weights, biases, SOFTPLUS_BETA)
        outputs, gradient = sdf_network.sdf_with_gradient(positions, table, *arguments, backend, count)
        names = [
            "d/dtable",
            *(f"d/dweight {layer + 1}" for layer in range(len(weights))),
            *(f"d/dbias {layer + 1}" for layer in range(len(biases))),
        ]
        cotangents = case.d_outputs[rows].to(dtype), case.d_gradient[rows].to(dtype)
        derivatives = torch.autograd.grad((outputs, gradient), (table, *weights, *biases), cotangents)
        sdf = sdf_network.sdf_only(positions, table, *arguments, backend, count)
        return (
            {
                "outputs": outputs[:, :-width],
                "encoding": outputs[:, 3 - width :],
                "gradient": gradient,
                "sdf alone": sdf,
            },
            dict(zip(names, derivatives, strict=True)),
        )

    return evaluate


def evaluate_network(case: NetworkCase, precision: mlp.Precision) -> Evaluate:
    """A ReLU network with its derivatives; near a kink, where rounding decides, no slope is asked for."""
    with torch.no_grad():
        hidden, is_clear = (
            case.inputs.double().nan_to_num(),
            torch.ones_like(case.inputs[:, 0], dtype=torch.bool),
        )
        for weight, bias in zip(case.weights[:-1], case.biases[:-1], strict=True):
            sums = torch.nn.functional.linear(hidden, weight.double(), bias.double())
            if len(sums) > 0:
                is_clear &= (sums.abs() > _RELU_MARGIN[precision] * sums.square().mean().sqrt()).all(dim=1)
            hidden = sums.relu()
        d_outputs = case.d_outputs * is_clear[:, None]

    def evaluate(
        backend: str, dtype: torch.dtype, rows: slice, count: Tensor | None
    ) -> tuple[Results, Results]:
        inputs = case.inputs[rows].to(dtype).requires_grad_()
        weights = [weight.to(dtype).requires_grad_() for weight in case.weights]
        biases = [bias.to(dtype).requires_grad_() for bias in case.biases]
        outputs = mlp.relu_mlp(inputs, weights, biases, backend, count, precision)
        derivatives = torch.autograd.grad(outputs, (inputs, *weights, *biases), d_outputs[rows].to(dtype))
        names = [
            *(f"d/dweight {layer + 1}" for layer in range(len(weights))),
            *(f"d/dbias {layer + 1}" for layer in range(len(biases))),
        ]
        return (
            {"outputs": outputs, "d/dinputs": derivatives[0]},
            dict(zip(names, derivatives[1:], strict=True)),
        )

    return evaluate


def check_hash_grid(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """Values, first and second derivatives of the encoding."""
    for backend in judge.able(hashgrid, device):
        for title, case in _grid_cases(sizes, device, backend):
            with judge.on(f"hash grid {backend}", title):
                shape = len(case.positions), case.count
                judge.compare("hash grid", title, backend, evaluate_grid(case), shape)


def _grid_cases(sizes: Sizes, device: torch.device, backend: str) -> Iterator[tuple[str, GridCase]]:
    grid, odd = sizes.grid, sizes.odd_samples
    for samples in sizes.samples:
        yield f"{samples} samples", grid_case(samples, grid, device)
    yield f"{odd} samples, 2.5 levels open", grid_case(odd, grid, device, active_levels=2.5)
    yield f"{odd - 3} of {odd} samples", grid_case(odd, grid, device, padding=3)
    yield f"half of {odd} samples", grid_case(odd, grid, device, padding=odd // 2)
    yield f"none of {odd} samples", grid_case(odd, grid, device, padding=odd)
    yield "1 sample", grid_case(1, grid, device)
    yield "no samples", grid_case(0, grid, device)
    yield f"{odd} samples, 4 features", grid_case(odd, grid, device, features_per_level=4)
    if backend == "cuda":
        yield f"{odd} samples, half table", grid_case(odd, grid, device, reads_half=True)


def check_sdf_network(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """The network fused with the grid: both results, and the first derivatives of both."""
    for backend in judge.able(sdf_network, device):
        for title, grid in _grid_cases(sizes, device, backend):
            for layers in (1, 2) if title == f"{sizes.odd_samples} samples, 2.5 levels open" else (1,):
                shown = title if layers == 1 else f"{title}, 2 layers"
                with judge.on(f"SDF network {backend}", shown):
                    case = sdf_case(grid, layers)
                    shape = len(grid.positions), grid.count
                    judge.compare("SDF network", shown, backend, evaluate_sdf(case), shape)


def check_relu_network(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """Colour network, background's networks; each precision."""
    odd = sizes.odd_samples
    for backend in judge.able(mlp, device):
        for precision in _precisions(backend, device):
            for samples, widths, padding in (
                *((samples, [70, 64, 64, 3], 0) for samples in sizes.samples),
                (odd - 1, [35, 32, 9], 0),
                (odd - 1, [25, 32, 3], odd // 3),
                (odd, [67, 128, 128, 128, 16], 1),
                (odd, [19, 64, 64, 3], odd),
                *((samples, [70, 64, 64, 3], 0) for samples in (1, 0)),
            ):
                title = f"{samples - padding} of {samples} rows, {'-'.join(map(str, widths))}, {precision}"
                with judge.on(f"ReLU network {backend}", title):
                    case = network_case(samples, widths, device, padding)
                    judge.compare(
                        *("ReLU network", title, backend, evaluate_network(case, precision)),
                        (samples, case.count),
                        _RELU_TOLERANCE[precision],
                    )


def _precisions(backend: str, device: torch.device) -> tuple[mlp.Precision, ...]:
    if backend != "cuda":
        return ("float32",)
    # The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    return ("float32", "tf32", "bfloat16") if device.type == "cuda" else ("float32", "tf32")


# ---- rays --------------------------------------------------------------------------------------------------


def _march(
    case: MarchCase, backend: str, capacity: int | None = None, step: Tensor | None = None
) -> RaySamples:
    return marching.march(
        case.rays, case.occupied, case.step if step is None else step, case.jitter, backend, capacity
    )


def _marks(samples: RaySamples, case: MarchCase) -> Tensor:
    """Which of a ray's lattice positions carry samples, as one number each."""
    count = int(samples.count)
    rays = samples.ray_indices[:count]
    ticks = (samples.t_middle[:count] - case.rays.near[rays]) / case.step - case.jitter[rays]
    return rays * 2**20 + ticks.round().long()


def _share_of_differences(found: Tensor, expected: Tensor) -> float:
    """How many of two sets' elements are in one only, over those of the second."""
    both = torch.isin(found, expected).sum()
    return float(len(found) + len(expected) - 2 * both) / max(len(expected), 1)


def check_marching(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """The same samples as the reference's; with a capacity the first of them; padding is zero."""
    for backend in judge.able(marching, device):
        for num_levels, num_rays in ((1, sizes.rays), (2, sizes.rays), (1, 1), (1, 0)):
            title = f"{num_rays} rays, {num_levels} levels"
            with judge.on(f"march {backend}", title):
                case = march_case(num_rays, device, num_levels, sizes.resolution)
                expected, found = _march(case, "reference"), _march(case, backend)
                where = f"march {backend}", f"{title}, {len(expected)} samples"
                error = _share_of_differences(_marks(found, case), _marks(expected, case))
                judge.decide((*where, "share of samples that differ"), error, _DECISIONS)
                counts = torch.bincount(found.ray_indices, minlength=num_rays)
                judge.decide((*where, "offsets"), relative_error(found.offsets.diff(), counts), 0.0)
                lengths = (found.t_ends - found.t_starts - case.step).abs().max() if len(found) else 0.0
                judge.decide((*where, "lengths"), float(lengths) / case.step, 1e-3)
                _check_capacity(judge, case, found, backend, title)


def _check_capacity(judge: Judge, case: MarchCase, packed: RaySamples, backend: str, title: str) -> None:
    for share, what in ((0.6, "too few rows"), (1.3, "more rows than samples")):
        capacity = int(share * len(packed)) + 1
        step = torch.tensor(case.step, device=case.jitter.device)
        fixed = _march(case, backend, capacity, step)
        assert fixed.is_served is not None
        count = int(fixed.count)
        fits = packed.offsets[1:] <= capacity
        where = f"march {backend}", f"{title}, {what}"
        judge.decide((*where, "rays served"), float((fixed.is_served != fits).sum()), 0.0)
        rows = torch.stack([fixed.t_starts, fixed.t_ends, fixed.ray_indices.float()])
        same = torch.stack([packed.t_starts, packed.t_ends, packed.ray_indices.float()])[:, :count]
        judge.decide((*where, "rows"), relative_error(rows[:, :count], same), 1e-6)
        judge.decide((*where, "padding"), float(rows[:, count:].abs().sum()), 0.0)


def check_drop_hidden(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """What is kept, against the reference, and at full size against the Numba version on the CPU."""
    for backend, density in product(judge.able(marching, device), DENSITIES):
        for samples, other in ((sizes.slow_samples, "reference"), (sizes.samples[-1], "cpu")):
            for capacity in (None, samples):
                padding = 0 if capacity is None else samples // 8
                title = f"{density}, {samples - padding} of {samples} samples, against {other}"
                with judge.on(f"drop hidden {backend}", title):
                    case = packed_case(samples, samples // 16, device, padding)
                    on_cpu = packed_case(samples, samples // 16, torch.device("cpu"), padding)
                    found = _visible(case, density, backend, capacity)
                    expected = _visible(on_cpu, density, other, capacity)
                    marks, wanted = (
                        kept.ray_indices * 2**20 + (kept.t_middle / case.step).round().long()
                        for kept in (_real(found), _real(expected))
                    )
                    where = f"drop hidden {backend}", title
                    error = _share_of_differences(marks.cpu(), wanted)
                    judge.decide((*where, "share of samples that differ"), error, _DECISIONS)
                    counts = torch.bincount(_real(found).ray_indices, minlength=samples // 16)
                    judge.decide((*where, "offsets"), relative_error(found.offsets.diff(), counts), 0.0)


def _visible(case: PackedCase, density: DensityName, backend: str, capacity: int | None) -> RaySamples:
    return marching.drop_hidden(
        *(case.samples, case.sdf, case.inv_s, case.step, 1e-3, density, backend), capacity=capacity
    )


def _real(samples: RaySamples) -> RaySamples:
    """Without padding."""
    count = int(samples.count)
    columns = samples.t_starts[:count], samples.t_ends[:count], samples.ray_indices[:count]
    return RaySamples(*columns, samples.offsets)


def check_compositing(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """Weights and sums with their derivatives."""
    largest = sizes.samples[-1]
    for backend in judge.able(compositing, device):
        for samples, rays, padding in (
            (largest, sizes.rays, 0),
            (largest, sizes.rays, largest // 3),
            (largest, sizes.rays, largest),
            (1, 1, 0),
            (0, sizes.rays, 0),
        ):
            title = f"{samples - padding} of {samples} samples, {rays} rays"
            with judge.on(f"compositing {backend}", title):
                case = packed_case(samples, rays, device, padding)
                exact, rounded = (
                    _composited(case, "reference", dtype) for dtype in (torch.float64, torch.float32)
                )
                for name, found in _composited(case, backend, torch.float32).items():
                    baseline = relative_error(rounded[name], exact[name])
                    judge.decide(
                        (f"compositing {backend}", title, name),
                        relative_error(found, exact[name]),
                        max(_FLOOR, _SLACK * baseline),
                        baseline,
                    )


def _composited(case: PackedCase, backend: str, dtype: torch.dtype) -> Results:
    offsets = case.samples.offsets
    alpha = case.alpha.to(dtype).requires_grad_()
    values = case.values.to(dtype).requires_grad_()
    weights = compositing.render_weights(alpha, offsets, backend)
    (d_alpha,) = torch.autograd.grad(weights, alpha, case.d_weights.to(dtype))
    leaf = weights.detach().requires_grad_()
    sums = compositing.accumulate(leaf, values, offsets, backend)
    d_leaf, d_values = torch.autograd.grad(sums, (leaf, values), case.d_sums.to(dtype))
    return {
        "weights": weights,
        "d weights/dalpha": d_alpha,
        "sums": sums,
        "d sums/dweights": d_leaf,
        "d sums/dvalues": d_values,
    }


# ---- the optimiser -----------------------------------------------------------------------------------------


def check_adam(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """Twenty steps of a large and of a small parameter against torch.optim.Adam's."""
    for backend in judge.able(adam, device):
        for skips in (False, True):
            title = f"{sizes.optimizer_elements} elements{', untouched ones skipped' if skips else ''}"
            with judge.on(f"Adam {backend}", title):
                _check_adam(judge, f"Adam {backend}", title, backend, sizes, device, skips)


def _check_adam(
    judge: Judge, operation: str, title: str, backend: str, sizes: Sizes, device: torch.device, skips: bool
) -> None:
    generator = torch.Generator(device).manual_seed(6)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    starts = [draw(sizes.optimizer_elements - 1).reshape(-1, 1), draw(17)]
    ours = [torch.nn.Parameter(start.clone()) for start in starts]
    exact = [torch.nn.Parameter(start.double()) for start in starts]
    rounded = [torch.nn.Parameter(start.clone()) for start in starts]
    rate = torch.tensor(0.01, device=device)
    settings = {"betas": (0.9, 0.99), "eps": 1e-15}
    optimizer = adam.Adam([{"params": ours, "lr": rate}], **settings, skip_untouched=skips, backend=backend)
    others = [torch.optim.Adam(parameters, lr=0.01, **settings) for parameters in (exact, rounded)]
    # Rows that no sample touches; torch.optim.Adam does the same to them where they never are.
    masks = [(torch.arange(len(start), device=device) % 3 != 0).reshape_as(start) for start in starts]
    truths = torch.tensor(True, device=device), torch.tensor(False, device=device)
    for _ in range(20):
        for start, mask, *parameters in zip(starts, masks, ours, exact, rounded, strict=True):
            gradient = draw(start.numel()).reshape_as(start) * mask
            for parameter in parameters:
                parameter.grad = gradient.to(parameter.dtype)
        optimizer.step(truths[0])
        for other in others:
            other.step()
    for index, name in enumerate(("large parameter's way", "small parameter's way")):
        way, baseline = (
            relative_error(after[index].double() - starts[index], exact[index] - starts[index])
            for after in (ours, rounded)
        )
        judge.decide((operation, title, name), way, max(_FLOOR, _SLACK * baseline), baseline)
    before = [parameter.detach().clone() for parameter in ours]
    optimizer.step(truths[1])
    moved = sum(
        float((parameter.detach() - old).abs().sum()) for parameter, old in zip(ours, before, strict=True)
    )
    judge.decide((operation, title, "moved by a bad step"), moved, 0.0)


# ---- training ----------------------------------------------------------------------------------------------


def check_training(judge: Judge, sizes: Sizes, device: torch.device) -> None:
    """Recorded steps against eager ones, waiting for the device, and checkpoints that change devices."""
    with tempfile.TemporaryDirectory() as folder:
        for name, check in (
            ("recorded against eager", _check_graph),
            ("no waiting for the device", _check_waiting),
            ("checkpoint between devices", _check_checkpoints),
        ):
            with judge.on("training", name):
                check(judge, name, sizes, device, Path(folder))


def _check_graph(judge: Judge, name: str, sizes: Sizes, device: torch.device, folder: Path) -> None:
    """Sums over atomics differ from run to run: two eager runs say by how much."""

    def losses(records: str) -> Tensor:
        trainer = new_trainer(folder, device, *sizes.overrides, f"trainer.cuda_graph={records}")
        return torch.stack([record.loss for record in take_steps(trainer, sizes.graph_steps)]).cpu()

    eager, again, recorded = losses("false"), losses("false"), losses("true")
    print("step  eager  eager again  recorded")
    for step, row in enumerate(zip(eager.tolist(), again.tolist(), recorded.tolist(), strict=True)):
        print(f"{step:4d}  {row[0]:.6f}  {row[1]:.6f}  {row[2]:.6f}", flush=True)
    noise = float(((again - eager) / eager).abs().max())
    error = float(((recorded - eager) / eager).abs().max())
    title = f"{name}, {sizes.graph_steps} steps"
    judge.decide(
        ("training", title, "greatest relative difference of a loss"), error, max(1e-3, 5 * noise), noise
    )


def _check_waiting(judge: Judge, name: str, sizes: Sizes, device: torch.device, folder: Path) -> None:
    """Steps, occupancy updates included, while PyTorch forbids to wait."""
    if device.type != "cuda":
        judge.table.add("training", name, "a CPU has nothing to wait for", None, None, None, "SKIP")
        return
    for records in ("false", "true"):
        trainer = new_trainer(folder, device, *sizes.overrides, f"trainer.cuda_graph={records}")
        every = trainer.config.occupancy_every
        take_steps(trainer, 2 * every)
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_steps(trainer, 2 * every)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        title = f"{name}, {'recorded' if records == 'true' else 'eager'}"
        judge.decide(("training", title, "waits"), 0.0, 0.0)


def _check_checkpoints(judge: Judge, name: str, sizes: Sizes, device: torch.device, folder: Path) -> None:
    """Train here, go on on the CPU (with PyTorch's own Adam), and here again."""
    packed = *sizes.overrides, "trainer.buffers=packed"
    first = new_trainer(folder, device, *sizes.overrides)
    second = new_trainer(folder, torch.device("cpu"), *packed, sizes_for=device.type)
    third = new_trainer(folder, device, *sizes.overrides)
    for source, target, way in ((first, second, f"{device} to cpu"), (second, third, f"cpu to {device}")):
        take_steps(source, 4)
        target.restore(source.save_checkpoint())
        title = f"{name}, {way}"
        judge.decide(("training", title, "state"), _difference_of_states(source, target), 0.0)
        (record,) = take_steps(target, 1)
        loss = float(record.loss)
        judge.decide(
            ("training", title, "loss is finite"), 0.0 if loss == loss and record.finite else 1.0, 0.0
        )


def _difference_of_states(first: Trainer, second: Trainer) -> float:
    """Summed differences of weights and of the optimiser's means; of the steps, too."""
    total = float(abs(first.step - second.step))
    for key, value in first.model.state_dict().items():
        total += float((value.cpu().double() - second.model.state_dict()[key].cpu().double()).abs().sum())
    states = [list(trainer.optimizer.state_dict()["state"].values()) for trainer in (first, second)]
    for one, other in zip(*states, strict=True):
        total += sum(
            float((one[key].cpu() - other[key].cpu()).abs().sum()) for key in ("exp_avg", "exp_avg_sq")
        )
    return total


_CHECKS: dict[str, Callable[[Judge, Sizes, torch.device], None]] = {
    "hash grid": check_hash_grid,
    "sdf network": check_sdf_network,
    "relu network": check_relu_network,
    "march": check_marching,
    "drop hidden": check_drop_hidden,
    "compositing": check_compositing,
    "adam": check_adam,
    "training": check_training,
}
