"""Loss terms on patches of adjacent pixels: pure functions from pictures to one unweighted scalar each.

A mean of differences of single pixels is content with the right colours on average; these terms ask for the
right structure: edges and textures where the photographs show them. A patch that is not kept has no part in
the mean nor in the gradient, whatever it holds, and without patches the result is a zero with a gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from utils.errors import ConfigError
from utils.metrics import lpips_distances, lpips_missing, ssim_map

MAX_WINDOW = 11
"""Side of SSIM's window (Wang et al. 2004) where the patch has room for it."""
MIN_LPIPS_SIZE = 32
"""Least side of a patch that leaves AlexNet's last layers something to see."""

Keep = Bool[Tensor, " P"] | None
"""Patches that count; ``None``: all."""


def patch_ssim(
    rgb: Float[Tensor, "P K K 3"], target: Float[Tensor, "P K K 3"], keep: Keep = None
) -> Float[Tensor, ""]:
    """1 - mean structural similarity, 0 (equal) to 2.

    The Gaussian window has the largest odd side up to 11 that fits into a patch.

    Source: Wang et al. 2004, equation 13; as a loss: Zhao et al. 2017, "Loss functions for image restoration
        with neural networks".
    """
    window = min(MAX_WINDOW, (rgb.shape[1] - 1) // 2 * 2 + 1)
    distance = 1.0 - ssim_map(_kept(rgb, target, keep), target, window).mean(dim=(1, 2))
    return _mean(distance, keep).to(rgb.dtype)


def patch_lpips(
    rgb: Float[Tensor, "P K K 3"], target: Float[Tensor, "P K K 3"], keep: Keep = None
) -> Float[Tensor, ""]:
    """Mean LPIPS (AlexNet), 0 = equal; K >= 32, see :func:`check_lpips`.

    Source: Zhang et al. 2018; as a loss on patches of 32 pixels: HumanNeRF (Weng et al. 2022).
    """
    return _mean(lpips_distances(_kept(rgb, target, keep), target), keep).to(rgb.dtype)


def check_lpips(key: str, size_key: str, patch_size: int) -> None:
    """Make sure that :func:`patch_lpips` can be computed.

    Raises:
        ConfigError: at ``key``, the package or weights are missing; at ``size_key``, patches are too small.
    """
    reason = lpips_missing()
    if reason is not None:
        raise ConfigError(key, reason, f"add it, or set {key}=0")
    if patch_size < MIN_LPIPS_SIZE:
        what = f"{key} needs patches of at least {MIN_LPIPS_SIZE} pixels, got {patch_size}"
        raise ConfigError(size_key, what, f"set it to {MIN_LPIPS_SIZE}, or {key}=0")


def _kept(rgb: Tensor, target: Tensor, keep: Keep) -> Tensor:
    # Equal pictures have no distance, and no gradient comes back through what was not taken.
    return rgb if keep is None else torch.where(keep[:, None, None, None], rgb, target)


def _mean(distance: Tensor, keep: Keep) -> Tensor:
    # Patches that are not kept are at distance 0.
    return distance.sum() / (max(len(distance), 1) if keep is None else keep.sum().clamp(min=1))
