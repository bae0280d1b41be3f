"""Captures in, one :class:`~utils.types.Scene` out.

A new capture format is one file with a frozen config and a loader, and one line in ``DATASETS``.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from process_data.formats.blender import BlenderConfig, load_blender
from process_data.formats.colmap import ColmapConfig, load_colmap
from process_data.formats.dtu import DTUConfig, load_dtu
from process_data.formats.llff import LLFFConfig, load_llff
from process_data.formats.transforms import TransformsConfig, load_transforms
from process_data.synthetic import SyntheticConfig, load_synthetic
from utils.errors import ConfigError
from utils.types import Scene

DATASETS: dict[str, tuple[type[Any], Callable[[Any], Scene]]] = {
    "blender": (BlenderConfig, load_blender),
    "colmap": (ColmapConfig, load_colmap),
    "dtu": (DTUConfig, load_dtu),
    "llff": (LLFFConfig, load_llff),
    "synthetic": (SyntheticConfig, load_synthetic),
    "transforms": (TransformsConfig, load_transforms),
}
"""By ``dataset.name``: the config class of a format and its loader."""


def load_scene(config: Any) -> Scene:
    """Load the capture that a dataset config describes.

    Raises:
        ConfigError: ``dataset.name`` is not a known format, or another key does not fit the capture.
        DataError: the capture is missing, unreadable or inconsistent.
    """
    if config.name not in DATASETS:
        nearest = get_close_matches(config.name, DATASETS, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"known formats: {', '.join(DATASETS)}"
        raise ConfigError("dataset.name", f"{config.name!r} is not a known format", remedy)
    return DATASETS[config.name][1](config)
