"""The training loop: it updates, and knows no method.

One step reads from top to bottom in :meth:`Trainer.train_step`. The model renders, the system
judges, the trainer updates. Everything that is state goes into the checkpoint; schedules are
functions of the fraction done and need none.
"""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models import Model
from process_data.batches import RayBatches
from systems import checkpoint
from systems.evaluate import save_validation_picture
from systems.health import check_health, check_learning
from systems.meter import Meter, StepRecord
from systems.random_state import global_random_state, set_global_random_state
from systems.record import Run
from systems.schedules import learning_rate_factor
from systems.stop import StopRequest
from utils.config import Config
from utils.errors import TrainingError
from utils.types import Batch, Scene

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with one learning rate per group of parameters."""

    grid: float = 1e-2
    """Learning rate of the hash grids' tables."""
    networks: float = 2e-3
    """Learning rate of the networks."""
    variance: float = 2e-3
    """Learning rate of v in inv_s = exp(10 v)."""
    background: float = 2e-3
    """Learning rate of all of the background field.

    Well below the surface's, or it takes over what stands inside."""
    warmup_steps: int = 100
    """Linear warm-up."""
    decay: Literal["exponential", "cosine", "constant"] = "exponential"
    """After the warm-up, over the fraction of training done."""
    final_ratio: float = 0.05
    """Learning rate at the end over that at the start."""
    clip_norm: float = 0.0
    """Largest norm of the gradient of each group; 0 leaves gradients as they are."""

    def __post_init__(self) -> None:
        for key in ("grid", "networks", "variance", "background", "clip_norm"):
            if not 0 <= getattr(self, key) <= 10:
                raise ValueError(f"trainer.optimizer.{key}: must lie in 0..10, got {getattr(self, key)}")
        if not 0 < self.final_ratio <= 1:
            raise ValueError(f"trainer.optimizer.final_ratio: must lie in (0, 1], got {self.final_ratio}")


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, how much per step, and what to write when."""

    max_steps: int = 20000
    """Steps; the run ends here or at ``max_minutes``, whichever comes first."""
    max_minutes: float | None = None
    """Minutes of training time, validation and checkpoints excluded.

    Schedules follow the fraction of whichever bound is nearer."""
    samples_per_step: int = 2**15
    """Samples a step aims at; the number of rays follows."""
    initial_rays: int = 512
    """Rays of the first step."""
    max_rays: int = 8192
    """Most rays of a step."""
    foreground_share: float = 0.0
    """Share of the rays drawn from the (widened) masks only; the rest from everywhere."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    occupancy_every: int = 16
    """Steps between updates of the occupancy grid."""
    log_every: int = 50
    """Steps between rows of history.csv."""
    val_every: int = 2000
    """Steps between validation pictures; 0 for none."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """So many of the newest are kept."""
    health_step: int = 1000
    """At this step a preview mesh and a line on the run's health are written; 0 for never."""
    learning_step: int = 500
    """At this step the PSNR is compared with that of a constant colour; 0 for never."""
    strict: bool = False
    """True stops the run when one of these two checks fails; False only warns."""
    max_bad_steps: int = 20
    """Non-finite steps in a row before a roll-back to the last checkpoint; three roll-backs end the run."""

    def __post_init__(self) -> None:
        positive = (
            *("max_steps", "samples_per_step", "initial_rays", "max_rays", "occupancy_every"),
            *("log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps"),
        )
        lowest = dict.fromkeys(positive, 1) | {"val_every": 0}
        for key, low in lowest.items():
            if getattr(self, key) < low:
                raise ValueError(f"trainer.{key}: must be at least {low}, got {getattr(self, key)}")
        if not 0 <= self.foreground_share <= 1:
            raise ValueError(f"trainer.foreground_share: must lie in 0..1, got {self.foreground_share}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"trainer.max_minutes: must be above 0, got {self.max_minutes}")


class Trainer:
    """Trains a model on a scene and writes what a run leaves behind."""

    def __init__(
        self, config: Config, scene: Scene, model: Model, system: Any, run: Run, device: torch.device
    ) -> None:
        self.config: TrainerConfig = config.trainer
        self.full_config = config
        self.scene, self.model, self.system, self.run, self.device = scene, model, system, run, device
        self.batches = RayBatches(
            scene, device=device, seed=config.seed, foreground_fraction=self.config.foreground_share
        )
        self.generator = torch.Generator(device).manual_seed(config.seed + 1)
        optimizer = self.config.optimizer
        groups = [
            {
                "params": parameters,
                "lr": getattr(optimizer, name),
                "base_lr": getattr(optimizer, name),
                "name": name,
            }
            for name, parameters in model.parameter_groups().items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)
        self.step = 0
        self.train_seconds = 0.0
        self.num_rays = min(self.config.initial_rays, self.config.max_rays)
        self.bad_steps = 0
        self.rollbacks = 0
        self.last_checkpoint: Path | None = None

    # ---------------------------------------------------------------- one step

    def fraction_done(self) -> float:
        """Share of training behind us, 0..1: of the steps or of the minutes, whichever is further on."""
        fraction = self.step / self.config.max_steps
        if self.config.max_minutes is not None:
            fraction = max(fraction, self.train_seconds / (60.0 * self.config.max_minutes))
        return min(fraction, 1.0)

    def train_step(self) -> StepRecord:
        """One optimisation step, read from top to bottom."""
        progress = self.system.progress_at(self.fraction_done())
        batch = self.batches.draw(self.num_rays)
        background = self.system.background_color(self.scene.background_color, self.generator)
        batch = composite_masked(batch, background)
        render = self.model.render(batch.rays, progress, background, self.generator)
        terms = self.system.loss_terms(render, batch, progress)
        loss = weighted_sum(terms, progress.loss_weights)

        finite = self.update(loss, progress.fraction)
        if not finite:
            self.handle_bad_step(terms, batch)
        if self.step % self.config.occupancy_every == 0:
            self.model.update_occupancy(progress, self.generator)
        record = StepRecord(
            loss.detach(),
            {name: term.detach() for name, term in terms.items()},
            psnr=-10.0 * torch.log10((render.rgb.detach() - batch.rgb).square().mean().clamp(min=1e-10)),
            finite=finite,
            num_rays=self.num_rays,
            num_samples=len(render.sdf),
            num_marched=render.num_marched,
        )
        self.num_rays = next_num_rays(self.num_rays, len(render.sdf), self.config)
        return record

    def update(self, loss: Float[Tensor, ""], fraction: float) -> bool:
        """Backward pass and optimiser step; a step whose loss or gradient is not finite changes nothing."""
        config = self.config.optimizer
        factor = learning_rate_factor(
            self.step, fraction, config.warmup_steps, config.decay, config.final_ratio
        )
        self.optimizer.zero_grad(set_to_none=True)
        if not loss.requires_grad:
            # No ray met anything and there is no background to learn: there is nothing to update.
            return bool(torch.isfinite(loss))
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            # The sum of a tensor is non-finite as soon as one element is.
            if not all(torch.isfinite(gradient.sum()) for gradient in gradients):
                return False
            if config.clip_norm > 0:
                nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
        if not torch.isfinite(loss):
            return False
        self.optimizer.step()
        self.bad_steps = 0
        return True

    def handle_bad_step(self, terms: dict[str, Tensor], batch: Batch) -> None:
        """Count and name a non-finite step; roll back after too many in a row.

        Raises:
            TrainingError: three roll-backs did not help.
        """
        self.bad_steps += 1
        culprits = [name for name, term in terms.items() if not torch.isfinite(term)] or ["a gradient"]
        views = sorted(set(batch.rays.camera_indices.tolist()))[:8]
        log.warning(
            "step %d skipped: %s is not finite (%d in a row; rays from views %s ...)",
            *(self.step, ", ".join(culprits), self.bad_steps, views),
        )
        if self.bad_steps < self.config.max_bad_steps:
            return
        if self.last_checkpoint is None or self.rollbacks == 3:
            raise TrainingError(
                f"step {self.step}",
                f"{', '.join(culprits)} is not finite in {self.bad_steps} steps in a row",
                f"resume from {self.last_checkpoint} with smaller trainer.optimizer rates",
            )
        rollbacks = self.rollbacks + 1
        log.warning("rolling back to %s (%d of 3)", self.last_checkpoint, rollbacks)
        # The random states stay as they are: the same rays would lead to the same failure.
        self._load(checkpoint.load(self.last_checkpoint), with_generators=False)
        self.run.forget_after(self.step)
        self.rollbacks, self.bad_steps = rollbacks, 0

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Train until ``max_steps`` or ``max_minutes``; Ctrl-C and SIGTERM save first.

        Raises:
            KeyboardInterrupt: after the checkpoint of an interrupted run is written.
            TrainingError: training cannot go on.
        """
        log.info("losses       %s", describe_losses(self.system, self.fraction_done()))
        self.run.write_split(self.scene)
        terms, config = self.system.terms, self.config
        meter = Meter(self.run, self.model, terms, config.log_every, config.max_steps, self.train_seconds)
        with meter, StopRequest() as stop:
            try:
                if self.last_checkpoint is None:
                    self.last_checkpoint = self.save_checkpoint()
                while self.fraction_done() < 1.0:
                    start = time.perf_counter()
                    record = self.train_step()
                    self.step += 1
                    self.train_seconds += time.perf_counter() - start
                    meter.add(record, self.step, self.train_seconds, self.fraction_done())
                    self._at_intervals(meter)
                    if stop.is_made:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                path = self.save_checkpoint()
                self._list_run()
                log.info("interrupted at step %d; go on with --train --resume %s", self.step, path)
                raise
        self.save_checkpoint()
        self._list_run()

    def _at_intervals(self, meter: Meter) -> None:
        config, step = self.config, self.step
        # Amid bad steps the model itself may be broken, and a roll-back needs one that is not.
        if step % config.checkpoint_every == 0 and self.bad_steps == 0:
            self.save_checkpoint()
        if config.learning_step and step == config.learning_step:
            self._heed(check_learning(self.scene, meter.recent_psnr()))
        if config.health_step and step == config.health_step:
            progress = self.system.progress_at(self.fraction_done())
            self._heed(check_health(self.scene, self.model, progress, self.run))
        if config.val_every and step % config.val_every == 0:
            progress = self.system.progress_at(self.fraction_done())
            save_validation_picture(
                self.scene, self.model, progress, self.run, step, step // config.val_every
            )

    def _heed(self, warnings: list[str]) -> None:
        for warning in warnings:
            log.warning("CHECK %s", warning)
        if warnings and self.config.strict:
            raise TrainingError(
                f"step {self.step}", warnings[0], "or set trainer.strict=false to go on anyway"
            )

    def _list_run(self) -> None:
        weights = self.system.progress_at(self.fraction_done()).loss_weights
        root = getattr(self.full_config.dataset, "root_dir", None)
        self.run.list_in_table(
            {
                "dataset": self.full_config.dataset.name,
                "scene": root or self.scene.name,
                "frames": len(self.scene.train_indices),
                "losses": " ".join(f"{name}:{'on' if weight else 'off'}" for name, weight in weights.items()),
                "steps": self.step,
                "minutes": round(self.train_seconds / 60, 2),
            }
        )

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> Path:
        """Write everything that the next step depends on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "generator": self.generator.get_state(),
            "random": global_random_state(),
            "fraction": self.fraction_done(),
            "train_seconds": self.train_seconds,
            "num_rays": self.num_rays,
            "bad_steps": self.bad_steps,
            "rollbacks": self.rollbacks,
        }
        self.last_checkpoint = checkpoint.save(
            self.run.checkpoints, self.step, state, self.config.keep_checkpoints
        )
        return self.last_checkpoint

    def restore(self, path: Path) -> None:
        """Go on where a checkpoint was written.

        Raises:
            CheckpointError: it is missing, broken, of another model or of a newer version.
        """
        state = checkpoint.load(path)
        checkpoint.load_weights(path, state, self.model)
        self._load(state, with_generators=True)
        self.last_checkpoint = path
        self.run.forget_after(self.step)
        log.info("resumed at step %d from %s", self.step, path)

    def _load(self, state: dict[str, Any], with_generators: bool) -> None:
        self.model.load_state_dict(state["model"])
        # Learning rates come from the config of now, everything else of the optimiser from the checkpoint.
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        self.num_rays, self.bad_steps, self.rollbacks = (
            state["num_rays"],
            state["bad_steps"],
            state["rollbacks"],
        )
        if with_generators:
            self.batches.load_state_dict(state["batches"])
            self.generator.set_state(state["generator"])
            set_global_random_state(state["random"])


def composite_masked(batch: Batch, background: Float[Tensor, "3"]) -> Batch:
    """Put the background colour behind the masked object; without masks the photographs stay as they are."""
    if batch.mask is None:
        return batch
    mask = batch.mask[:, None]
    return replace(batch, rgb=mask * batch.rgb + (1.0 - mask) * background)


def weighted_sum(terms: dict[str, Tensor], weights: Any) -> Float[Tensor, ""]:
    """Sum of the terms, each times its weight."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def next_num_rays(num_rays: int, num_samples: int, config: TrainerConfig) -> int:
    """Rays for the next step: a tenth of the way from this step's to what would have met the budget."""
    wanted = num_rays * config.samples_per_step / num_samples if num_samples > 0 else config.max_rays
    return max(1, min(int(0.9 * num_rays + 0.1 * wanted), config.max_rays))


def describe_losses(system: Any, fraction: float) -> str:
    """One line: the terms and their weights now."""
    weights = system.progress_at(fraction).loss_weights
    return "  ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight > 0)
