"""Training rules of the radiance family: colours, and where its methods place samples."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.resampling import anneal_exponent
from systems import losses
from systems.histogram_losses import distortion, interlevel
from systems.system import System, check_weights, given, pixel_terms
from utils.errors import ConfigError
from utils.types import Batch, Field, Progress, RenderOutput


@dataclass(frozen=True)
class RadianceLossConfig:
    """Weight of each term: a number, or a schedule of [fraction, value] pairs; with 0 it is not computed."""

    rgb_l1: Any = 0.0
    rgb_l2: Any = 1.0
    rgb_charbonnier: Any = 0.0
    rgb_coarse: Any = 0.0
    """Squared error of the coarse network's colours (NeRF)."""
    interlevel: Any = 0.0
    """How much of the light the proposals miss (mip-NeRF 360, equation 13). Typical: 1."""
    distortion: Any = 0.0
    """How far a ray's light is spread (mip-NeRF 360, equation 15); of methods with proposals. Typical: 0.002
    to 0.01."""
    mask: Any = 0.0
    """Binary cross entropy of opacity and mask; needs masks."""
    mask_iou: Any = 0.0
    """1 - intersection over union of opacity and mask; needs masks."""
    opacity: Any = 0.0
    """Entropy of the rays' opacities: all or nothing."""
    ssim: Any = 0.0
    """1 - structural similarity of patches (Wang et al. 2004)."""
    lpips: Any = 0.0
    """Perceptual distance of patches (Zhang et al. 2018); needs the package lpips and a patch_size of 32 or
    more."""

    def __post_init__(self) -> None:
        check_weights(self)


@dataclass(frozen=True)
class RadianceSystemConfig:
    """Loss terms of radiance fields."""

    name: str = "nerf-ngp"
    loss: RadianceLossConfig = RadianceLossConfig()
    proposal_bias: float = 10.0
    """How soon samples follow the proposals: at fraction f of training their weights count to the power of
    b f / ((b - 1) f + 1), with b = 1 slowly (mip-NeRF 360, appendix)."""
    patch_size: int = 11
    """Pixels along a side of the patches that the ssim and lpips terms look at."""
    num_patches: int = 4
    """Patches in each batch while one of these terms is on at any time of the run."""
    background: Literal["random", "scene"] = "random"
    """Colour behind masked objects in training: a new one every step, which forbids the field to imitate it,
    or the scene's own (dataset.background)."""

    def __post_init__(self) -> None:
        for key, low in (("patch_size", 3), ("num_patches", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"system.{key}: must be at least {low}, got {getattr(self, key)}")
        if not 1 <= self.proposal_bias <= 1000:
            raise ValueError(f"system.proposal_bias: must lie in 1..1000, got {self.proposal_bias}")


_NEEDED = {
    "rgb_coarse": ("rgb_coarse", "only the original NeRF has a coarse network that sees the photographs"),
    "interlevel": ("histograms", "proposals"),
    "distortion": ("histograms", "proposals"),
}
"""By term: the field of a render that it looks at, and which models have it."""


class RadianceSystem(System[RadianceSystemConfig]):
    """Judges what a radiance field renders. It holds no state."""

    def check_training(self, provided: Collection[str]) -> None:
        """Also: the model renders what the terms look at."""
        super().check_training(provided)
        for term, (what, remedy) in _NEEDED.items():
            if self.is_ever_on(term) and what not in provided:
                key = f"system.loss.{term}"
                raise ConfigError(key, f"looks at what the model does not have ({remedy})", "set it to 0")

    def progress_at(self, fraction: float) -> Progress:
        """Everything that depends on the fraction (0..1) of training done."""
        return Progress(
            *(fraction, 1.0, float(self.num_levels), self.weights_at(fraction)),
            proposal_anneal=anneal_exponent(fraction, self.config.proposal_bias),
        )

    def loss_terms(
        self,
        render: RenderOutput,
        batch: Batch,
        progress: Progress,
        field: Field,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The unweighted terms that have a weight now; neither ``field`` nor ``generator`` is needed."""
        rays = render.is_served
        terms: dict[str, Callable[[], Tensor]] = pixel_terms(render, batch) | {
            "rgb_coarse": lambda: losses.rgb_l2(given(render.rgb_coarse), batch.rgb, rays),
            "interlevel": lambda: _interlevel(render),
            "distortion": lambda: distortion(render.histograms[-1], rays),
        }
        return {name: terms[name]() for name in progress.loss_weights}


def _interlevel(render: RenderOutput) -> Tensor:
    *proposals, last = render.histograms
    return torch.stack([interlevel(proposal, last, render.is_served) for proposal in proposals]).sum()
