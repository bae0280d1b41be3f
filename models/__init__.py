"""Models: the fields, samplers and renderers, and the methods that join them."""

import torch

from models.backends import choose_backends
from models.neus import NeuS, NeuSConfig
from utils.types import Scene

MODELS = {"neus": (NeuSConfig, NeuS)}
"""Methods by ``model.name``: configuration and class."""

Model = NeuS
"""Any method's model, for those who do not care which."""


def build_model(config: NeuSConfig, scene: Scene, device: torch.device) -> Model:
    """Build the model that ``config`` describes for a scene, on a device, and log which kernels it will use.

    Raises:
        BackendError: when the backend asked for cannot run on this device.
    """
    _, model_class = MODELS[config.name]
    return model_class(config, scene, choose_backends(config.backend, device)).to(device)
