"""Patches: squares of adjacent pixels, for losses that compare structure and not single pixels.

A patch is drawn by its top-left pixel, its corner. Every place of a patch in every training picture is
equally likely: one flat index runs over the corners of all pictures, as one runs over all pixels in
``process_data/batches.py``. Pixels near a picture's border are therefore in fewer patches than others.
"""

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from utils.errors import ConfigError
from utils.types import Scene


class PatchSampler:
    """Draws patches from some views of a scene.

    Args:
        scene: the capture.
        views: the views to draw from.
        starts: of each view, the position of its first pixel among the pixels of all ``views``.
        patch_size: pixels along a side, at least 1.
        num_patches: patches in a draw.
        device: where they are drawn.
        key: config key of the size, for the error.

    Raises:
        ConfigError: one of the pictures is smaller than a patch.
    """

    def __init__(
        self,
        scene: Scene,
        views: Int64[Tensor, " N"],
        starts: Int64[Tensor, " N"],
        *,
        patch_size: int,
        num_patches: int,
        device: torch.device,
        key: str,
    ) -> None:
        check_patch_size(scene, views, patch_size, key)
        size = scene.images.size[views]
        self.patch_size, self.num_patches = patch_size, num_patches
        self._device = device
        self._starts, self._widths = starts.to(device), size[:, 0].to(device)
        self._pixel_ends = (starts + size.prod(dim=1)).to(device)
        # Columns and rows that a corner can lie in.
        spare = size - patch_size + 1
        ends = spare.prod(dim=1).cumsum(0)
        self._num_corners = int(ends[-1])
        self._corner_ends = ends.to(device)
        self._corner_starts = (ends - spare.prod(dim=1)).to(device)
        self._spare = spare.to(device)

    @property
    def num_rays(self) -> int:
        """Pixels in all patches of a draw."""
        return self.num_patches * self.patch_size**2

    def draw(
        self,
        generator: torch.Generator,
        foreground: Int32[Tensor, " K"] | Int64[Tensor, " K"] | None = None,
        fraction: float = 0.0,
    ) -> Int64[Tensor, " num_rays"]:
        """Draw the positions of patches' pixels, patch by patch and row by row.

        Args:
            generator: on the sampler's device.
            foreground: positions of foreground pixels, if patches are to be drawn around these.
            fraction: the chance, 0..1, that a patch is.
        """
        slot, corner = self._anywhere(generator)
        if foreground is not None:
            near_slot, near_corner = self._around(foreground, generator)
            # By chance, and not in turn as single rays are: there may be only one patch.
            is_near = torch.rand(self.num_patches, generator=generator, device=self._device) < fraction
            slot = torch.where(is_near, near_slot, slot)
            corner = torch.where(is_near[:, None], near_corner, corner)
        width = self._widths[slot]
        first = self._starts[slot] + corner[:, 1] * width + corner[:, 0]
        ticks = torch.arange(self.patch_size, device=self._device)
        below = ticks[None, :, None] * width[:, None, None]
        return (first[:, None, None] + below + ticks).flatten()

    def _anywhere(self, generator: torch.Generator) -> tuple[Int64[Tensor, " P"], Int64[Tensor, "P 2"]]:
        """Patches with a corner anywhere: views, as indices into ``views``, and (column, row)."""
        drawn = self._integers(self._num_corners, generator)
        slot = torch.searchsorted(self._corner_ends, drawn, right=True)
        local, columns = drawn - self._corner_starts[slot], self._spare[slot, 0]
        return slot, torch.stack([local % columns, local // columns], dim=1)

    def _around(
        self, foreground: Int32[Tensor, " K"] | Int64[Tensor, " K"], generator: torch.Generator
    ) -> tuple[Int64[Tensor, " P"], Int64[Tensor, "P 2"]]:
        """Patches with a foreground pixel in the middle, or as near to it as the picture's borders allow."""
        position = foreground[self._integers(len(foreground), generator)].long()
        slot = torch.searchsorted(self._pixel_ends, position, right=True)
        local, width = position - self._starts[slot], self._widths[slot]
        corner = torch.stack([local % width, local // width], dim=1) - self.patch_size // 2
        return slot, torch.minimum(corner.clamp(min=0), self._spare[slot] - 1)

    def _integers(self, end: int, generator: torch.Generator) -> Int64[Tensor, " P"]:
        return torch.randint(end, (self.num_patches,), generator=generator, device=self._device)


def check_patch_size(scene: Scene, views: Int64[Tensor, " N"], patch_size: int, key: str) -> None:
    """Make sure that patches fit into all of some pictures.

    Raises:
        ConfigError: into one they do not; it names ``key``, the config key of their size.
    """
    size = scene.images.size[views]
    smallest = int(size.amin(dim=1).argmin())
    if int(size[smallest].min()) < patch_size:
        name, (width, height) = scene.image_names[int(views[smallest])], size[smallest].tolist()
        what = f"picture {name} has {width} x {height} pixels, less than a patch of {patch_size}"
        raise ConfigError(key, what, f"set it to at most {min(width, height)}")
