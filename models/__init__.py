"""Models: the fields, samplers and renderers, and the methods that join them."""

import functools
import logging

import torch

from encoder import hashgrid
from models import compositing, marching, sdf_network
from models.neus import NeuS, NeuSConfig
from utils.backend import resolve_backend
from utils.types import Scene

MODELS = {"neus": (NeuSConfig, NeuS)}
"""Methods by ``model.name``: configuration and class."""

Model = NeuS
"""Any method's model, for those who do not care which."""

_OPERATIONS = {
    "hash grid": hashgrid,
    "sdf network": sdf_network,
    "ray marching": marching,
    "compositing": compositing,
}


def build_model(config: NeuSConfig, scene: Scene, device: torch.device) -> Model:
    """Build the model that ``config`` describes for a scene, on a device, and log which kernels it will use.

    Raises:
        BackendError: when the backend asked for cannot run on this device.
    """
    chosen = {}
    for operation, module in _OPERATIONS.items():
        checks = {name: functools.partial(check, device) for name, check in module.IMPLEMENTATIONS.items()}
        chosen[operation], reason = resolve_backend(operation, config.backend, checks, device)
        logging.getLogger(__name__).info("%s: backend %s (%s)", operation, chosen[operation], reason)
    _, model_class = MODELS[config.name]
    return model_class(config, scene, chosen["sdf network"]).to(device)
