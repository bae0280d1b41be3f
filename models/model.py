"""What the trainer and everything that looks at a model ask of it."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backends import Backends
from utils.types import Budget, Progress, Rays, RenderOutput


@runtime_checkable
class SurfaceModel(Protocol):
    """What a mesh is made from: queries without gradients, in scene space, at one moment of training."""

    @property
    def device(self) -> torch.device:
        """Where it wants its positions."""

    def query_sdf(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Signed distance, positive outside."""

    def query_gradient(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """Its gradient."""

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour (sRGB, 0..1) seen along unit view directions."""


class Model(nn.Module, ABC):
    """A method: renders rays, and knows its own sampling and its parameters' groups."""

    is_opaque: bool = False
    """Whether every ray ends in the field, so that opacities say nothing."""
    reach: float = 1.0
    """Half a side of the largest cube around the origin in which it has a surface, scene units."""

    def __init__(self, backends: Backends) -> None:
        super().__init__()
        self.backends = backends

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where rays and positions have to live."""

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Levels of the hash grid; 0 where there is none."""

    @property
    def num_proposals(self) -> int:
        """Proposals that place its samples and want the loss term ``interlevel``."""
        return 0

    @property
    def has_coarse_network(self) -> bool:
        """Whether a coarse network sees the photographs, too, and wants the loss term ``rgb_coarse``."""
        return False

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their learning rate's key in ``trainer.optimizer``."""

    def scalars(self, progress: Progress) -> dict[str, float]:
        """Numbers of its own for the history."""
        del progress
        return {}

    @abstractmethod
    def render(
        self,
        rays: Rays,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None = None,
        budget: Budget | None = None,
    ) -> RenderOutput:
        """Rays in, pixels out.

        Args:
            rays: in scene space.
            progress: annealing and open levels.
            background_color: behind what is opaque, where no background field is learned, 0..1.
            generator: jitters the samples (training); ``None`` puts them on the unshifted lattice.
            budget: buffers of fixed size instead of such as fit, for a step that never asks the device how
                many samples there are; not every ray is rendered then, see :attr:`RenderOutput.is_served`.
        """

    @abstractmethod
    def frozen_at(self, progress: Progress, extent: float = 1.0) -> SurfaceModel:
        """The surface as it is at this progress, ready to be asked.

        Args:
            progress: of a checkpoint.
            extent: half a side of the cube that it will be asked about, scene units, at most :attr:`reach`.
        """

    def stage(self, progress: Progress) -> Hashable:
        """What in :meth:`render` branches on the progress: a recorded step serves one stage."""
        return None

    def update_occupancy(self, progress: Progress, generator: torch.Generator) -> None:
        """Look again at where samples are worth it; called every ``trainer.occupancy_every`` steps."""

    def query_field(
        self, positions: Float[Tensor, "P 3"], progress: Progress
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, "P 3"]]:
        """Signed distance and gradient, differentiable in the parameters: for losses off the rays."""
        raise NotImplementedError(f"{type(self).__name__} has no signed distance")
