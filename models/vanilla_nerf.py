"""NeRF as it was published (Mildenhall et al. 2020): two large networks of frequencies, coarse and fine.

    near |  .  |.    | .   |   . | .   |.    | far     one sample at random in each of 64 even bins
             coarse network, weights w_i               its colours are compared with the photograph, too
         |   .  ..:::::.   |     |     |     |         128 more, distributed like the w_i
             fine network on all 192                   is what is shown

    x, 10 octaves ─> 8 layers of 256, the input again behind the 5th ─┬─> density
                                                                      └─> 256 features ─┐
    d, 4 octaves ────────────────────────────────────────────────────> 128 units ─> colour

A pixel is sum_i T_i (1 - exp(-density_i delta_i)) c_i (equation 3), delta_i being the distance to the next
sample. Rays are sampled where they cross the unit sphere, instead of between two depths for all of them.

Two things differ from the authors' code, whose ReLU density is dead for whole runs where all of a network's
outputs start below zero, so that the picture stays white. Density is softplus(x - 1) unless asked for
otherwise, which has a gradient everywhere (mip-NeRF, Barron et al. 2021, section 4); and the last sample's
delta ends at ``far``, and not at infinity, where the faintest density would be opaque.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoder import encode_frequency, frequency_width
from models.appearance import AppearanceConfig, appearance_of, mean_appearance, per_image_modules
from models.backends import Backends
from models.chunks import in_chunks
from models.density_surface import DensitySurface, check_surface_density, dense_cells, density_normals
from models.gradient_scaling import check_reach, scale_gradients
from models.model import Model
from models.proposal import composite_weights
from models.resampling import sample_points
from utils.types import Budget, Progress, Rays, RenderOutput, Scene


@dataclass(frozen=True)
class VanillaNeRFConfig:
    """The original NeRF; defaults are the paper's."""

    name: str = "nerf"
    backend: str = "auto"
    """Which version of the compositing kernels: auto, cpu, cuda or reference."""
    position_frequencies: int = 10
    """Octaves of the positions' encoding."""
    direction_frequencies: int = 4
    """Octaves of the view directions' encoding."""
    hidden_width: int = 256
    """Units per hidden layer, and features that the colour gets."""
    hidden_layers: int = 8
    """Hidden layers of the density, at least 1."""
    skip: int = 5
    """Behind this hidden layer the encoded position is handed in again; 0: nowhere."""
    view_width: int = 128
    """Units of the layer that brings features and view direction together."""
    num_coarse: int = 64
    """Samples per ray of the coarse network, at least 4."""
    num_fine: int = 128
    """Samples per ray that the fine network gets beside these."""
    activation: Literal["softplus", "relu"] = "softplus"
    """What makes a density of the network's output x: log(1 + exp(x - 1)), or max(x, 0) as in the paper."""
    density_noise: float = 0.0
    """Standard deviation of noise on x in training (the paper's 1 for photographs, with relu)."""
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    gradient_scaling: float = 0.0
    """See model.gradient_scaling of NeuS: distance from a camera, scene units; 0 leaves gradients alone."""
    surface_density: float = 10.0
    """Density of the level set that meshes show, 1 / scene units."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("position_frequencies", 0, 16),
            ("direction_frequencies", 0, 16),
            ("hidden_width", 1, 4096),
            ("hidden_layers", 1, 64),
            ("skip", 0, self.hidden_layers - 1),
            ("view_width", 1, 4096),
            ("num_coarse", 4, 4096),
            ("num_fine", 1, 4096),
            ("density_noise", 0, 100),
        ):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"model.{key}: must lie in {low:g}..{high:g}, got {getattr(self, key):g}")
        check_surface_density(self.surface_density)
        check_reach("model.gradient_scaling", self.gradient_scaling)


class NeRFNetwork(nn.Module):
    """Density and colour of positions and directions (figure 7 of the paper's supplement).

    Weights are Xavier-uniform and biases zero, as Keras has them; PyTorch's own draw is what some seeds of
    other ports never start from.
    """

    def __init__(self, config: VanillaNeRFConfig) -> None:
        super().__init__()
        self.position_frequencies = config.position_frequencies
        self.direction_frequencies = config.direction_frequencies
        self.skip = config.skip
        position = frequency_width(3, config.position_frequencies)
        direction = frequency_width(3, config.direction_frequencies) + config.appearance.inputs
        width = config.hidden_width
        self.hidden = nn.ModuleList(
            nn.Linear(
                position if layer == 0 else width + (position if layer == config.skip > 0 else 0), width
            )
            for layer in range(config.hidden_layers)
        )
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.view = nn.Linear(width + direction, config.view_width)
        self.color = nn.Linear(config.view_width, 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def geometry(self, positions: Float[Tensor, "S 3"]) -> tuple[Float[Tensor, " S"], Float[Tensor, "S W"]]:
        """What density is made of, and the last hidden layer."""
        encoded = encode_frequency(positions, self.position_frequencies)
        hidden = encoded
        for layer, linear in enumerate(self.hidden):
            if layer == self.skip > 0:
                hidden = torch.cat([encoded, hidden], dim=1)
            hidden = torch.relu(linear(hidden))
        return self.density(hidden)[:, 0], hidden

    def radiance(
        self,
        hidden: Float[Tensor, "R_N W"],
        directions: Float[Tensor, "R 3"],
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "R_N 3"]:
        """RGB in (0, 1) of N samples on each of R rays, one ray after another."""
        encoded = encode_frequency(directions, self.direction_frequencies)
        if appearance is not None:
            encoded = torch.cat([encoded, appearance], dim=1)
        encoded = encoded.repeat_interleave(len(hidden) // max(len(directions), 1), dim=0)
        seen = torch.relu(self.view(torch.cat([self.feature(hidden), encoded], dim=1)))
        return torch.sigmoid(self.color(seen))


class VanillaNeRF(Model):
    """A coarse network that says where the fine one has to look."""

    def __init__(self, config: VanillaNeRFConfig, scene: Scene, backends: Backends) -> None:
        super().__init__(backends)
        self.config = config
        self.coarse, self.fine = NeRFNetwork(config), NeRFNetwork(config)
        self.embedding, self.exposure = per_image_modules(config.appearance, scene)

    @property
    def device(self) -> torch.device:
        """Where rays have to live."""
        return self.fine.color.bias.device

    @property
    def num_levels(self) -> int:
        """0: there is no hash grid."""
        return 0

    @property
    def has_coarse_network(self) -> bool:
        """It has one, which learns from ``rgb_coarse`` alone."""
        return True

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All are ``networks``."""
        return {"networks": list(self.parameters())}

    def density_of(
        self, raw: Float[Tensor, " S"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " S"]:
        """Density, 1 / scene units, of a network's outputs; a generator makes them noisy."""
        if generator is not None and self.config.density_noise > 0:
            noise = torch.randn(len(raw), generator=generator, device=raw.device, dtype=raw.dtype)
            raw = raw + self.config.density_noise * noise
        if self.config.activation == "relu":
            return torch.relu(raw)
        return nn.functional.softplus(raw - 1.0)

    def render(
        self,
        rays: Rays,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None = None,
        budget: Budget | None = None,
    ) -> RenderOutput:
        """Sample, query, composite, twice: rays in, pixels out.

        Args:
            rays: in scene space.
            progress: of training.
            background_color: behind the unit sphere, 0..1.
            generator: jitters the samples (training); ``None`` takes the middles, and computes normals.
            budget: every ray is rendered whatever it says; those behind its ``num_rays`` do not count.
        """
        if budget is not None:
            rays = budget.limit(rays)
        # A ray that misses the sphere is sampled in one point: without length there is nothing.
        near, far = rays.near, torch.maximum(rays.near, rays.far)
        t = _stratified(near, far, self.config.num_coarse, generator)
        rgb_coarse, _, weights, _ = self._shade(self.coarse, rays, t, far, background_color, generator)
        with torch.no_grad():
            # Between the middles of the samples, as each stands for what is around it.
            middles = 0.5 * (t[:, 1:] + t[:, :-1])
            more = sample_points(middles, weights[:, 1:-1], self.config.num_fine, generator)
            t = torch.cat([t, more], dim=1).sort(dim=1).values
        rgb, positions, weights, opacity = self._shade(self.fine, rays, t, far, background_color, generator)

        normal = torch.zeros_like(positions)
        if generator is None:
            normal = in_chunks(lambda chunk: density_normals(self.query_density, chunk), positions.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and progress.learns_from_geometry):
            depth = (weights * t).sum(dim=1)
            shown = (weights[..., None] * normal.view(*t.shape, 3)).sum(dim=1)
        is_served = None if budget is None else budget.counts(len(rays))
        asked = self.config.num_coarse + t.shape[1]
        return RenderOutput(
            rgb=rgb,
            opacity=opacity,
            depth=depth,
            normal=shown,
            positions=positions,
            weights=weights.flatten(),
            num_marched=asked * (len(rays) if budget is None else budget.num_rays),
            is_sample=None if is_served is None else is_served.repeat_interleave(t.shape[1]),
            is_served=is_served,
            rgb_coarse=rgb_coarse,
        )

    def _shade(
        self,
        network: NeRFNetwork,
        rays: Rays,
        t: Float[Tensor, "R N"],
        far: Float[Tensor, " R"],
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R_N 3"], Float[Tensor, "R N"], Float[Tensor, " R"]]:
        """Pixels, samples' positions, their weights and the sums of these."""
        positions = (rays.origins[:, None] + t[..., None] * rays.directions[:, None]).flatten(0, 1)
        raw, hidden = network.geometry(positions)
        density = self.density_of(raw, generator)
        appearance = appearance_of(self.embedding, rays.camera_indices)
        rgb = network.radiance(hidden, rays.directions, appearance)
        if self.config.gradient_scaling > 0:
            density, rgb = scale_gradients(density, rgb, t.flatten(), self.config.gradient_scaling)
        lengths = torch.cat([t[:, 1:], far[:, None]], dim=1) - t
        weights = composite_weights(density, lengths, False, self.backends.compositing)
        color, opacity = (weights[..., None] * rgb.view(*t.shape, 3)).sum(dim=1), weights.sum(dim=1)
        if self.exposure is not None:
            color = self.exposure(color, rays.camera_indices, opacity)
        return color + (1.0 - opacity[:, None]) * background_color, positions, weights, opacity

    def frozen_at(self, progress: Progress, extent: float = 1.0) -> DensitySurface:
        """The level set of the fine network's density, ready to be asked."""
        del progress
        level = self.config.surface_density
        return DensitySurface(self, level, dense_cells(self, 0.1 * level))

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density of the fine network, 1 / scene units; differentiable."""
        return self.density_of(self.fine.geometry(positions)[0])

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions, that of no particular photograph; differentiable."""
        appearance = mean_appearance(self.embedding, len(positions))
        return self.fine.radiance(self.fine.geometry(positions)[1], directions, appearance)


def _stratified(
    near: Float[Tensor, " R"], far: Float[Tensor, " R"], count: int, generator: torch.Generator | None
) -> Float[Tensor, "R N"]:
    """One distance in each of ``count`` even bins between near and far (equation 2), or its middle."""
    bins = torch.arange(count, device=near.device, dtype=near.dtype)
    if generator is None:
        jitter = torch.full_like(near[:, None], 0.5)
    else:
        shape = len(near), count
        jitter = torch.rand(shape, generator=generator, device=near.device, dtype=near.dtype)
    return torch.lerp(near[:, None], far[:, None], (bins + jitter) / count)
