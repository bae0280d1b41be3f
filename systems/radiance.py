"""Training rules of the radiance family: colours, and where its methods place samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from systems import losses
from systems.schedules import proposal_exponent
from systems.system import System, SystemConfig, check_weights, given, histogram_terms, pixel_terms
from utils.types import Batch, Field, Progress, RenderOutput


@dataclass(frozen=True)
class RadianceLossConfig:
    """Weight of each term: a number, or a schedule of [fraction, value] pairs; with 0 it is not computed."""

    rgb_l1: Any = 0.0
    rgb_l2: Any = 1.0
    rgb_charbonnier: Any = 0.0
    rgb_coarse: Any = 0.0
    """Squared error of the coarse network's colours (NeRF)."""
    mask: Any = 0.0
    """Binary cross entropy of opacity and mask; needs masks."""
    mask_iou: Any = 0.0
    """1 - intersection over union of opacity and mask; needs masks."""
    opacity: Any = 0.0
    """Entropy of the rays' opacities: all or nothing."""
    interlevel: Any = 0.0
    """How much of the rendered weights each proposal misses (mip-NeRF 360, equation 13); needs a method with
    proposals, which learn from nothing else. Typical: 1."""
    distortion: Any = 0.0
    """How far the light of a ray is spread (mip-NeRF 360, equation 15); needs the same. Typical: 0.01."""
    ssim: Any = 0.0
    """1 - structural similarity of patches (Wang et al. 2004)."""
    lpips: Any = 0.0
    """Perceptual distance of patches (Zhang et al. 2018); needs the package lpips and a patch_size of 32 or
    more."""

    def __post_init__(self) -> None:
        check_weights(self)


@dataclass(frozen=True)
class RadianceSystemConfig(SystemConfig):
    """Loss terms of radiance fields."""

    name: str = "nerf-ngp"
    loss: RadianceLossConfig = RadianceLossConfig()
    proposal_anneal_end: float = 0.0
    """Fraction of training after which samples are drawn as the proposals say; before, more evenly (0 = from
    the start)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.proposal_anneal_end <= 1:
            raise ValueError(f"system.proposal_anneal_end: must lie in 0..1, got {self.proposal_anneal_end}")


class RadianceSystem(System[RadianceSystemConfig]):
    """Judges what a radiance field renders. It holds no state."""

    def progress_at(self, fraction: float) -> Progress:
        """Everything that depends on the fraction (0..1) of training done."""
        annealed = proposal_exponent(fraction, self.config.proposal_anneal_end)
        weights = self.weights_at(fraction)
        return Progress(fraction, 1.0, float(self.num_levels), weights, proposal_anneal=annealed)

    def loss_terms(
        self,
        render: RenderOutput,
        batch: Batch,
        progress: Progress,
        field: Field,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The unweighted terms that have a weight now; neither ``field`` nor ``generator`` is needed."""
        terms = pixel_terms(render, batch) | histogram_terms(render)
        terms["rgb_coarse"] = lambda: losses.rgb_l2(given(render.rgb_coarse), batch.rgb, render.is_served)
        return {name: terms[name]() for name in progress.loss_weights}
