"""From the first step to a mesh: how well held-out views are shown after so many seconds of training."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_tools import SYNTHETIC, Clock, Report, Sizes, memory_gib, new_trainer
from systems.evaluate import measure_views, test
from systems.step import FIELDS
from systems.trainer import Trainer
from utils.errors import UserError

_FRACTIONS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Of the steps, after which held-out views are rendered."""


def run_time_to_psnr(
    report: Report,
    sizes: Sizes,
    device: torch.device,
    *overrides: str,
    config: str,
    data: str | None,
    steps: int,
    views: int,
) -> None:
    """Train, look at some held-out views now and then, at last at all of them, and export the mesh.

    Raises:
        UserError: the capture has no held-out views.
    """
    chosen = [f"trainer.max_steps={steps}"] + ([] if data is None else [f"dataset.root_dir={data}"])
    small = sizes.overrides if Path(config).name == Path(SYNTHETIC).name else ()
    trainer = new_trainer(report.out, device, *small, *chosen, *overrides, path=config)
    if not trainer.scene.test_indices:
        raise UserError(config, "the capture has no held-out views", "add dataset.holdout=8")
    print(f"kernels: {trainer.model.backends}", flush=True)
    _train_and_look(report, trainer, views)
    _measure_result(report, trainer)


def _train_and_look(report: Report, trainer: Trainer, views: int) -> None:
    table = report.table(
        f"Held-out views over time, {trainer.full_config.name}",
        *(
            "step",
            "training seconds",
            "PSNR",
            "PSNR on the masks",
            "ms/step since the last row",
            "samples/s",
            "peak GiB",
        ),
    )
    steps = trainer.config.max_steps
    every = max(1, len(trainer.scene.test_indices) // views)
    some = replace(trainer.scene, test_indices=trainer.scene.test_indices[::every][:views])
    clock = Clock(trainer.device)
    for target in sorted({max(1, round(fraction * steps)) for fraction in _FRACTIONS}):
        samples, since, start = 0.0, trainer.step, time.perf_counter()
        while trainer.step < target:
            samples += _train(trainer, min(trainer.config.log_every, target - trainer.step))
        clock.wait()
        elapsed = time.perf_counter() - start
        trainer.train_seconds += elapsed
        progress = trainer.system.progress_at(trainer.fraction_done())
        chunks = trainer.full_config.test.chunks()
        measured = measure_views(some, trainer.model, progress, trainer.run, chunks)
        table.add(
            *(trainer.step, trainer.train_seconds, _mean(measured, "psnr"), _mean(measured, "psnr_masked")),
            *(1e3 * elapsed / (trainer.step - since), samples / elapsed, memory_gib(trainer.device)),
        )


def _train(trainer: Trainer, count: int) -> float:
    """Some steps and, as in training, one look at whether they were finite; samples that were trained on."""
    records = []
    for _ in range(count):
        records.append(trainer.train_step())
        trainer.step += 1
    if trainer.device_step is not None:
        trainer.look_for_bad_steps(records[-1])
    column = FIELDS.index("num_samples")
    return float(torch.stack([record.values[column] for record in records]).sum())


def _mean(views: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [view[key] for view in views if view[key] is not None]
    return sum(values) / len(values) if values else None


def _measure_result(report: Report, trainer: Trainer) -> None:
    """All held-out views, the mesh, and its distance to the true one where that is known."""
    trainer.save_checkpoint()
    progress = trainer.system.progress_at(trainer.fraction_done())
    start = time.perf_counter()
    metrics = test(trainer.full_config, trainer.scene, trainer.model, progress, trainer.run, trainer.step)
    table = report.table(f"Result, {trainer.full_config.name}", "what", "value")
    table.add("steps", trainer.step)
    table.add("training, minutes", trainer.train_seconds / 60)
    table.add("held-out views", len(metrics["views"]))
    for name, value in metrics["mean"].items():
        table.add(name, value)
    for name, value in (metrics["geometry"] or {}).items():
        table.add(f"geometry: {name}", value)
    for name in ("vertices", "faces", "components", "watertight"):
        if name in metrics["mesh"]:
            table.add(f"mesh: {name}", str(metrics["mesh"][name]))
    table.add("views and mesh, seconds", time.perf_counter() - start)
    table.add("peak GiB", memory_gib(trainer.device))
    table.add("folder", str(trainer.run.folder))
