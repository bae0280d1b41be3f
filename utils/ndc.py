r"""Normalised device coordinates: unbounded forward-facing scenes in a bounded field.

A reference camera looks along +z from its centre. The half space in front of it, beyond z = near, is warped
by a projective map so that the frustum from ``near`` to infinity becomes a cube inside the unit sphere::

        metric (reference camera's axes)                     field
              ________ ...  z -> infinity                 ________  z = +1/sqrt(3): infinity
              \      /                                    |        |
               \    /          ------------>              |        |  cube of half width 1/sqrt(3)
                \__/   z = near                           |________|
                 v      centre                                       z = -1/sqrt(3): near

    field = (x / (z tan_x),  y / (z tan_y),  1 - 2 near / z) / sqrt(3)

Lines stay lines, so rays can be marched in the field as anywhere else; depth in the field is linear in 1/z,
which is how parallax falls off. Distances and angles are *not* kept: a surface found in the field must go
back through :meth:`NDC.to_metric` before it is measured, and its normals have to be taken there.

Source: Mildenhall et al., NeRF, ECCV 2020, appendix C, with OpenCV's axes (z forward) for OpenGL's and scaled
from the cube [-1, 1]^3 to one inside the unit sphere.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from utils.errors import ConfigError

_SQRT3 = math.sqrt(3.0)
_GRAZING = 1e-6
"""Least z of a forward unit direction; least 1 - z sqrt(3) of a field point this side of infinity."""


@dataclass(frozen=True)
class NDC:
    """A projective warp between a metric frame and the field's unit sphere."""

    c2w: Float64[Tensor, "3 4"]
    """Pose of the reference camera in the metric frame, OpenCV axes."""
    tan_x: float
    """Half width of the frustum at z = 1."""
    tan_y: float
    """Half height of the frustum at z = 1."""
    near: float
    """z of the near plane in the reference camera's axes, > 0, metric units."""

    def __post_init__(self) -> None:
        assert self.c2w.shape == (3, 4), self.c2w.shape
        if not (self.tan_x > 0 and self.tan_y > 0 and self.near > 0):
            raise ValueError(
                f"tan_x, tan_y and near must be above 0: {self.tan_x}, {self.tan_y}, {self.near}"
            )

    def to(self, device: torch.device | str) -> "NDC":
        """The same warp on another device."""
        return NDC(self.c2w.to(device), self.tan_x, self.tan_y, self.near)

    def to_field(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """Warp metric points. Those beside or behind the reference camera land far outside the sphere."""
        return self._warp(self._to_reference(points))

    def to_metric(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """Undo :meth:`to_field`. Points at and beyond infinity are brought to a million near distances."""
        pose = self.c2w.to(points)
        z = 2.0 * self.near / (1.0 - _SQRT3 * points[:, 2:]).clamp(min=_GRAZING)
        tangents = points.new_tensor([self.tan_x, self.tan_y])
        in_camera = torch.cat([_SQRT3 * points[:, :2] * tangents * z, z], dim=1)
        return in_camera @ pose[:, :3].t() + pose[:, 3]

    def warp_rays(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
        """Warp rays; every point of a ray beyond the near plane lies on the warped ray, in the same order.

        Args:
            origins: metric ray origins.
            directions: metric directions of any length.

        Returns:
            Where the rays cross z = near, or their own origins if these lie beyond, as field points; and unit
            directions in the field. Rays that do not run forward (dz <= 0) become rays that miss the unit
            sphere.
        """
        origin, direction = self._to_reference(origins), directions @ self.c2w.to(directions)[:, :3]
        length = direction.norm(dim=1, keepdim=True)
        is_forward = direction[:, 2:] > _GRAZING * length
        # Rays that miss take part with a harmless direction, so that their gradients are zero and not NaN.
        # Made on the device: a copy from the host could not be recorded with a step.
        ahead = torch.zeros_like(direction[:1])
        ahead[:, 2] = 1.0
        direction = torch.where(is_forward, direction / length.clamp(min=1e-30), ahead)
        slopes = direction / direction[:, 2:]
        origin = origin + (self.near - origin[:, 2:]).clamp(min=0.0) * slopes
        start = self._warp(origin)
        # Difference to the ray's point at infinity, whose field coordinates are (slope_x / tan_x,
        # slope_y / tan_y, 1) / sqrt(3). Written over z: subtracting the two would lose the far rays' digits.
        z = origin[:, 2:]
        offset = torch.cat(
            [
                (slopes[:, :1] - origin[:, :1] / z) / self.tan_x,
                (slopes[:, 1:2] - origin[:, 1:2] / z) / self.tan_y,
                2.0 * self.near / z,
            ],
            dim=1,
        )
        unit = offset / offset.norm(dim=1, keepdim=True)
        return torch.where(is_forward, start, 2.0 * ahead), torch.where(is_forward, unit, ahead)

    def distance_to_infinity(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"]
    ) -> Float[Tensor, " R"]:
        """How far along warped rays infinity lies: there is nothing behind it, though the sphere goes on."""
        return (1.0 / _SQRT3 - origins[:, 2]) / directions[:, 2]

    def _to_reference(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        pose = self.c2w.to(points)
        return (points - pose[:, 3]) @ pose[:, :3]

    def _warp(self, in_camera: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        z = in_camera[:, 2:].clamp(min=_GRAZING * self.near)
        x, y = in_camera[:, :1] / (z * self.tan_x), in_camera[:, 1:2] / (z * self.tan_y)
        return torch.cat([x, y, 1.0 - 2.0 * self.near / z], dim=1) / _SQRT3


def average_pose(c2w: Float[Tensor, "N 3 4"]) -> Float64[Tensor, "3 4"]:
    """Average cameras: mean centre, mean viewing direction, and the mean of "down" made square to it.

    Raises:
        ConfigError: the cameras' directions cancel out, as around an object.
    """
    mean = c2w.double().mean(dim=0)
    down, forward = mean[:, 1], mean[:, 2]
    right = torch.linalg.cross(down, forward)
    if min(float(forward.norm()), float(right.norm())) < 0.1:
        raise _not_forward_facing("have no common viewing direction")
    forward = forward / forward.norm()
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(forward, right), forward, mean[:, 3]], dim=1)


def frame_of(
    c2w: Float[Tensor, "N 3 4"],
    intrinsics: Float[Tensor, "N 3 3"],
    size: Int64[Tensor, "N 2"],
    near: float,
) -> NDC:
    """Find the warp around the average camera whose frustum takes in what all cameras see.

    Args:
        c2w: poses in the metric frame, OpenCV axes.
        intrinsics: K in pixels (centres at +0.5) of pinholes.
        size: (width, height) of the pictures.
        near: z of the near plane from the average camera's centre, metric units, > 0.

    Raises:
        ConfigError: a camera sees something beside or behind the average camera: the capture does not face
            forward.
    """
    pose = average_pose(c2w)
    inverse = torch.linalg.inv(intrinsics.double())
    corners = inverse.new_tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    pixels = corners * torch.cat([size, torch.ones_like(size[:, :1])], dim=1)[:, None]
    directions = pixels @ inverse.mT @ c2w.double()[:, :, :3].mT @ pose[:, :3]
    slopes = directions[..., :2] / directions[..., 2:]
    steepest = float(torch.atan(slopes.abs().amax()))
    if float(directions[..., 2].min()) <= 0 or steepest > math.radians(85):
        raise _not_forward_facing("see more than the half space before their average")
    centers = ((c2w.double()[:, :, 3] - pose[:, 3]) @ pose[:, :3])[:, None]
    # x / z is monotonic along a ray from its start (on the near plane, or at a camera beyond) to infinity.
    starts = centers + (near - centers[..., 2:]).clamp(min=0.0) * directions / directions[..., 2:]
    reach = torch.cat([slopes, starts[..., :2] / starts[..., 2:]], dim=1).abs().amax(dim=(0, 1))
    return NDC(pose, float(reach[0]), float(reach[1]), near)


def _not_forward_facing(what: str) -> ConfigError:
    remedy = "set dataset.ndc=false: it is for forward-facing captures"
    return ConfigError("dataset.ndc", f"the cameras {what}", remedy)
