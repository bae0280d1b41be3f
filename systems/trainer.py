"""The training loop: it updates, and knows no method.

One step reads from top to bottom in :meth:`Trainer.train_step`. The model renders, the system
judges, the trainer updates. Everything that is state goes into the checkpoint; schedules are
functions of the fraction done and need none.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models import Model
from process_data.batches import RayBatches, check_priors
from systems import checkpoint
from systems.adam import Adam
from systems.bad_steps import BadSteps
from systems.device_step import DeviceStep
from systems.evaluate import save_validation_picture
from systems.health import check_health, check_learning
from systems.meter import Meter
from systems.optimizer import new_adam, new_adamw, parameter_group, parameter_groups, restore_optimizer
from systems.poses import PoseRefinement, check_refinement
from systems.random_state import global_random_state, set_global_random_state
from systems.ray_budget import RayBudget
from systems.record import Run
from systems.schedules import learning_rate_factor
from systems.step import Forward, StepRecord
from systems.stop import StopRequest
from systems.trainer_config import TrainerConfig
from utils.backend import restore_generator
from utils.config import Config
from utils.errors import TrainingError
from utils.types import Scene

log = logging.getLogger(__name__)


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
        self.generator = torch.Generator(device).manual_seed(config.seed + 1)
        color = torch.tensor(scene.background_color, device=device)
        check_refinement(self.config.poses, scene, system)
        self.poses = PoseRefinement(self.config.poses, scene).to(device) if self.config.poses.refine else None
        self.forward = Forward(self.batches, model, system, self.generator, color, self.poses)
        groups = parameter_groups(self.config.optimizer, model)
        if self.poses is not None:
            groups.append(parameter_group("poses", self.poses.parameters(), self.config.poses.rate))
        self.ray_budget = RayBudget(
            *(self.config.samples_per_step, self.config.max_rays),
            min_rays=max(1, self.batches.num_patch_rays),
            lookahead=self.config.lookahead,
        )
        self.num_rays = self.ray_budget.clamp(self.config.initial_rays)
        self.optimizer: torch.optim.Optimizer
        self.device_step: DeviceStep | None = None
        if self.config.has_fixed_buffers(device):
            self.optimizer = new_adam(self.config.optimizer, groups)
            self.device_step = self._new_device_step(self.optimizer)
        else:
            self.optimizer = new_adamw(self.config.optimizer, groups)
        self.step = 0
        self.train_seconds = 0.0
        self.bad_steps = BadSteps(self.config.max_bad_steps)
        self.validation_chunks = config.test.chunks()
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
        if self.device_step is not None:
            # The same on the device, from the batch to the next number of rays.
            record = self.device_step(progress, self.learning_rates())
        else:
            judgement = self.forward(progress, self.num_rays)
            finite = self.update(judgement.loss)
            if not finite:
                self.bad_steps.add(self.step, judgement)
                self._roll_back_if_stuck()
            record = StepRecord.of(judgement, finite)
            self.num_rays = self.ray_budget.next(self.num_rays, len(judgement.render.weights))
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
        self.bad_steps.end()
        return True

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Train until ``max_steps`` or ``max_minutes``; Ctrl-C and SIGTERM save first.

        Raises:
            KeyboardInterrupt: after the checkpoint of an interrupted run is written.
            TrainingError: training cannot go on.
        """
        log.info("losses       %s", self.system.describe_losses())
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

    def shrink_budget(self) -> None:
        """Go on with half the samples a step after the device ran out of memory; once.

        Raises:
            TrainingError: it has been halved before.
        """
        where = f"step {self.step}"
        if self.ray_budget.is_halved or self.device_step is None:
            remedy = "set trainer.samples_per_step, trainer.max_rays or a table's log2_table_size lower"
            raise TrainingError(where, "out of memory", remedy)
        self.ray_budget = self.ray_budget.halved()
        self.num_rays = self.ray_budget.clamp(int(self.device_step.budget.num_rays) // 2)
        self.device_step = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        assert isinstance(self.optimizer, Adam)
        self.device_step = self._new_device_step(self.optimizer)
        samples = self.ray_budget.samples
        log.warning(
            "%s: out of memory; going on with %d samples a step instead of twice as many", where, samples
        )

    def _new_device_step(self, optimizer: Adam) -> DeviceStep:
        config = self.config
        return DeviceStep(
            *(self.forward, optimizer, self.system.terms),
            *(self.ray_budget.on_device(self.num_rays, self.device), self.ray_budget.max_rays),
            *(config.optimizer.clip_norm, config.cuda_graph and not self.model.backends.waits),
        )

    def look_for_bad_steps(self, record: StepRecord) -> None:
        """Ask the device how many steps in a row it has skipped by now; ``record`` is of the latest one.

        Raises:
            TrainingError: three roll-backs did not help.
        """
        self._count_bad_steps()
        self.bad_steps.name_last(self.step, record)
        self._roll_back_if_stuck()

    def _count_bad_steps(self) -> None:
        """Learn from the device how many steps in a row were bad; without one the number is known."""
        if self.device_step is not None:
            self.bad_steps.recount(int(self.device_step.bad_steps))

    def _roll_back_if_stuck(self) -> None:
        """Go back to the last checkpoint after too many bad steps in a row.

        Raises:
            TrainingError: three roll-backs did not help.
        """
        if not self.bad_steps.are_too_many(self.step, self.last_checkpoint):
            return
        assert self.last_checkpoint is not None
        self.bad_steps.start_over(self.last_checkpoint)
        # The random states stay as they are: the same rays would lead to the same failure.
        self._load(checkpoint.load(self.last_checkpoint))
        self.run.forget_after(self.step)

    def _at_intervals(self, meter: Meter) -> None:
        config, step = self.config, self.step
        if step % config.checkpoint_every == 0:
            self._count_bad_steps()
            # Amid bad steps the model itself may be broken, and a roll-back needs one that is not.
            if self.bad_steps.in_a_row == 0:
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
            "meaning": checkpoint.meaning_of(self.full_config.tree),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "generator": self.generator.get_state(),
            "random": global_random_state(),
            "fraction": self.fraction_done(),
            "train_seconds": self.train_seconds,
            "num_rays": self.num_rays,
            "bad_steps": self.bad_steps.in_a_row,
            "rollbacks": self.bad_steps.rollbacks,
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
        checkpoint.load_weights(path, state, self.model, self.full_config.tree)
        checkpoint.load_poses(path, state, self.poses)
        self.bad_steps.restore(state["bad_steps"], state["rollbacks"])
        self._load(state)
        self.batches.load_state_dict(state["batches"])
        restore_generator(self.generator, state["generator"])
        set_global_random_state(state["random"])
        self.last_checkpoint = path
        self.run.forget_after(self.step)
        log.info("resumed at step %d from %s", self.step, path)

    def _load(self, state: dict[str, Any]) -> None:
        """Take over all but the random states and the count of bad steps."""
        self.model.load_state_dict(state["model"])
        if self.poses is not None:
            self.poses.load_state_dict(state["poses"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        # Without patches, as the checkpoint's run may have been, fewer rays will do.
        self.num_rays = max(self.ray_budget.min_rays, state["num_rays"])
        if self.device_step is not None:
            self.device_step.restore(self.num_rays, self.bad_steps.in_a_row)
