"""A capture, loaded: cameras, pictures, points and surface; frames and letters as in ``utils/types.py``."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float16, Float32, Float64, Int64, UInt8
from torch import Tensor

from utils.ndc import NDC


@dataclass(frozen=True)
class Lens:
    """How one camera maps directions to pixels: one of COLMAP's camera models with its parameters."""

    model: str
    """COLMAP's name of the model: PINHOLE, SIMPLE_RADIAL, OPENCV, OPENCV_FISHEYE, ..."""
    params: tuple[float, ...]
    """In COLMAP's order, for pixels of a picture of ``size`` (centres at +0.5)."""
    size: tuple[int, int]
    """(width, height) that the parameters are for. Pictures of another size are scaled to it."""


@dataclass(frozen=True)
class Cameras:
    """N cameras in scene space: pinholes, or with a lens each that bends their rays."""

    c2w: Float32[Tensor, "N 3 4"]
    """Camera-to-scene poses ``[R | t]``, OpenCV axes, det R = +1."""
    intrinsics: Float32[Tensor, "N 3 3"]
    """``[[fx, skew, cx], [0, fy, cy], [0, 0, 1]]`` in pixels, for the pixel convention above. With a lens
    it is the pinhole part: good for choosing sizes, not for casting rays."""
    size: Int64[Tensor, "N 2"]
    """(width, height) of each image in pixels."""
    lenses: tuple[Lens, ...] = ()
    """One per camera where any of them distorts; empty: all are the pinholes that ``intrinsics`` say."""
    ndc: NDC | None = None
    """Where a forward-facing scene is trained in a warped space: what rays and positions in it go through.
    Poses stay metric."""

    def __post_init__(self) -> None:
        n = self.c2w.shape[0]
        assert self.c2w.shape == (n, 3, 4), self.c2w.shape
        assert self.intrinsics.shape == (n, 3, 3), self.intrinsics.shape
        assert self.size.shape == (n, 2), self.size.shape
        assert len(self.lenses) in (0, n), len(self.lenses)

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, chosen: slice) -> "Cameras":
        return Cameras(
            self.c2w[chosen], self.intrinsics[chosen], self.size[chosen], self.lenses[chosen], self.ndc
        )


@dataclass(frozen=True)
class ImageStack:
    """N images of any sizes in one flat buffer, so that a pixel of any image is one index away."""

    pixels: UInt8[Tensor, "total C"] | Float16[Tensor, "total C"]
    """All images, row by row, one after another: 0..255, or half-precision depths or normals."""
    size: Int64[Tensor, "N 2"]
    """(width, height) of each image."""
    offsets: Int64[Tensor, " N"]
    """Index in ``pixels`` of each image's first pixel."""

    def __post_init__(self) -> None:
        assert self.pixels.dim() == 2 and self.size.shape == (len(self.offsets), 2)
        assert int(self.size.prod(dim=1).sum()) == len(self.pixels)

    def __len__(self) -> int:
        return self.offsets.shape[0]

    def image(self, index: int) -> UInt8[Tensor, "H W C"] | Float16[Tensor, "H W C"]:
        """One image, a view into the buffer."""
        width, height = self.size[index].tolist()
        start = int(self.offsets[index])
        return self.pixels[start : start + width * height].view(height, width, -1)

    @classmethod
    def from_images(cls, images: list[npt.NDArray[np.uint8]]) -> "ImageStack":
        """Stack ``(H, W, C)`` arrays of one C into one buffer, releasing each as it is copied."""
        size = torch.tensor([[image.shape[1], image.shape[0]] for image in images], dtype=torch.int64)
        counts = size.prod(dim=1)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
        pixels = torch.empty(int(counts.sum()), images[0].shape[2], dtype=torch.uint8)
        for start, count in zip(offsets.tolist(), counts.tolist(), strict=True):
            pixels[start : start + count] = torch.from_numpy(images.pop(0)).reshape(count, -1)
        return cls(pixels, size, offsets)


@dataclass(frozen=True)
class TriangleMesh:
    """A triangle mesh with optional per-vertex attributes."""

    vertices: npt.NDArray[np.float64]
    """``(V, 3)`` positions; the frame is said by whoever passes it on."""
    faces: npt.NDArray[np.int64]
    """``(F, 3)`` vertex indices, counter-clockwise seen from outside."""
    normals: npt.NDArray[np.float32] | None = None
    """``(V, 3)`` unit outward normals."""
    colors: npt.NDArray[np.uint8] | None = None
    """``(V, 3)`` sRGB, 0..255."""
    views: npt.NDArray[np.int64] | None = None
    """``(V,)`` how many training views show a vertex."""

    def __post_init__(self) -> None:
        assert self.vertices.ndim == 2 and self.vertices.shape[1] == 3, self.vertices.shape
        assert self.faces.ndim == 2 and self.faces.shape[1] == 3, self.faces.shape
        assert self.normals is None or self.normals.shape == self.vertices.shape
        assert self.colors is None or self.colors.shape == self.vertices.shape
        assert self.views is None or self.views.shape == self.vertices.shape[:1]


@dataclass(frozen=True)
class SparsePoints:
    """P points that structure from motion triangulated, and the views that saw them."""

    positions: npt.NDArray[np.float64]
    """``(P, 3)``; the frame is said by whoever passes them on."""
    colors: npt.NDArray[np.uint8]
    """``(P, 3)`` sRGB, 0..255."""
    errors: npt.NDArray[np.float64]
    """``(P,)`` mean reprojection error in pixels of the full-size pictures; NaN where it is not known."""
    observations: npt.NDArray[np.int64]
    """``(O, 2)`` pairs (point, view), ordered by point."""

    def __post_init__(self) -> None:
        p = len(self.positions)
        assert self.positions.shape == (p, 3) and self.colors.shape == (p, 3) and self.errors.shape == (p,)
        assert self.observations.ndim == 2 and self.observations.shape[1] == 2

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Scene:
    """A capture, loaded: what every loader in ``process_data`` returns and all that training needs."""

    name: str
    """Short name for tables, e.g. the last part of ``root_dir``."""
    cameras: Cameras
    images: ImageStack
    """RGB (C = 3), sRGB-encoded as stored in the files."""
    image_names: tuple[str, ...]
    """One per image, as in the capture, for reports."""
    train_indices: tuple[int, ...]
    """Views to train on. Disjoint from ``test_indices``."""
    test_indices: tuple[int, ...]
    """Held-out views for metrics; may be empty."""
    world_from_scene: Float64[Tensor, "4 4"]
    """Similarity from scene to world: rotation times one positive scale, and a translation."""
    masks: ImageStack | None = None
    """Foreground masks (C = 1, 255 = foreground), sized as ``images``; ``None``: absent or not asked for."""
    background_color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Plain colour (0..1) behind masked objects, in the pictures that are compared and shown."""
    reference_mesh: TriangleMesh | None = None
    """Ground-truth surface in *world* coordinates, where it is known (synthetic scenes)."""
    points: SparsePoints | None = None
    """Structure-from-motion points in scene space, where the capture has them."""
    depths: ImageStack | None = None
    """Depth along the optical axis (C = 1), sized as ``images``, where the capture has it; as stored
    (monocular depth has no unit)."""
    normals: ImageStack | None = None
    """Unit normals (C = 3) in the camera's axes, sized as ``images``, where the capture has them."""

    def __post_init__(self) -> None:
        n = len(self.cameras)
        assert len(self.images) == n and len(self.image_names) == n, (
            n,
            len(self.images),
            len(self.image_names),
        )
        for stack in (self.masks, self.depths, self.normals):
            assert stack is None or torch.equal(stack.size, self.images.size)
        assert torch.equal(self.cameras.size, self.images.size)
        assert not set(self.train_indices) & set(self.test_indices)
        assert self.world_from_scene.shape == (4, 4)

    @property
    def world_scale(self) -> float:
        """World units per scene unit: the radius in the world of what is reconstructed."""
        return float(torch.linalg.det(self.world_from_scene[:3, :3])) ** (1 / 3)

    def metric(self) -> "Scene":
        """The same scene without a warped space, for whoever looks at the world and not at the field."""
        return self if self.cameras.ndc is None else replace(self, cameras=replace(self.cameras, ndc=None))
