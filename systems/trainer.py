"""The training loop: it updates, and knows no method.

One step reads from top to bottom in :meth:`Trainer.train_step`. The model renders, the system
judges, the trainer updates. Everything that is state goes into the checkpoint; schedules are
functions of the fraction done and need none.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models import Model
from process_data.batches import RayBatches, check_priors
from systems import checkpoint
from systems.adam import Adam
from systems.device_step import DeviceStep
from systems.evaluate import save_validation_picture
from systems.health import check_health, check_learning
from systems.meter import Meter
from systems.poses import PoseConfig, PoseRefinement, check_refinement
from systems.random_state import global_random_state, set_global_random_state
from systems.record import Run
from systems.schedules import is_ever_on, learning_rate_factor
from systems.step import FIELDS, Forward, Judgement, StepRecord
from systems.stop import StopRequest
from utils.backend import restore_generator
from utils.config import Config
from utils.errors import TrainingError
from utils.types import Budget, Scene

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with one learning rate per group of parameters."""

    grid: float = 1e-2
    """Learning rate of the hash grids' tables."""
    networks: float = 2e-3
    """Learning rate of the networks."""
    variance: float = 2e-3
    """Learning rate of v in inv_s = exp(10 v), or 1 / beta = exp(10 v)."""
    background: float = 2e-3
    """Learning rate of all of the background field.

    Well below the surface's, or it takes over what stands inside."""
    proposals: float = 2e-3
    """Learning rate of proposal networks that are no hash grids (mip-NeRF 360's)."""
    beta2: float = 0.99
    """Decay of the mean of squared gradients per step (Adam's own 0.999 is for long runs)."""
    eps: float = 1e-15
    """Added to Adam's denominator: gradients well below it move little."""
    warmup_steps: int = 100
    """Over these the rates rise."""
    warmup: Literal["linear", "sine"] = "linear"
    """From 1 / warmup_steps in a straight line, or from 1/100 along a quarter of a sine (mip-NeRF 360)."""
    decay: Literal["exponential", "cosine", "constant"] = "exponential"
    """After the warm-up, over the fraction of training done."""
    final_ratio: float = 0.05
    """Learning rate at the end over that at the start."""
    weight_decay: float = 0.0
    """Share of every parameter but the variance's, times its learning rate, that a step takes away (AdamW).

    Of the variance it would pull inv_s towards 1, which has nothing to do with simplicity."""
    clip_norm: float = 0.0
    """Largest norm of the gradient of each group; 0 leaves gradients as they are."""
    skip_untouched: bool = False
    """With fixed buffers: leave what has a gradient of exactly 0 alone (table rows that no sample of the step
    touched; instant-ngp's rule), instead of letting its moments decay and move it on."""

    def __post_init__(self) -> None:
        for key in ("grid", "networks", "variance", "background", "proposals", "clip_norm", "eps"):
            if not 0 <= getattr(self, key) <= 10:
                raise ValueError(f"trainer.optimizer.{key}: must lie in 0..10, got {getattr(self, key)}")
        if self.eps == 0:
            # What has no gradient would be moved by 0 / 0.
            raise ValueError("trainer.optimizer.eps: must be above 0, got 0")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"trainer.optimizer.beta2: must lie in [0, 1), got {self.beta2}")
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"trainer.optimizer.weight_decay: must lie in 0..1, got {self.weight_decay}")
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
    """Rays of the first step; those of the patches (``system.patch_size``) at least."""
    max_rays: int = 8192
    """Most rays of a step."""
    buffers: Literal["auto", "fixed", "packed"] = "auto"
    """Of a step's samples: of fixed size, so that no host waits for their number, or just as large as needed.
    auto: fixed on a GPU, packed on a CPU."""
    lookahead: float = 4.0
    """With fixed buffers: samples looked at before those that nothing can see are dropped, in units of
    samples_per_step."""
    cuda_graph: bool = True
    """On a GPU: record a step once and replay it; false launches its kernels one by one, which is slower."""
    foreground_share: float = 0.0
    """Share of the rays drawn from the (widened) masks only; the rest from everywhere."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    poses: PoseConfig = field(default_factory=PoseConfig)
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
        if not 1 <= self.lookahead <= 64:
            raise ValueError(f"trainer.lookahead: must lie in 1..64, got {self.lookahead}")
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
        check_priors(scene, system.priors, self.config.max_rays)
        self.batches = RayBatches(
            *(scene, None, device, config.seed, self.config.foreground_share),
            priors=system.priors,
        )
        self.min_rays = max(1, self.batches.num_patch_rays)
        self.generator = torch.Generator(device).manual_seed(config.seed + 1)
        color = torch.tensor(scene.background_color, device=device)
        check_refinement(self.config.poses, scene, system)
        self.poses = PoseRefinement(self.config.poses, scene).to(device) if self.config.poses.refine else None
        self.forward = Forward(self.batches, model, system, self.generator, color, self.poses)
        optimizer = self.config.optimizer
        groups = [
            {
                "params": parameters,
                "lr": getattr(optimizer, name),
                "base_lr": getattr(optimizer, name),
                "weight_decay": 0.0 if name == "variance" else optimizer.weight_decay,
                "name": name,
            }
            for name, parameters in model.parameter_groups().items()
        ]
        if self.poses is not None:
            rate, motions = self.config.poses.rate, list(self.poses.parameters())
            groups.append(
                {"params": motions, "lr": rate, "base_lr": rate, "weight_decay": 0.0, "name": "poses"}
            )
        betas = (0.9, optimizer.beta2)
        self.optimizer: torch.optim.Optimizer
        self.device_step: DeviceStep | None = None
        if self._has_fixed_buffers():
            self.optimizer = Adam(
                groups, betas=betas, eps=optimizer.eps, skip_untouched=optimizer.skip_untouched
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=optimizer.eps, fused=True)
        self.step = 0
        self.train_seconds = 0.0
        self.num_rays = max(self.min_rays, min(self.config.initial_rays, self.config.max_rays))
        self.bad_steps = 0
        self.rollbacks = 0
        self.validation_chunks = config.test.chunks()
        self.last_checkpoint: Path | None = None
        self.budget_share = 1.0
        if self._has_fixed_buffers():
            self.device_step = self._new_device_step()

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
        if self.device_step is not None:
            # The same on the device, from the batch to the next number of rays.
            record = self.device_step(progress, self.learning_rates())
        else:
            judgement = self.forward(progress, self.num_rays)
            finite = self.update(judgement.loss)
            if not finite:
                self.handle_bad_step(judgement)
            record = StepRecord.of(judgement, finite)
            num_samples = len(judgement.render.weights)
            self.num_rays = next_num_rays(self.num_rays, num_samples, self.config, self.min_rays)
        if self.step % self.config.occupancy_every == 0:
            self.model.update_occupancy(progress, self.generator)
        return record

    def learning_rates(self) -> list[float]:
        """Of each group of parameters, now."""
        config = self.config.optimizer
        factor = learning_rate_factor(
            *(self.step, self.fraction_done(), config.warmup_steps, config.decay, config.final_ratio),
            warmup=config.warmup,
        )
        return [group["base_lr"] * factor for group in self.optimizer.param_groups]

    def update(self, loss: Float[Tensor, ""]) -> bool:
        """Backward pass and optimiser step; a step whose loss or gradient is not finite changes nothing."""
        rates = self.learning_rates()
        self.optimizer.zero_grad(set_to_none=True)
        if not loss.requires_grad:
            # No ray met anything and there is no background to learn: there is nothing to update.
            return bool(torch.isfinite(loss))
        loss.backward()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            # The sum of a tensor is non-finite as soon as one element is.
            if not all(torch.isfinite(gradient.sum()) for gradient in gradients):
                return False
            if self.config.optimizer.clip_norm > 0:
                nn.utils.clip_grad_norm_(group["params"], self.config.optimizer.clip_norm)
        if not torch.isfinite(loss):
            return False
        self.optimizer.step()
        self.bad_steps = 0
        return True

    def handle_bad_step(self, judgement: Judgement) -> None:
        """Count and name a non-finite step; roll back after too many in a row.

        Raises:
            TrainingError: three roll-backs did not help.
        """
        self.bad_steps += 1
        terms = judgement.terms.items()
        culprits = [name for name, term in terms if not torch.isfinite(term)] or ["a gradient"]
        views = sorted(set(judgement.batch.rays.camera_indices.tolist()))[:8]
        log.warning(
            "step %d skipped: %s is not finite (%d in a row; rays from views %s ...)",
            *(self.step, ", ".join(culprits), self.bad_steps, views),
        )
        self._roll_back_if_stuck(", ".join(culprits))

    def look_for_bad_steps(self, record: StepRecord) -> None:
        """Ask the device how many steps in a row it has skipped by now.

        Raises:
            TrainingError: three roll-backs did not help.
        """
        self._count_bad_steps()
        if self.bad_steps == 0:
            return
        terms = zip(record.terms, record.values[len(FIELDS) :].tolist(), strict=True)
        culprits = [name for name, value in terms if not math.isfinite(value)] or ["a gradient"]
        log.warning(
            "step %d skipped: %s is not finite (%d in a row)",
            *(self.step, ", ".join(culprits), self.bad_steps),
        )
        self._roll_back_if_stuck(", ".join(culprits))

    def _count_bad_steps(self) -> None:
        """Learn from the device how many steps in a row were bad; without one the number is known."""
        if self.device_step is not None:
            self.bad_steps = int(self.device_step.bad_steps)

    def _roll_back_if_stuck(self, culprits: str) -> None:
        if self.bad_steps < self.config.max_bad_steps:
            return
        if self.last_checkpoint is None or self.rollbacks == 3:
            raise TrainingError(
                f"step {self.step}",
                f"{culprits} is not finite in {self.bad_steps} steps in a row",
                f"resume from {self.last_checkpoint} with smaller trainer.optimizer rates",
            )
        rollbacks = self.rollbacks + 1
        log.warning("rolling back to %s (%d of 3)", self.last_checkpoint, rollbacks)
        # The random states stay as they are: the same rays would lead to the same failure.
        self._load(checkpoint.load(self.last_checkpoint), with_generators=False)
        self.run.forget_after(self.step)
        self.rollbacks, self.bad_steps = rollbacks, 0
        if self.device_step is not None:
            self.device_step.bad_steps.zero_()

    # ---------------------------------------------------------------- buffers of fixed size

    def _has_fixed_buffers(self) -> bool:
        wanted = self.config.buffers
        return self.device.type == "cuda" if wanted == "auto" else wanted == "fixed"

    def _new_device_step(self) -> DeviceStep:
        config = self.config
        assert isinstance(self.optimizer, Adam)
        rendered = max(1, int(self.budget_share * config.samples_per_step))
        budget = Budget(
            torch.tensor(self.num_rays, device=self.device), int(config.lookahead * rendered), rendered
        )
        # Where every ray has all its samples, the rays are what takes the memory.
        max_rays = max(self.min_rays, int(self.budget_share * config.max_rays))
        return DeviceStep(
            *(self.forward, self.optimizer, self.system.terms, budget, max_rays),
            *(config.optimizer.clip_norm, config.cuda_graph and not self.model.backends.waits),
        )

    def shrink_budget(self) -> None:
        """Go on with half the samples a step after the device ran out of memory; once.

        Raises:
            TrainingError: it has been halved before.
        """
        where = f"step {self.step}"
        if self.budget_share < 1.0 or self.device_step is None:
            remedy = "set trainer.samples_per_step, trainer.max_rays or a table's log2_table_size lower"
            raise TrainingError(where, "out of memory", remedy)
        self.budget_share = 0.5
        self.num_rays = max(self.min_rays, int(self.device_step.budget.num_rays) // 2)
        self.device_step = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.device_step = self._new_device_step()
        samples = self.device_step.budget.rendered
        log.warning(
            "%s: out of memory; going on with %d samples a step instead of twice as many", where, samples
        )

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Train until ``max_steps`` or ``max_minutes``; Ctrl-C and SIGTERM save first.

        Raises:
            KeyboardInterrupt: after the checkpoint of an interrupted run is written.
            TrainingError: training cannot go on.
        """
        log.info("losses       %s", describe_losses(self.system))
        self.run.write_split(self.scene)
        config = self.config
        meter = Meter(
            self.run, self.model, self.system, config.log_every, config.max_steps, self.train_seconds
        )
        with meter, StopRequest() as stop:
            try:
                if self.last_checkpoint is None:
                    self.last_checkpoint = self.save_checkpoint()
                while self.fraction_done() < 1.0:
                    start = time.perf_counter()
                    record = self._train_step_or_none()
                    if record is None:
                        # Not in the exception's handler, which would keep alive what fills the memory.
                        self.shrink_budget()
                        continue
                    if self.device_step is not None and (self.step + 1) % config.log_every == 0:
                        # The host waits for the device where numbers are written, and nowhere else.
                        self.look_for_bad_steps(record)
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
        if self.poses is not None:
            self.poses.write(self.scene, self.run.save)
        self._list_run()

    def _train_step_or_none(self) -> StepRecord | None:
        """Take a step; ``None`` where the device has no memory for it."""
        try:
            return self.train_step()
        except torch.OutOfMemoryError:
            return None

    def _at_intervals(self, meter: Meter) -> None:
        config, step = self.config, self.step
        if step % config.checkpoint_every == 0:
            self._count_bad_steps()
            # Amid bad steps the model itself may be broken, and a roll-back needs one that is not.
            if self.bad_steps == 0:
                self.save_checkpoint()
        if config.learning_step and step == config.learning_step:
            self._heed(check_learning(self.scene, meter.recent_psnr()))
        if config.health_step and step == config.health_step:
            progress = self.system.progress_at(self.fraction_done())
            self._heed(check_health(self.scene, self.model, progress, self.run))
        if config.val_every and step % config.val_every == 0:
            progress = self.system.progress_at(self.fraction_done())
            scene = self.scene if self.poses is None else self.poses.refined(self.scene)
            save_validation_picture(
                *(scene, self.model, progress, self.run, step, step // config.val_every),
                self.validation_chunks,
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
                "losses": " ".join(
                    f"{name}:{'on' if name in weights else 'off'}" for name in self.system.terms
                ),
                "steps": self.step,
                "minutes": round(self.train_seconds / 60, 2),
            }
        )

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> Path:
        """Write everything that the next step depends on."""
        if self.device_step is not None:
            self.num_rays = int(self.device_step.budget.num_rays)
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
        if self.poses is not None:
            state["poses"] = self.poses.state_dict()
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
        checkpoint.load_poses(path, state, self.poses)
        self._load(state, with_generators=True)
        self.last_checkpoint = path
        self.run.forget_after(self.step)
        log.info("resumed at step %d from %s", self.step, path)

    def _load(self, state: dict[str, Any], with_generators: bool) -> None:
        self.model.load_state_dict(state["model"])
        if self.poses is not None:
            self.poses.load_state_dict(state["poses"])
        # Learning rates and weight decay come from the config of now, everything else of the optimiser from
        # the checkpoint.
        now = [
            {key: group[key] for key in ("base_lr", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rates in zip(self.optimizer.param_groups, now, strict=True):
            group.update(rates)
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        # Without patches, as the checkpoint's run may have been, fewer rays will do.
        self.num_rays = max(self.min_rays, state["num_rays"])
        self.bad_steps, self.rollbacks = state["bad_steps"], state["rollbacks"]
        if self.device_step is not None:
            self.device_step.attach_rates()
            self.device_step.budget.num_rays.fill_(self.num_rays)
            self.device_step.bad_steps.fill_(self.bad_steps)
        if with_generators:
            self.batches.load_state_dict(state["batches"])
            restore_generator(self.generator, state["generator"])
            set_global_random_state(state["random"])


def next_num_rays(num_rays: int, num_samples: int, config: TrainerConfig, min_rays: int = 1) -> int:
    """Rays for the next step: a tenth of the way from this step's to what would have met the budget.

    There are never fewer than ``min_rays``, even where that is above the budget.
    """
    wanted = num_rays * config.samples_per_step / num_samples if num_samples > 0 else config.max_rays
    return max(min_rays, min(int(0.9 * num_rays + 0.1 * wanted), config.max_rays))


def describe_losses(system: Any) -> str:
    """One line: the terms that are on at some time, each with its weight or its schedule as written."""
    weights = {name: getattr(system.config.loss, name) for name in system.terms}
    shown = {name: weight for name, weight in weights.items() if is_ever_on(weight)}
    return "  ".join(
        f"{name} {weight:g}" if isinstance(weight, (int, float)) else f"{name} {weight}"
        for name, weight in shown.items()
    )
