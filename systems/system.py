"""What all training rules share: weights that follow schedules, and the terms that look at pixels alone."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from models import Model
from process_data.batches import Priors
from systems import histogram_losses, losses, patch_losses
from systems.schedules import check_schedule, is_ever_on, value_at
from utils.errors import ConfigError
from utils.types import Batch, RenderOutput

T = TypeVar("T")

PatchTerm = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class SystemConfig:
    """What all training rules are told."""

    name: str = ""
    """Of the rules; the model's unless it is given."""
    loss: Any = None
    """A dataclass of weights or schedules by term."""
    patch_size: int = 11
    """Pixels along a side of the patches that the ssim and lpips terms look at."""
    num_patches: int = 4
    """Patches in each batch while one of these terms is on at any time of the run; their pixels count in
    all other terms, too. A batch has never fewer rays than these."""
    background: Literal["random", "scene"] = "random"
    """Colour behind masked objects in training: a new one every step, which forbids the field to imitate it,
    or the scene's own (dataset.background), which forgives masks that are too wide."""

    def __post_init__(self) -> None:
        for key, low in (("patch_size", 3), ("num_patches", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"system.{key}: must be at least {low}, got {getattr(self, key)}")


C = TypeVar("C", bound=SystemConfig)


class System(Generic[C]):
    """A method's training rules, without state.

    Args:
        config: weights, schedules, and what the terms need to know.
        num_levels: of the model's hash grid.
        has_masks: whether the scene has masks.

    Raises:
        ConfigError: a term needs masks that there are not.
    """

    needs_masks: tuple[str, ...] = ("mask", "mask_iou")

    def __init__(self, config: C, num_levels: int, has_masks: bool) -> None:
        self.config = config
        self.num_levels = num_levels
        self.terms = [term.name for term in fields(config.loss)]
        for name in self.needs_masks:
            if not has_masks and self.is_ever_on(name):
                key = f"system.loss.{name}"
                raise ConfigError(key, "needs masks", f"set dataset.apply_mask=true, or {key}=0")

    def is_ever_on(self, name: str) -> bool:
        """Whether the term of this name has a weight at some time of training."""
        return is_ever_on(getattr(self.config.loss, name))

    def key_of(self, *names: str) -> str | None:
        """Config key of the first of these terms that is on at some time."""
        return next((f"system.loss.{name}" for name in names if self.is_ever_on(name)), None)

    def weights_at(self, fraction: float) -> dict[str, float]:
        """Weights above 0 when this fraction (0..1) of training is done."""
        weights = {name: value_at(getattr(self.config.loss, name), fraction) for name in self.terms}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def describe_losses(self) -> str:
        """One line: the terms that are on at some time, each with its weight or its schedule as written."""
        weights = {name: getattr(self.config.loss, name) for name in self.terms if self.is_ever_on(name)}
        return "  ".join(
            f"{name} {weight:g}" if isinstance(weight, (int, float)) else f"{name} {weight}"
            for name, weight in weights.items()
        )

    def check_training(self, model: Model) -> None:
        """Make sure that the terms have all that they look at, and all of the model has a term to learn from.

        Raises:
            ConfigError: the ``lpips`` term is on, and its package missing or its patches too small; a term
                looks at what the model does not have; or nothing trains what places the model's samples.
        """
        if self.is_ever_on("lpips"):
            size = self.config.patch_size
            patch_losses.check_lpips("system.loss.lpips", "system.patch_size", size)
        if model.num_proposals > 0 and not self.is_ever_on("interlevel"):
            what = "is 0, but the proposals that place samples learn from nothing else"
            raise ConfigError("system.loss.interlevel", what, "set it to 1")
        if model.has_coarse_network and not self.is_ever_on("rgb_coarse"):
            what = "is 0, but the coarse network that places samples learns from nothing else"
            raise ConfigError("system.loss.rgb_coarse", what, "set it to 1")
        is_opaque = "every ray ends in this model (model.contraction, model.opaque_background)"
        served = {
            "interlevel": (model.num_proposals > 0, "this model places no samples by proposals"),
            "distortion": (model.num_proposals > 0, "this model places no samples by proposals"),
            "rgb_coarse": (model.has_coarse_network, "this model has no coarse network"),
            **dict.fromkeys(("mask", "mask_iou", "opacity"), (not model.is_opaque, is_opaque)),
        }
        for term, (is_served, what) in served.items():
            if term in self.terms and self.is_ever_on(term) and not is_served:
                raise ConfigError(f"system.loss.{term}", what, "set it to 0")

    @property
    def priors(self) -> Priors:
        """What batches have to bring along for the terms that are on at some time."""
        return Priors(
            patches="system.patch_size" if self.key_of("ssim", "lpips") else None,
            patch_size=self.config.patch_size,
            num_patches=self.config.num_patches,
        )

    def background_color(
        self, scene_color: Float[Tensor, "3"], generator: torch.Generator
    ) -> Float[Tensor, "3"]:
        """The colour behind masked objects for one training step, 0..1."""
        if self.config.background == "random":
            return torch.rand(3, generator=generator, device=generator.device)
        return scene_color


def check_weights(loss: Any) -> None:
    """Raise ``ValueError`` unless a dataclass of weights holds schedules, none below 0, not all 0."""
    names = [term.name for term in fields(loss)]
    for name in names:
        check_schedule(f"system.loss.{name}", getattr(loss, name))
    values = [[value_at(getattr(loss, name), k / 100) for name in names] for k in range(101)]
    if min(map(min, values)) < 0:
        raise ValueError("system.loss: a weight is negative; give 0 or more")
    if not any(map(sum, values)):
        raise ValueError("system.loss: all weights are 0; give at least one colour term a weight")


def given(values: T | None) -> T:
    """What a batch or a render brings along because a term asked for it."""
    assert values is not None, "a term is on that nobody has computed anything for"
    return values


def pixel_terms(render: RenderOutput, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Terms by name that compare what was rendered with the photographs or with their masks."""
    rays = render.is_served
    return {
        "rgb_l1": lambda: losses.rgb_l1(render.rgb, batch.rgb, rays),
        "rgb_l2": lambda: losses.rgb_l2(render.rgb, batch.rgb, rays),
        "rgb_charbonnier": lambda: losses.rgb_charbonnier(render.rgb, batch.rgb, rays),
        "mask": lambda: losses.mask_bce(render.opacity, given(batch.mask), rays),
        "mask_iou": lambda: losses.mask_iou(render.opacity, given(batch.mask), rays),
        "opacity": lambda: losses.opacity_entropy(render.opacity, rays),
        "ssim": lambda: _on_patches(patch_losses.patch_ssim, render, batch),
        "lpips": lambda: _on_patches(patch_losses.patch_lpips, render, batch),
    }


def histogram_terms(render: RenderOutput) -> dict[str, Callable[[], Tensor]]:
    """Terms by name that look at how the rays' light is spread; each proposal must see what is rendered."""

    def interlevel() -> Tensor:
        *proposals, last = render.histograms
        missed = [histogram_losses.interlevel(outer, last, render.is_served) for outer in proposals]
        return torch.stack(missed).sum()

    return {
        "interlevel": interlevel,
        "distortion": lambda: histogram_losses.distortion(render.histograms[-1], render.is_served),
    }


def _on_patches(term: PatchTerm, render: RenderOutput, batch: Batch) -> Tensor:
    keep = None if render.is_served is None else batch.whole_patches(render.is_served)
    return term(batch.patches(render.rgb), batch.patches(batch.rgb), keep)
