"""Encodings of positions and directions: frequency (also integrated), spherical harmonics, hash grid."""

from encoder.frequency import encode_frequency, frequency_width
from encoder.hashgrid import HashGrid, HashGridConfig
from encoder.integrated import encode_integrated, icosahedron_directions, integrated_width
from encoder.spherical import encode_spherical_harmonics

__all__ = [
    "HashGrid",
    "HashGridConfig",
    "encode_frequency",
    "encode_integrated",
    "encode_spherical_harmonics",
    "frequency_width",
    "icosahedron_directions",
    "integrated_width",
]
