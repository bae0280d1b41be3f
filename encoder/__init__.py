"""Encodings of positions and directions: frequency, spherical harmonics, multiresolution hash grid."""

from encoder.frequency import encode_frequency, frequency_width
from encoder.hashgrid import HashGrid, HashGridConfig
from encoder.spherical import encode_spherical_harmonics

__all__ = ["HashGrid", "HashGridConfig", "encode_frequency", "encode_spherical_harmonics", "frequency_width"]
