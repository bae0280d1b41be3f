"""Density and colour of Gaussians: mip-NeRF 360's networks on the integrated positional encoding.

::

    Gaussian ─contract─> 21 directions x 12 octaves ─> ReLU layers ─> density = softplus(x - 1)
                                          │      ↑ again behind layer 5   │
                                          └──────┘             bottleneck ┴─ view direction ─> ReLU ─> colour

The proposals' network stops at the density. All weights are He-uniform, all biases zero.

Source: mip-NeRF 360 (Barron et al. 2022), sections 2, 3 and the supplement; what the paper leaves open is as
in its authors' multinerf.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoder import (
    encode_frequency,
    encode_integrated,
    frequency_width,
    icosahedron_directions,
    integrated_width,
)
from models.gaussians import Gaussians, contract_gaussians

_SKIP_EVERY = 4
"""After layers 5, 9, ... the encoding is appended (multinerf)."""


@dataclass(frozen=True)
class LayersConfig:
    """ReLU layers of one width."""

    hidden_width: int = 64
    """Units per layer."""
    hidden_layers: int = 2
    """Layers, at least 1."""


@dataclass(frozen=True)
class EncodingConfig:
    """How positions and directions are told to the networks."""

    num_frequencies: int = 12
    """Octaves along each of the 21 directions; 12 reach down to waves of 2 pi / 2048 contracted units."""
    direction_frequencies: int = 4
    """Octaves of the view direction."""
    contracted: bool = True
    """Whether space outside of the unit ball is contracted; false suits bounded scenes."""

    def __post_init__(self) -> None:
        for key, low, high in (("num_frequencies", 1, 16), ("direction_frequencies", 0, 8)):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"model.encoding.{key}: must lie in {low}..{high}, got {getattr(self, key)}")


Precision = Literal["float32", "bfloat16"]
"""What the factors of the hidden layers' matrix products are rounded to; heads are float32 always."""


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class DensityMLP(nn.Module):
    """Density of Gaussians."""

    def __init__(self, encoding: EncodingConfig, layers: LayersConfig, precision: Precision) -> None:
        super().__init__()
        self.encoding, self.precision = encoding, precision
        # A buffer follows the network to its device; a checkpoint need not know it.
        self.directions: Tensor
        self.register_buffer("directions", icosahedron_directions(), persistent=False)
        inputs = integrated_width(len(self.directions), encoding.num_frequencies)
        self.layers = nn.ModuleList()
        width = inputs
        for layer in range(layers.hidden_layers):
            self.layers.append(_linear(width, layers.hidden_width))
            width = layers.hidden_width + (inputs if self._skips(layer) else 0)
        self.feature_width = width
        self.density = _linear(width, 1)

    def _skips(self, layer: int) -> bool:
        return layer > 0 and layer % _SKIP_EVERY == 0

    def forward(self, gaussians: Gaussians) -> tuple[Float[Tensor, " S"], Float[Tensor, "S F"]]:
        """Density per unit of length, and the last layer's values."""
        if self.encoding.contracted:
            gaussians = contract_gaussians(gaussians)
        means, variances = gaussians.along(self.directions)
        encoded = encode_integrated(means, variances, self.encoding.num_frequencies)
        hidden = encoded
        # Weights are not cached in half precision: a recorded step would go on with the first ones.
        rounds = self.precision == "bfloat16"
        with torch.autocast(encoded.device.type, torch.bfloat16, enabled=rounds, cache_enabled=False):
            for layer, linear in enumerate(self.layers):
                hidden = torch.relu(linear(hidden))
                if self._skips(layer):
                    hidden = torch.cat([hidden, encoded.to(hidden.dtype)], dim=1)
        features = hidden.to(encoded.dtype)
        return nn.functional.softplus(self.density(features)[:, 0] - 1.0), features


class ColorHead(nn.Module):
    """Colour of what a ray sees, from the density network's features and the ray's direction."""

    padding = 0.001
    """By so much colours may leave 0..1, so that black and white are within reach of the sigmoid."""

    def __init__(
        self,
        features: int,
        bottleneck: int,
        width: int,
        direction_frequencies: int,
        appearance_width: int = 0,
    ) -> None:
        super().__init__()
        self.direction_frequencies = direction_frequencies
        self.bottleneck = _linear(features, bottleneck)
        per_ray = frequency_width(3, direction_frequencies) + appearance_width
        self.view = _linear(bottleneck + per_ray, width)
        self.rgb = _linear(width, 3)

    def forward(
        self,
        features: Float[Tensor, "S F"],
        directions: Float[Tensor, "R 3"],
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "S 3"]:
        """RGB of S / R samples on each of R rays, one ray after another; see ``appearance.py``."""
        encoded = encode_frequency(directions, self.direction_frequencies)
        if appearance is not None:
            encoded = torch.cat([encoded, appearance], dim=1)
        encoded = encoded.repeat_interleave(len(features) // max(len(directions), 1), dim=0)
        hidden = torch.relu(self.view(torch.cat([self.bottleneck(features), encoded], dim=1)))
        return torch.sigmoid(self.rgb(hidden)) * (1.0 + 2.0 * self.padding) - self.padding
