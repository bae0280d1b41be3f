"""Systems: training, its losses and schedules, checkpoints, records, evaluation and export."""

from systems.neus import NeuSSystem, NeuSSystemConfig

SYSTEMS = {"neus": (NeuSSystemConfig, NeuSSystem)}
"""Training rules by ``system.name``: configuration and class."""
