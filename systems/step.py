"""What every training step does before it updates anything: rays, pixels, loss; and what it reports."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models import Model
from process_data.batches import RayBatches
from systems import losses
from systems.poses import PoseRefinement
from utils.types import Batch, Budget, Progress, RenderOutput


@dataclass(frozen=True)
class Judgement:
    """A batch, what the model shows of it, and what the system says to that."""

    batch: Batch
    render: RenderOutput
    terms: dict[str, Tensor]
    """The unweighted terms that were computed."""
    loss: Float[Tensor, ""]


@dataclass(frozen=True)
class Forward:
    """The forward half of a step: batch -> rays -> pixels -> loss."""

    batches: RayBatches
    model: Model
    system: Any
    generator: torch.Generator
    """Of the samples' jitter, random backgrounds and the losses' random points, on the device."""
    scene_color: Float[Tensor, "3"]
    """The capture's plain colour behind masked objects, on the device."""
    poses: PoseRefinement | None = None
    """Where the cameras are refined."""

    def stage(self, progress: Progress) -> Hashable:
        """What branches on the progress beside the terms: a recorded step serves one stage."""
        return self.model.stage(progress), self.poses is not None and self.poses.learns(progress)

    def __call__(self, progress: Progress, num_rays: int, budget: Budget | None = None) -> Judgement:
        """Draw ``num_rays`` rays, render as many of them as the budget allows, and judge the picture."""
        batch = self.batches.draw(num_rays)
        background = self.system.background_color(self.scene_color, self.generator)
        batch = composite_masked(batch, background)
        if self.poses is not None:
            batch = replace(batch, rays=self.poses(batch.rays, progress))
        render = self.model.render(batch.rays, progress, background, self.generator, budget)
        field = partial(self.model.query_field, progress=progress)
        terms = self.system.loss_terms(render, batch, progress, field, self.generator)
        return Judgement(batch, render, terms, weighted_sum(terms, progress.loss_weights))


def composite_masked(batch: Batch, background: Float[Tensor, "3"]) -> Batch:
    """Put the background colour behind the masked object; without masks the photographs stay as they are."""
    if batch.mask is None:
        return batch
    mask = batch.mask[:, None]
    return replace(batch, rgb=mask * batch.rgb + (1.0 - mask) * background)


def weighted_sum(terms: dict[str, Tensor], weights: Mapping[str, float | Tensor]) -> Float[Tensor, ""]:
    """Sum of the terms, each times its weight."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


@dataclass(frozen=True)
class StepRecord:
    """What one step reports: a row of numbers on the device, so that nothing waits until somebody looks."""

    values: Float[Tensor, " K"]
    """In the order of :data:`FIELDS`, then the unweighted terms."""
    terms: tuple[str, ...]
    """Names of the terms that were computed."""

    @classmethod
    def of(cls, judgement: Judgement, finite: bool | Tensor) -> "StepRecord":
        """Report a step; ``finite`` says whether it was taken (one with NaN or infinity anywhere is not)."""
        render, rgb = judgement.render, judgement.batch.rgb
        squared_error = losses.rgb_l2(render.rgb.detach(), rgb, render.is_served)
        scalars = [
            *(judgement.loss.detach(), -10.0 * torch.log10(squared_error.clamp(min=1e-10)), finite),
            *(render.num_rays, render.num_samples, render.num_marched),
            *(term.detach() for term in judgement.terms.values()),
        ]
        device = judgement.loss.device
        row = [
            s.float() if isinstance(s, Tensor) else torch.full((), s, device=device).float() for s in scalars
        ]
        return cls(torch.stack(row), tuple(judgement.terms))

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The weighted sum."""
        return self.values[0]

    @property
    def psnr(self) -> Float[Tensor, ""]:
        """Of the step's pixels, dB."""
        return self.values[1]

    @property
    def finite(self) -> bool:
        """Whether the step was taken; asks the device."""
        return bool(self.values[2])

    @property
    def num_rays(self) -> int:
        """Rays that were rendered; asks the device."""
        return int(self.values[3])

    @property
    def num_samples(self) -> int:
        """Samples that were rendered; asks the device."""
        return int(self.values[4])

    @property
    def num_marched(self) -> int:
        """Samples before those that nothing can see were dropped; asks the device."""
        return int(self.values[5])


FIELDS = ("loss", "psnr", "finite", "num_rays", "num_samples", "num_marched")
"""The first columns of a :class:`StepRecord`."""
