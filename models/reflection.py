"""A colour head for shiny surfaces: diffuse light plus reflections, looked up by the reflected direction.

On a glossy surface the colour as a function of the view direction changes from point to point, while as a
function of the *reflected* direction it is nearly the same everywhere: a picture of the surroundings. A
network of view directions has to learn it anew at each point, and what it cannot learn it explains by
dents; a network of reflected directions learns it once, and tells the normals where to point.

Source: Verbin et al., "Ref-NeRF: Structured View-Dependent Appearance for Neural Radiance Fields", CVPR 2022
(sections 3.1 to 3.3), on the surface's own normals instead of predicted ones, as in NeRO (Liu et al. 2023).
Light here is distant: what a surface mirrors of the scene itself, only the bottleneck below can tell.
Pitfall: where nearly all that is mirrored is black, the specular part can fade to zero in the first steps and
stay there, as nothing then tells it from the diffuse one.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import encode_spherical_harmonics
from models.backends import Backends
from models.fields import RadianceConfig, make_network

_BOTTLENECK = 9
"""Material features that the specular network sees: with colours, tint and roughness 16 outputs, which is as
many as the CUDA kernel of small networks has."""


def reflect(toward: Float[Tensor, "S 3"], normal: Float[Tensor, "S 3"]) -> Float[Tensor, "S 3"]:
    """Mirror unit vectors at unit normals: 2 (n . v) n - v (Ref-NeRF, equation 4).

    (0, 0.6, 0.8) at (0, 0, 1) becomes (0, -0.6, 0.8); the side that the normal points to does not matter.
    """
    return 2.0 * (toward * normal).sum(dim=1, keepdim=True) * normal - toward


def encode_reflection(
    directions: Float[Tensor, "S 3"], roughness: Float[Tensor, "S 1"], degree: int
) -> Float[Tensor, "S D"]:
    """Spherical harmonics averaged over a lobe around each direction (Ref-NeRF, equation 8).

    A von Mises-Fisher lobe of concentration 1 / roughness leaves of band l about the share
    exp(-l (l + 1) roughness / 2): a rough surface sees its surroundings without their details.

    Args:
        directions: unit vectors.
        roughness: at least 0; 0 is a mirror.
        degree: bands, 1..5.

    Returns:
        ``(S, degree**2)``.
    """
    harmonics = encode_spherical_harmonics(directions, degree)
    bands = [
        torch.exp(-0.5 * band * (band + 1) * roughness).expand(-1, 2 * band + 1) for band in range(degree)
    ]
    return harmonics * torch.cat(bands, dim=1)


def srgb_from_light(light: Float[Tensor, "S 3"]) -> Float[Tensor, "S 3"]:
    """sRGB 0..1 of linear light (IEC 61966-2-1); light beyond 1 is white, as in a photograph.

    Its gradient goes on beyond 1 as it is at 1, because an overexposed sample could never become darker
    otherwise.
    """
    clipped = light + (light.clamp(max=1.0) - light).detach()
    # The root's slope is infinite at zero, and NaN would come out even of the branch not taken.
    bright = 1.055 * clipped.clamp(min=0.0031308).pow(1.0 / 2.4) - 0.055
    return torch.where(clipped <= 0.0031308, 12.92 * clipped, bright)


class ReflectiveRadiance(nn.Module):
    """Colour leaving a surface point: sRGB(diffuse + tint * specular) (Ref-NeRF, section 3.3).

    With ``appearance_width`` above 0 the material, and by its bottleneck the reflections, see the image's
    vector of that size.
    """

    def __init__(
        self, config: RadianceConfig, feature_width: int, backends: Backends, appearance_width: int = 0
    ) -> None:
        super().__init__()
        self.direction_degree = config.direction_degree
        hidden = [config.hidden_width] * config.hidden_layers
        self.material = make_network(
            [feature_width + appearance_width + 3, *hidden, 7 + _BOTTLENECK],
            *(backends.network, config.precision),
        )
        inputs = config.direction_degree**2 + 1 + _BOTTLENECK
        self.specular = make_network([inputs, *hidden, 3], backends.network, config.precision)

    def forward(
        self,
        features: Float[Tensor, "S C"],
        directions: Float[Tensor, "R 3"],
        ray_indices: Int64[Tensor, " S"],
        normal: Float[Tensor, "S 3"],
        count: Int64[Tensor, ""] | None = None,
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "S 3"]:
        """RGB in (0, 1]; arguments as those of :meth:`models.fields.RadianceField.forward`."""
        toward = -directions.index_select(0, ray_indices)
        if appearance is not None:
            features = torch.cat([features, appearance.index_select(0, ray_indices)], dim=1)
        material = self.material(torch.cat([features, normal], dim=1), count)
        diffuse, tint, roughness, bottleneck = material.split([3, 3, 1, _BOTTLENECK], dim=1)
        # Offsets of Ref-NeRF: at first either part gives a quarter of full light,
        # and the roughness is 0.3: half polished.
        roughness = torch.nn.functional.softplus(roughness - 1.0)
        encoded = encode_reflection(reflect(toward, normal), roughness, self.direction_degree)
        cosine = (toward * normal).sum(dim=1, keepdim=True)
        specular = self.specular(torch.cat([encoded, cosine, bottleneck], dim=1), count)
        light = torch.sigmoid(diffuse - math.log(3.0)) + torch.sigmoid(tint) * torch.sigmoid(specular)
        return srgb_from_light(light)
