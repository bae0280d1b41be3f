"""The fields of a surface model: signed distance, and colour on the surface."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig, encode_spherical_harmonics
from encoder.hashgrid import GridGeometry
from models.backends import Backends
from models.mlp import Precision, relu_mlp
from models.numerical_gradient import TAPS, numerical_derivatives, tap_distance
from models.sdf_network import reference, sdf_only, sdf_outputs, sdf_values, sdf_with_gradient
from utils.backend import implementation
from utils.padding import zero_padding

SOFTPLUS_BETA = 100.0
"""Sharpness of the SDF network's softplus, as in IDR and NeuS: nearly a ReLU, yet twice differentiable."""


@dataclass(frozen=True)
class SDFConfig:
    """Signed distance network on a hash grid."""

    hash_grid: HashGridConfig = field(default_factory=HashGridConfig)
    hidden_width: int = 64
    """Units per hidden layer."""
    hidden_layers: int = 1
    """Hidden layers, at least 1."""
    feature_width: int = 15
    """Geometry features handed to the radiance field beside the distance itself."""
    initial_radius: float = 0.5
    """Radius of the sphere that the untrained network represents, scene units (0..1)."""
    inside_out: bool = False
    """Start from the sphere's inside as the empty space, for rooms seen from within: all cameras must then be
    in the sphere. False: the sphere itself is solid, and cameras are outside."""
    gradient: Literal["analytic", "numerical"] = "analytic"
    """Of the distance: exact and local to a grid cell, or differences over the width of a cell of the finest
    open level, whose losses reach the neighbouring cells (Neuralangelo); these also give the Laplacian."""
    taps: int = 4
    """Evaluations per numerical gradient: 4 (corners of a tetrahedron) or 6 (central differences)."""

    def __post_init__(self) -> None:
        if self.taps not in TAPS:
            raise ValueError(f"model.sdf.taps: must be 4 or 6, got {self.taps}")
        if not 0 < self.initial_radius < 1:
            raise ValueError(f"model.sdf.initial_radius: must lie between 0 and 1, got {self.initial_radius}")
        for key in ("hidden_width", "hidden_layers", "feature_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.sdf.{key}: must be at least 1, got {getattr(self, key)}")


@dataclass(frozen=True)
class RadianceConfig:
    """Colour network: geometry features, normal and view direction to RGB."""

    head: Literal["view", "reflection"] = "view"
    """What the colour depends on: the view direction, or, for shiny surfaces, diffuse light and what the
    reflected direction shows (see ``models/reflection.py``)."""
    hidden_width: int = 64
    """Units per hidden layer."""
    hidden_layers: int = 2
    """Hidden layers, at least 1."""
    direction_degree: int = 4
    """Bands of spherical harmonics for the view direction, or the reflected one (1..5)."""
    precision: Precision = "tf32"
    """Of the matrix products on a GPU (CPUs compute in float32); distances and normals are float32 always."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("hidden_width", 1, 4096),
            ("hidden_layers", 1, 16),
            ("direction_degree", 1, 5),
        ):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"model.radiance.{key}: must lie in {low}..{high}, got {getattr(self, key)}")


class ReLUNetwork(nn.Sequential):
    """Linear layers with ReLU between them; He-uniform weights and zero biases."""

    def __init__(self, widths: list[int], backend: str, precision: Precision = "tf32") -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        super().__init__(*layers[:-1])
        self.backend, self.precision = backend, precision

    def forward(
        self, inputs: Float[Tensor, "S I"], count: Int64[Tensor, ""] | None = None
    ) -> Float[Tensor, "S O"]:
        """See :func:`models.mlp.relu_mlp`."""
        linears = [layer for layer in self if isinstance(layer, nn.Linear)]
        weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
        return relu_mlp(inputs, weights, biases, self.backend, count, self.precision)


def make_network(widths: list[int], backend: str, precision: Precision = "tf32") -> nn.Module:
    """A small ReLU network: ours, whose parameters every backend shares, or tiny-cuda-nn's own."""
    if backend == "tinycudann":
        network: nn.Module = implementation("models.mlp", "tinycudann").Network(widths)
        return network
    return ReLUNetwork(widths, backend, precision)


def _spread_directions(count: int) -> Float[Tensor, "D 3"]:
    """Unit vectors spread evenly over the sphere (a Fibonacci spiral), rotated at random."""
    index = torch.arange(count)
    z = 1.0 - (2.0 * index + 1.0) / count
    angle = index * (math.pi * (3.0 - math.sqrt(5.0)))
    radius = (1.0 - z.square()).sqrt()
    spiral = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    return spiral @ rotation


_NetworkArguments = tuple[Tensor, GridGeometry, float | Tensor, list[Tensor], list[Tensor], float, str]


class SDFField(nn.Module):
    """Signed distance over the unit ball, negative inside, starting out as a sphere.

    The geometric initialisation follows SAL (Atzmon and Lipman 2020, theorem 1), as IDR and NeuS do: a
    first layer on the position alone makes |x| from softplus units, the last one sums them, and its bias
    subtracts the radius. SAL's rows are random, which with 64 units leaves lumps of 0.1; rows spread
    evenly over the sphere leave 0.003 on average.
    """

    def __init__(self, config: SDFConfig, backends: Backends) -> None:
        super().__init__()
        self.grid = HashGrid(config.hash_grid, bound=1.0, backend=backends.hash_grid)
        self.backend = backends.sdf_network
        self.is_numerical = config.gradient == "numerical"
        # A buffer follows the model to its device; a checkpoint need not know it.
        self.tap_directions: Tensor
        self.register_buffer("tap_directions", TAPS[config.taps].clone(), persistent=False)
        self.output_width = 1 + config.feature_width + self.grid.width
        widths = [self.grid.width] + [config.hidden_width] * config.hidden_layers + [1 + config.feature_width]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            weight, bias = torch.zeros(fan_out, fan_in), torch.zeros(fan_out)
            if layer == len(widths) - 2:
                # Only the distance is initialised as one; features that all equal it would be of little use.
                weight.normal_(0.0, math.sqrt(2.0 / fan_in))
                weight[0] = 1.0
            elif layer == 0:
                weight[:, :3] = _spread_directions(fan_out)
            else:
                weight.normal_(0.0, math.sqrt(2.0 / fan_out))
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        with torch.no_grad():
            self._fit_initial_sphere(config.initial_radius)
            if config.inside_out:
                self.weights[-1][0] *= -1.0
                self.biases[-1][0] *= -1.0

    def _fit_initial_sphere(self, radius: float) -> None:
        """Scale and shift the last layer: on the sphere the mean is zero, the mean radial slope one."""
        directions = _spread_directions(2048)

        def mean_sdf(at: float) -> Tensor:
            # Without levels the table has no say. Parameters are made on the CPU whatever the device will be.
            features = torch.cat([directions * at, torch.zeros(len(directions), self.grid.width - 3)], dim=1)
            layers = list(self.weights), list(self.biases)
            return reference.network(features, *layers, SOFTPLUS_BETA)[:, 0].mean()

        at_zero = mean_sdf(radius)
        slope = (mean_sdf(1.2 * radius) - at_zero) / (0.2 * radius)
        self.weights[-1][0] /= slope
        self.biases[-1][0] = -at_zero / slope

    def forward(
        self,
        positions: Float[Tensor, "S 3"],
        active_levels: float | Float[Tensor, ""],
        count: Int64[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S 3"]]:
        """Outputs (column 0 is the signed distance, all serve as features), and the distance's gradient.

        Rows from ``count`` on are padding and give zeros.
        """
        outputs, gradient, _ = self.with_laplacian(positions, active_levels, count)
        return outputs, gradient

    def with_laplacian(
        self,
        positions: Float[Tensor, "S 3"],
        active_levels: float | Float[Tensor, ""],
        count: Int64[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S 3"], Float[Tensor, " S"] | None]:
        """:meth:`forward`, and the distance's Laplacian where gradients are numerical.

        Source: Neuralangelo (Li et al. 2023), equations 2 to 4 and 10.
        """
        where = positions, *self._network(active_levels)
        if not self.is_numerical:
            return *sdf_with_gradient(*where, count), None
        outputs = sdf_outputs(*where, count)
        directions = self.tap_directions
        real = None if count is None else count * len(directions)
        gradient, laplacian = numerical_derivatives(
            lambda taps: sdf_values(taps, *self._network(active_levels), real),
            zero_padding(positions, count),
            outputs[:, 0],
            directions.to(positions.dtype),
            tap_distance(self.grid.geometry, active_levels),
        )
        return outputs, gradient, laplacian

    def sdf(
        self,
        positions: Float[Tensor, "S 3"],
        active_levels: float | Float[Tensor, ""],
        count: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, " S"]:
        """The signed distance alone, outside of autograd."""
        return sdf_only(positions, *self._network(active_levels), count)

    def _network(self, active_levels: float | Float[Tensor, ""]) -> _NetworkArguments:
        """The arguments of the network's operations between positions and count."""
        return (
            *(self.grid.table, self.grid.geometry, active_levels),
            *(list(self.weights), list(self.biases), SOFTPLUS_BETA, self.backend),
        )


class RadianceField(nn.Module):
    """Colour leaving a surface point: MLP([geometry features, SH(view direction), normal]) with a sigmoid.

    With ``appearance_width`` above 0 the image's vector of that size follows the encoded direction.
    """

    def __init__(
        self, config: RadianceConfig, feature_width: int, backends: Backends, appearance_width: int = 0
    ) -> None:
        super().__init__()
        self.direction_degree = config.direction_degree
        inputs = feature_width + config.direction_degree**2 + appearance_width + 3
        widths = [inputs] + [config.hidden_width] * config.hidden_layers + [3]
        self.network = make_network(widths, backends.network, config.precision)

    def forward(
        self,
        features: Float[Tensor, "S C"],
        directions: Float[Tensor, "R 3"],
        ray_indices: Int64[Tensor, " S"],
        normal: Float[Tensor, "S 3"],
        count: Int64[Tensor, ""] | None = None,
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "S 3"]:
        """RGB in (0, 1). ``directions`` are unit, per ray, so that their encoding is computed once a ray.

        Samples from ``count`` on are padding. ``appearance`` are the vectors of the rays' images.
        """
        encoded = encode_spherical_harmonics(directions, self.direction_degree)
        if appearance is not None:
            encoded = torch.cat([encoded, appearance], dim=1)
        encoded = encoded.index_select(0, ray_indices)
        return torch.sigmoid(self.network(torch.cat([features, encoded, normal], dim=1), count))
