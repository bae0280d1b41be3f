"""Density and colour anywhere in a box, on a hash grid: the pair of networks of instant-ngp.

position -> hash grid -> density network -> density, features
                         features, view direction -> colour network -> colour
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig, encode_spherical_harmonics
from models.backends import Backends
from models.fields import make_network
from models.mlp import Precision

_MAX_EXPONENT = 15.0
"""Bound on the density's logarithm: neither it nor its gradient overflows."""


@dataclass(frozen=True)
class DensityFieldConfig:
    """Density and colour on a hash grid."""

    hash_grid: HashGridConfig = field(default_factory=HashGridConfig)
    hidden_width: int = 64
    """Units per hidden layer of the density's network."""
    hidden_layers: int = 1
    """Its hidden layers, at least 1."""
    feature_width: int = 15
    """Features that it hands to the colour's network."""
    color_width: int = 64
    """Units per hidden layer of the colour's network."""
    color_layers: int = 2
    """Its hidden layers, at least 1."""
    direction_degree: int = 4
    """Bands of spherical harmonics for the view direction (1..5)."""
    precision: Precision = "tf32"
    """Of the matrix products on a GPU (CPUs compute in float32)."""

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("hidden_width", "feature_width", "color_width"), (1, 4096))
        bounds |= dict.fromkeys(("hidden_layers", "color_layers"), (1, 16))
        for key, (low, high) in (bounds | {"direction_degree": (1, 5)}).items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(
                    f"model.density_field.{key}: must lie in {low}..{high}, got {getattr(self, key)}"
                )


def density_of(raw: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Density, 1 / scene units, from what a network says: exp(x - 1), as instant-nsr-pl starts it."""
    return torch.exp((raw - 1.0).clamp(max=_MAX_EXPONENT))


class DensityField(nn.Module):
    """Density and colour over ``[-bound, bound]^3`` (Müller et al. 2022, section 5.4)."""

    def __init__(
        self, config: DensityFieldConfig, bound: float, backends: Backends, appearance_width: int = 0
    ) -> None:
        super().__init__()
        self.direction_degree = config.direction_degree
        self.grid = HashGrid(config.hash_grid, bound=bound, backend=backends.hash_grid)
        hidden = [config.hidden_width] * config.hidden_layers
        self.density_network = make_network(
            [self.grid.width, *hidden, 1 + config.feature_width], backends.network, config.precision
        )
        inputs = config.feature_width + config.direction_degree**2 + appearance_width
        hidden = [config.color_width] * config.color_layers
        self.color_network = make_network([inputs, *hidden, 3], backends.network, config.precision)

    def density(
        self, positions: Float[Tensor, "S 3"], count: Int64[Tensor, ""] | None = None
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, "S C"]]:
        """Density, 1 / scene units, and features; rows from ``count`` on are padding."""
        encoded = self.grid(positions, float(self.grid.num_levels), count)
        raw = self.density_network(encoded, count)
        return density_of(raw[:, 0]), raw[:, 1:]

    def color(
        self,
        features: Float[Tensor, "S C"],
        directions: Float[Tensor, "R 3"],
        ray_indices: Int64[Tensor, " S"],
        count: Int64[Tensor, ""] | None = None,
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "S 3"]:
        """RGB in (0, 1). Unit ``directions`` and any ``appearance`` (see ``appearance.py``) are per ray."""
        per_ray = encode_spherical_harmonics(directions, self.direction_degree)
        if appearance is not None:
            per_ray = torch.cat([per_ray, appearance], dim=1)
        inputs = torch.cat([features, per_ray.index_select(0, ray_indices)], dim=1)
        return torch.sigmoid(self.color_network(inputs, count))

    def color_at(
        self,
        positions: Float[Tensor, "P 3"],
        directions: Float[Tensor, "P 3"],
        appearance: Float[Tensor, "P A"] | None = None,
    ) -> Float[Tensor, "P 3"]:
        """:meth:`color` where each position has a direction of its own."""
        _, features = self.density(positions)
        rows = torch.arange(len(positions), device=positions.device)
        return self.color(features, directions, rows, appearance=appearance)
