"""The seam for the Triton kernels: until they exist, CUDA devices use the plain PyTorch version."""

import torch


def available(device: torch.device) -> str | None:
    """``None`` when this version can run on ``device``, else the reason and the remedy."""
    if device.type != "cuda":
        return f"Triton kernels need a GPU, this run uses the {device.type}"
    return "the Triton kernels are not part of this version: use backend reference on CUDA"
