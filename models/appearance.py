"""What differs between photographs of one scene: light and processing, or the camera's exposure.

Photographs taken under changing light, or by a camera that sets its exposure anew each time, contradict one
another: the same point has several colours, which a model of one scene explains by colours that depend on the
view direction, by fog, or by dents. Two remedies, each with a few numbers for every training image:

*embedding*   (NeRF in the Wild, Martin-Brualla et al. 2021, section 4.1, after Bojanowski et al. 2018)
              A learned vector l_i is appended to the inputs of the colour networks: c = c(x, d, l_i). It can
              explain shadows and lamps, as colours may change differently everywhere; geometry never does.
*exposure*    (Urban Radiance Fields, Rematas et al. 2022, section 4.3: an affine map of colours per image)
              C' = exp(g_i) C + b_i in sRGB, for each channel by itself: white balance and brightness, the
              same all over the picture. sRGB is near a power law, whose gains stay gains.

Views that were not trained on (held-out ones, the video) and colours of the mesh take the embeddings' mean,
and colours as they are: gains and offsets have their mean over the training images taken off, so that it is
the identity always. Held-out pictures in a light of their own are therefore not imitated, and metrics of
these can be worse than those of a model that guesses the light from the view direction.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.per_image import row_of_view, rows_of
from utils.types import Scene

_INITIAL_STD = 0.01
"""Of the embeddings: near zero, so that the images start out alike, yet not equal."""


@dataclass(frozen=True)
class AppearanceConfig:
    """What each training image may have for itself."""

    mode: Literal["none", "embedding", "exposure"] = "none"
    """Nothing; a learned vector that the colour networks see (changing light); or learned gains and offsets
    of the colour channels (changing exposure or white balance)."""
    width: int = 8
    """Numbers in the vector of an image, with ``embedding`` (1..64; NeRF in the Wild: 48 for the crowd's
    photographs)."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 64:
            raise ValueError(f"model.appearance.width: must lie in 1..64, got {self.width}")

    @property
    def inputs(self) -> int:
        """Inputs that the colour networks get beside their others."""
        return self.width if self.mode == "embedding" else 0


def per_image_modules(
    config: AppearanceConfig, scene: Scene
) -> tuple["ImageEmbedding | None", "Exposure | None"]:
    """What a model needs for the mode that is asked for."""
    return (
        ImageEmbedding(config.width, scene) if config.mode == "embedding" else None,
        Exposure(scene) if config.mode == "exposure" else None,
    )


def appearance_of(
    embedding: "ImageEmbedding | None", camera_indices: Int64[Tensor, " R"]
) -> Float[Tensor, "R A"] | None:
    """What colours depend on besides geometry and direction: learned, of the rays' images."""
    return None if embedding is None else embedding(camera_indices)


def mean_appearance(embedding: "ImageEmbedding | None", count: int) -> Float[Tensor, "P A"] | None:
    """The same of no particular image, ``count`` times."""
    return None if embedding is None else embedding.mean(count)


class ImageEmbedding(nn.Module):
    """A learned vector for each training image."""

    def __init__(self, width: int, scene: Scene) -> None:
        super().__init__()
        self.per_image = nn.Parameter(_INITIAL_STD * torch.randn(len(scene.train_indices), width))
        self.row_of_view: Tensor
        self.register_buffer("row_of_view", row_of_view(scene))

    def forward(self, camera_indices: Int64[Tensor, " R"]) -> Float[Tensor, "R A"]:
        """The vectors of the rays' images; the mean of all for views that were not trained on."""
        return rows_of(self.per_image, self.per_image.mean(dim=0), self.row_of_view, camera_indices)

    def mean(self, count: int) -> Float[Tensor, "P A"]:
        """The mean of all vectors, ``count`` times."""
        return self.per_image.mean(dim=0).expand(count, -1)


class Exposure(nn.Module):
    """Gains and offsets of the colour channels for each training image, the identity on average."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.per_image = nn.Parameter(torch.zeros(len(scene.train_indices), 6))
        """Logarithms of three gains, then three offsets, before their means are taken off."""
        self.row_of_view: Tensor
        self.register_buffer("row_of_view", row_of_view(scene))

    def forward(
        self,
        rgb: Float[Tensor, "R 3"],
        camera_indices: Int64[Tensor, " R"],
        opacity: Float[Tensor, " R"] | None = None,
    ) -> Float[Tensor, "R 3"]:
        """Colours as the rays' images would have recorded them: exp(g) rgb + b opacity.

        Args:
            rgb: sRGB; composited over black where an ``opacity`` is given, so that what is put behind it
                afterwards keeps its colour.
            camera_indices: the rays' views.
            opacity: 0..1; ``None`` is 1 everywhere.
        """
        centred = self.per_image - self.per_image.mean(dim=0)
        identity = torch.zeros_like(centred[0])
        rows = rows_of(centred, identity, self.row_of_view, camera_indices)
        log_gain, offset = rows.split(3, dim=1)
        if opacity is not None:
            offset = offset * opacity[:, None]
        return torch.exp(log_gain) * rgb + offset
