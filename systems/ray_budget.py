"""How many rays and samples a step has: what is asked for, and how the rays follow from the samples."""

from dataclasses import dataclass, replace

import torch

from utils.types import Budget


@dataclass(frozen=True)
class RayBudget:
    """Rays and samples of a step."""

    samples: int
    """What a step aims at, or, with buffers of fixed size, what they hold."""
    max_rays: int
    """Most rays of a step."""
    min_rays: int = 1
    """Fewest rays of a step: those of its patches, even where they have more samples than are aimed at."""
    lookahead: float = 4.0
    """With buffers of fixed size: samples looked at, in units of ``samples``."""
    is_halved: bool = False
    """Whether memory did not suffice for what was asked for."""

    def clamp(self, num_rays: int) -> int:
        """The nearest number of rays that a step may have."""
        return max(self.min_rays, min(num_rays, self.max_rays))

    def next(self, num_rays: int, num_samples: int) -> int:
        """Rays for the next step: a tenth of the way from this step's to what would have met the budget.

        Args:
            num_rays: of this step.
            num_samples: that these had.
        """
        wanted = num_rays * self.samples / num_samples if num_samples > 0 else self.max_rays
        return self.clamp(int(0.9 * num_rays + 0.1 * wanted))

    def on_device(self, num_rays: int, device: torch.device) -> Budget:
        """Sizes of the buffers on a device, where the first step has ``num_rays`` rays."""
        return Budget(torch.tensor(num_rays, device=device), int(self.lookahead * self.samples), self.samples)

    def halved(self) -> "RayBudget":
        """Half of it: where every ray has all its samples, the rays are what takes the memory."""
        max_rays = max(self.min_rays, self.max_rays // 2)
        return replace(self, samples=max(1, self.samples // 2), max_rays=max_rays, is_halved=True)
