"""Systems: training, its losses and schedules, checkpoints, records, evaluation and export."""

from typing import Any

from systems.neus import NeuSSystem, NeuSSystemConfig
from systems.radiance import RadianceSystem, RadianceSystemConfig

SYSTEMS: dict[str, tuple[type, Any]] = {
    "neus": (NeuSSystemConfig, NeuSSystem),
    "nerf-ngp": (RadianceSystemConfig, RadianceSystem),
    "nerf-proposal": (RadianceSystemConfig, RadianceSystem),
    "mipnerf360": (RadianceSystemConfig, RadianceSystem),
    "nerf": (RadianceSystemConfig, RadianceSystem),
}
"""Training rules by ``system.name``: configuration and class."""
