"""Where a training step's time goes, and how near that is to what the device can do.

Letters: M marched samples, S rendered samples, R rays looked at, L levels, F features a level, b bytes of a
number in the table as it is read.

Bytes are those that have to cross the memory's interface if every operation reads its inputs and writes its
results once, with 8 F b bytes a level for a sample's corners; the coarse levels live in the cache, so that
what is counted for gathering may exceed what memory delivered. Operations are those of the matrix products,
two for each weight and sample; interpolation, activations and sums are small beside them and not counted.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_tools import (
    Clock,
    Report,
    Sizes,
    Table,
    copy_rate,
    matmul_rate,
    mean_column,
    memory_gib,
    new_trainer,
    take_steps,
)
from models.compositing import accumulate, render_weights
from models.marching import drop_hidden, march
from systems.adam import Adam, all_finite
from systems.device_step import DeviceStep
from systems.step import FIELDS, weighted_sum
from systems.trainer import Trainer


@dataclass(frozen=True)
class Phase:
    """A part of a step that can be run by itself."""

    name: str
    run: Callable[[], Any]
    bytes: float | None = None
    flops: float | None = None
    precision: str = "float32"
    """Whose measured matrix rate the operations are compared with."""


def run_phases(report: Report, sizes: Sizes, device: torch.device, *overrides: str) -> None:
    """Train, then measure every phase at the state that was reached."""
    ceilings = measure_ceilings(report, sizes, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(Path(folder), device, *sizes.overrides, *overrides)
        print(f"kernels: {trainer.model.backends}", flush=True)
        take_steps(trainer, sizes.training_steps)
        memory = report.table("Memory of training", "what", "GiB")
        memory.add("largest so far", memory_gib(device))
        if device.type == "cuda":
            memory.add("reserved by PyTorch's allocator", torch.cuda.max_memory_reserved(device) / 2**30)
        eager = new_trainer(Path(folder), device, *sizes.overrides, *overrides, "trainer.cuda_graph=false")
        eager.restore(trainer.save_checkpoint())
        whole = report.table("Whole steps", "step", "ms", "samples/s", "rays/s", "samples", "marched", "rays")
        seconds = {
            "eager": measure_steps(whole, "eager", eager, sizes),
            "recorded as a CUDA graph": measure_steps(whole, "recorded as a CUDA graph", trainer, sizes),
        }
        measure_phases(report, trainer, sizes, ceilings, seconds["eager"])


def measure_ceilings(report: Report, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """What this device reaches at best: GB/s of a copy (read and written), TFLOP/s of matrix products."""
    side = sizes.matmul_side
    table = report.table("Ceilings, as measured", "what", "rate", "unit")
    rates = {"copy": copy_rate(device, sizes.copy_bytes, sizes.repeats)}
    table.add(f"copy of {sizes.copy_bytes / 2**30:.3g} GiB, read and written", rates["copy"], "GB/s")
    for precision in ("float32", "tf32", "bfloat16"):
        rates[precision] = matmul_rate(device, precision, side, max(sizes.repeats // 3, 2))
        table.add(f"{side}^3 matrix product, {precision}", rates[precision], "TFLOP/s")
    # Three products of TF32 numbers make one of nearly float32's precision; a CPU has no need to.
    rates["tf32x3"] = rates["tf32"] / 3 if device.type == "cuda" else rates["float32"]
    return rates


def measure_steps(table: Table, name: str, trainer: Trainer, sizes: Sizes) -> float:
    """Milliseconds of a step by the wall clock, occupancy updates included: a median over blocks of steps."""
    clock = Clock(trainer.device)
    # A multiple of the steps between occupancy updates, so that each block has equally many.
    block = trainer.config.occupancy_every * (2 if trainer.device.type == "cuda" else 1)
    take_steps(trainer, 5)
    records: list[Any] = []

    repeats = max(3, sizes.repeats // 4)
    milliseconds = clock.wall(lambda: records.extend(take_steps(trainer, block)), repeats) / block
    rays, samples, marched = (
        mean_column(records, FIELDS.index(f"num_{what}")) for what in ("rays", "samples", "marched")
    )
    per_second = 1e3 / milliseconds
    table.add(
        name,
        milliseconds,
        samples * per_second,
        rays * per_second,
        round(samples),
        round(marched),
        round(rays),
    )
    return milliseconds


def measure_phases(
    report: Report, trainer: Trainer, sizes: Sizes, ceilings: dict[str, float], step_ms: float
) -> None:
    """One row a phase: milliseconds, and its share of the ceilings."""
    clock = Clock(trainer.device)
    table = report.table(
        "Phases",
        *("phase", "ms", "% of the eager step", "GB", "GB/s", "% of copy"),
        *("GFLOP", "TFLOP/s", "% of matrix rate", "matrix rate of"),
    )
    for phase in phases_of(trainer):
        milliseconds = clock.median(phase.run, sizes.repeats)
        cells: list[str | float | None] = [phase.name, milliseconds, 100 * milliseconds / step_ms]
        if phase.bytes is None:
            cells += [None, None, None]
        else:
            rate = phase.bytes / milliseconds / 1e6
            cells += [phase.bytes / 1e9, rate, 100 * rate / ceilings["copy"]]
        if phase.flops is None:
            cells += [None, None, None, None]
        else:
            rate = phase.flops / milliseconds / 1e9
            share = 100 * rate / ceilings[phase.precision]
            cells += [phase.flops / 1e9, rate, share, phase.precision]
        table.add(*cells)


def phases_of(trainer: Trainer) -> list[Phase]:
    """The phases of a step in their order, with the inputs that they have at the trainer's present state."""
    model, device_step, optimizer = trainer.model, trainer.device_step, trainer.optimizer
    assert isinstance(device_step, DeviceStep)
    assert isinstance(optimizer, Adam)
    budget, config = device_step.budget, model.config
    progress = trainer.system.progress_at(trainer.fraction_done())
    background = torch.ones(3, device=trainer.device)
    batch = trainer.batches.draw(device_step.max_rays)
    rays = budget.limit(batch.rays)
    step, inv_s = model.step_size(progress), model.inv_s(progress).detach()
    jitter = torch.rand(len(rays), device=trainer.device)
    prunes = config.min_transmittance > 0

    def run_march() -> Any:
        capacity = budget.marched if prunes else budget.rendered
        return march(rays, model.occupancy.occupied, step, jitter, model.backends.marching, capacity=capacity)

    marched = run_march()

    def run_look_ahead() -> Tensor:
        return model.query_sdf(marched.positions(rays), progress, marched.count)

    look_ahead = run_look_ahead()

    def run_drop() -> Any:
        if not prunes:
            return marched
        return drop_hidden(
            *(marched, look_ahead, inv_s, step, config.min_transmittance),
            *(config.density, model.backends.marching),
            capacity=budget.rendered,
        )

    samples = run_drop()
    positions, directions = samples.positions(rays), samples.directions(rays)
    lengths = samples.t_ends - samples.t_starts

    def run_sdf() -> tuple[Tensor, Tensor]:
        return model.sdf_field(positions, progress.active_levels, samples.count)

    outputs, gradient = run_sdf()
    features = outputs.detach().requires_grad_()
    normal = torch.nn.functional.normalize(gradient.detach(), dim=1, eps=1e-6).requires_grad_()

    def run_color() -> Tensor:
        return model.radiance(features, rays.directions, samples.ray_indices, normal, samples.count)

    rgb = run_color()
    values = torch.cat([rgb.detach(), torch.ones_like(rgb[:, :1])], dim=1).requires_grad_()
    sdf = features.detach()[:, 0].clone().requires_grad_()

    def run_compositing() -> tuple[Tensor, Tensor]:
        cosine = (directions * normal).sum(dim=1)
        alpha = model.density.alpha(sdf, cosine, lengths, model.inv_s(progress), progress.cos_anneal)
        weights = render_weights(alpha, samples.offsets, model.backends.compositing)
        pixels = accumulate(weights, values, samples.offsets, model.backends.compositing)
        geometry = torch.cat([normal.detach(), samples.t_middle[:, None]], dim=1)
        return pixels, accumulate(weights.detach(), geometry, samples.offsets, model.backends.compositing)

    pixels, _ = run_compositing()
    render = model.render(batch.rays, progress, background, trainer.generator, budget)

    def run_losses() -> Tensor:
        field = partial(model.query_field, progress=progress)
        terms = trainer.system.loss_terms(render, batch, progress, field, trainer.generator)
        return weighted_sum(terms, progress.loss_weights)

    judgement = trainer.forward(progress, device_step.max_rays, budget)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def derive(result: Any, inputs: list[Tensor]) -> Callable[[], Any]:
        """The backward pass from a phase's results to its inputs, with some cotangent."""
        results = list(result) if isinstance(result, tuple) else [result]
        cotangents = [torch.randn_like(one) for one in results]
        return lambda: torch.autograd.grad(results, inputs, cotangents, retain_graph=True, allow_unused=True)

    optimizer.zero_grad(set_to_none=True)
    judgement.loss.backward(retain_graph=True)

    def run_optimizer() -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.step(all_finite([judgement.loss.detach(), *gradients]))

    sdf_parameters, color_parameters = list(model.sdf_field.parameters()), list(model.radiance.parameters())
    work = Work.of(trainer, len(rays), int(marched.count), int(samples.count))
    color_rate = _rate_of(getattr(config.radiance, "precision", "float32"), trainer.device)
    return [
        Phase("draw rays", lambda: trainer.batches.draw(device_step.max_rays), work.draw_bytes),
        Phase("march", run_march, work.march_bytes),
        Phase("look-ahead sdf", run_look_ahead, work.look_ahead_bytes, work.look_ahead_flops, "tf32x3"),
        Phase("drop hidden", run_drop, work.drop_bytes),
        Phase("encode, sdf and normals: forward", run_sdf, work.sdf_bytes, work.sdf_flops, "tf32x3"),
        Phase("colour network: forward", run_color, work.color_bytes, work.color_flops, color_rate),
        Phase("alphas, compositing: forward", run_compositing, work.compositing_bytes),
        Phase("losses", run_losses),
        Phase(
            "alphas, compositing: backward", derive(pixels, [sdf, normal, values]), 2 * work.compositing_bytes
        ),
        Phase(
            "colour network: backward",
            derive(rgb, [features, normal, *color_parameters]),
            *(work.color_backward_bytes, work.color_backward_flops, color_rate),
        ),
        Phase(
            "encode, sdf and normals: backward",
            derive((outputs, gradient), sdf_parameters),
            *(work.sdf_backward_bytes, work.sdf_backward_flops, "tf32x3"),
        ),
        Phase("whole forward", lambda: trainer.forward(progress, device_step.max_rays, budget)),
        Phase(
            "whole backward",
            lambda: torch.autograd.grad(judgement.loss, parameters, retain_graph=True, allow_unused=True),
        ),
        Phase(
            f"occupancy update (every {trainer.config.occupancy_every} steps)",
            lambda: model.update_occupancy(progress, trainer.generator),
        ),
        # Last, because it moves the parameters.
        Phase("optimiser", run_optimizer, work.optimizer_bytes),
    ]


def _rate_of(precision: str, device: torch.device) -> str:
    if device.type != "cuda":
        return "float32"
    return "tf32x3" if precision == "float32" else precision


@dataclass(frozen=True)
class Work:
    """Bytes and operations of the phases; the letters are the module's."""

    draw_bytes: float
    march_bytes: float
    look_ahead_bytes: float
    look_ahead_flops: float
    drop_bytes: float
    sdf_bytes: float
    sdf_flops: float
    color_bytes: float
    color_flops: float
    compositing_bytes: float
    color_backward_bytes: float
    color_backward_flops: float
    sdf_backward_bytes: float
    sdf_backward_flops: float
    optimizer_bytes: float

    @classmethod
    def of(cls, trainer: Trainer, num_rays: int, marched: int, rendered: int) -> "Work":
        """Count for a trainer's model and so many rays and samples."""
        field, radiance = trainer.model.sdf_field, trainer.model.radiance
        geometry, table = field.grid.geometry, field.grid.table
        widths = field.grid.width, len(field.biases[-1])
        corners = geometry.num_levels * 8 * table.shape[1]
        read = 2 if geometry.reads_half else 4
        # Each weight multiplies and adds once: the value alone needs one row of the last matrix.
        layers = [2 * weight.numel() for weight in field.weights]
        value = sum(layers[:-1]) + 2 * field.weights[-1].shape[1]
        # The distance's gradient goes back through all layers but the last one's other outputs.
        slope = value
        color = 2 * sum(parameter.numel() for parameter in radiance.parameters() if parameter.dim() == 2)
        color_row = field.output_width + trainer.model.config.radiance.direction_degree**2 + 3
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        # Outputs, the encoding behind them, the gradient.
        sdf_row = 4 * (widths[1] + widths[0] + 3)
        m, s, r = float(marched), float(rendered), float(num_rays)
        return cls(
            # A ray: 12 + 12 + 4 + 4 + 8, its pixel's colour and mask 16, read from one sector of 32 each.
            draw_bytes=r * (40 + 16 + 64),
            # A ray's 40 and jitter 4, offsets 8; a sample's two distances and its ray's index.
            march_bytes=r * 52 + m * 16,
            # Its ray (24 from cache), index 8, distances 8; position 12 written and read; the distance 4.
            look_ahead_bytes=m * (16 + 24 + 4 + corners * read),
            look_ahead_flops=m * value,
            # Distance, its middle, keep or not (and its running count 8); what is kept is moved.
            drop_bytes=m * (4 + 8 + 1 + 8 + 16) + s * 16,
            sdf_bytes=s * (12 + corners * read + sdf_row),
            sdf_flops=s * (sum(layers) + slope),
            # Rows are joined (written, read) and give a colour.
            color_bytes=s * (4 * 2 * color_row + 12),
            color_flops=s * color,
            # Distance, cosine's two vectors, length; alpha, transmittance, weight; colour and geometry.
            compositing_bytes=s * (4 + 24 + 4 + 3 * 8 + 2 * 16 + 2 * 4),
            # Rows read, their gradient written, split and added.
            color_backward_bytes=s * (4 * 4 * color_row + 12),
            # The forward pass again, then two products of its size.
            color_backward_flops=3 * s * color,
            # Upstream gradients in; corners read once and added to (read, written) in float32; the table's
            # gradient filled with zeros before.
            sdf_backward_bytes=s * (12 + corners * (read + 8) + sdf_row) + 4 * table.numel(),
            sdf_backward_flops=3 * s * (sum(layers) + slope),
            # The gradient twice (is it finite?); parameter and both means read and written.
            optimizer_bytes=4 * (2 + 6) * float(parameters),
        )


def run_profile(report: Report, sizes: Sizes, device: torch.device, *overrides: str) -> None:
    """The forty kernels that take the most time over eager steps, and a trace for chrome://tracing."""
    steps = 20 if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(Path(folder), device, *sizes.overrides, *overrides, "trainer.cuda_graph=false")
        take_steps(trainer, sizes.training_steps // 2)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        Clock(device).wait()
        with profile(activities=activities) as profiler:
            take_steps(trainer, steps)
            Clock(device).wait()
    time_of = _device_time if device.type == "cuda" else _host_time
    events = sorted(profiler.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    table = report.table(f"Kernels of {steps} eager steps", "ms a step", "% of all", "calls a step", "kernel")
    for event in events[:40]:
        milliseconds = time_of(event) / 1e3 / steps
        table.add(milliseconds, 100 * time_of(event) / max(total, 1e-9), event.count / steps, event.key[:110])
    print(f"all kernels: {total / 1e3 / steps:.3f} ms a step", flush=True)
    trace = report.out / "trace.json"
    profiler.export_chrome_trace(str(trace))
    print(f"wrote {trace}", flush=True)


def _device_time(event: Any) -> float:
    """Microseconds of a kernel; operators, under which the same kernels are listed again, count nothing."""
    is_kernel = event.device_type != torch.autograd.DeviceType.CPU
    return float(event.self_device_time_total) if is_kernel else 0.0


def _host_time(event: Any) -> float:
    return float(event.self_cpu_time_total)
