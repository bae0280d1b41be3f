"""Models: the fields, samplers and renderers, and the methods that join them."""

from typing import Any

import torch

from models.backends import choose_backends
from models.mipnerf360 import MipNeRF360, MipNeRF360Config
from models.model import Model
from models.nerf_ngp import NGP, NGPConfig
from models.nerf_proposal import ProposalNeRF, ProposalNeRFConfig
from models.neus import NeuS, NeuSConfig
from models.vanilla_nerf import VanillaNeRF, VanillaNeRFConfig
from utils.types import Scene

__all__ = ["MODELS", "Model", "build_model"]

MODELS: dict[str, tuple[type, Any]] = {
    "neus": (NeuSConfig, NeuS),
    "nerf-ngp": (NGPConfig, NGP),
    "nerf-proposal": (ProposalNeRFConfig, ProposalNeRF),
    "mipnerf360": (MipNeRF360Config, MipNeRF360),
    "nerf": (VanillaNeRFConfig, VanillaNeRF),
}
"""Methods by ``model.name``: configuration and class."""


def build_model(config: Any, scene: Scene, device: torch.device) -> Any:
    """Build the model that ``config`` describes for a scene, on a device, and log which kernels it will use.

    Raises:
        BackendError: when the backend asked for cannot run on this device.
    """
    _, model_class = MODELS[config.name]
    return model_class(config, scene, choose_backends(config.backend, device)).to(device)
