"""What a training run is told: how long, how much per step, and what it writes when."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from systems.optimizer import OptimizerConfig
from systems.poses import PoseConfig


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

    def has_fixed_buffers(self, device: torch.device) -> bool:
        """Whether a step's buffers have a fixed size on this device."""
        return device.type == "cuda" if self.buffers == "auto" else self.buffers == "fixed"
