"""NeuS's training rules: which loss terms, how they are weighted, and what anneals when."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from systems import losses
from systems.schedules import check_schedule, value_at
from utils.errors import ConfigError
from utils.types import Batch, Progress, RenderOutput


@dataclass(frozen=True)
class LossConfig:
    """Weight of each term: a number, or a schedule of [fraction, value] pairs; with 0 it is not computed."""

    rgb_l1: Any = 1.0
    rgb_l2: Any = 0.0
    rgb_charbonnier: Any = 0.0
    eikonal: Any = 0.1
    mask: Any = 0.0
    """Binary cross entropy of opacity and mask; needs masks."""
    opacity: Any = 0.0
    sparsity: Any = 0.0

    def __post_init__(self) -> None:
        for term in fields(self):
            check_schedule(f"system.loss.{term.name}", getattr(self, term.name))
        values = [value_at(getattr(self, term.name), k / 100) for k in range(101) for term in fields(self)]
        if min(values) < 0:
            raise ValueError("system.loss: a weight is negative; give 0 or more")
        if all(sum(values[k : k + len(fields(self))]) == 0 for k in range(0, len(values), len(fields(self)))):
            raise ValueError("system.loss: all weights are 0; give at least one colour term a weight")


@dataclass(frozen=True)
class NeuSSystemConfig:
    """Loss terms and annealing of NeuS."""

    name: str = "neus"
    loss: LossConfig = LossConfig()
    sparsity_scale: float = 20.0
    """1 / width of the shell that the sparsity term acts on, 1 / scene units."""
    cos_anneal_end: float = 0.1
    """Fraction of training after which NeuS's true cosine is used (0 = from the start)."""
    initial_levels: float = 4.0
    """Hash-grid levels open at the start (coarse to fine)."""
    levels_end: float = 0.3
    """Fraction of training at which all levels are open."""
    background: Literal["random", "scene"] = "random"
    """Colour behind masked objects in training: a new one every step, which forbids the surface to imitate
    it, or the scene's own (dataset.background), which forgives masks that are too wide."""

    def __post_init__(self) -> None:
        for key in ("cos_anneal_end", "levels_end"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"system.{key}: must lie in 0..1, got {getattr(self, key)}")
        if self.initial_levels < 0:
            raise ValueError(f"system.initial_levels: must not be negative, got {self.initial_levels}")


class NeuSSystem:
    """Judges a NeuS render: schedules and unweighted loss terms. It holds no state."""

    def __init__(self, config: NeuSSystemConfig, num_levels: int, has_masks: bool) -> None:
        self.config = config
        self.num_levels = num_levels
        self.terms = [term.name for term in fields(LossConfig)]
        if not has_masks and any(value_at(config.loss.mask, k / 100) > 0 for k in range(101)):
            raise ConfigError(
                "system.loss.mask", "needs masks", "set dataset.apply_mask=true, or system.loss.mask=0"
            )

    def progress_at(self, fraction: float) -> Progress:
        """Everything that depends on the fraction (0..1) of training done."""
        config = self.config
        anneal = 1.0 if config.cos_anneal_end == 0 else min(fraction / config.cos_anneal_end, 1.0)
        opened = 1.0 if config.levels_end == 0 else min(fraction / config.levels_end, 1.0)
        first = min(config.initial_levels, self.num_levels)
        weights = {name: value_at(getattr(config.loss, name), fraction) for name in self.terms}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        return Progress(fraction, anneal, first + opened * (self.num_levels - first), weights)

    def background_color(
        self, scene_color: Float[Tensor, "3"], generator: torch.Generator
    ) -> Float[Tensor, "3"]:
        """The colour behind masked objects for one training step, 0..1."""
        if self.config.background == "random":
            return torch.rand(3, generator=generator, device=generator.device)
        return scene_color

    def loss_terms(self, render: RenderOutput, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The unweighted terms that have a weight now."""
        rays, samples = render.is_served, render.is_sample
        terms: dict[str, Callable[[], Tensor]] = {
            "rgb_l1": lambda: losses.rgb_l1(render.rgb, batch.rgb, rays),
            "rgb_l2": lambda: losses.rgb_l2(render.rgb, batch.rgb, rays),
            "rgb_charbonnier": lambda: losses.rgb_charbonnier(render.rgb, batch.rgb, rays),
            "eikonal": lambda: losses.eikonal(render.gradient, samples),
            "opacity": lambda: losses.opacity_entropy(render.opacity, rays),
            "sparsity": lambda: losses.sparsity(render.sdf, self.config.sparsity_scale, samples),
        }
        if batch.mask is not None:
            mask = batch.mask
            terms["mask"] = lambda: losses.mask_bce(render.opacity, mask, rays)
        return {name: terms[name]() for name in progress.loss_weights}
