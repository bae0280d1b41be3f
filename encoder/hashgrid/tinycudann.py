"""The hash grid of tiny-cuda-nn (github.com/NVlabs/tiny-cuda-nn), where it is installed.

Its levels are laid out a little differently: N_l = ceil(N_min b^l - 1) + 1 vertices per axis that are shifted
by half a cell, and level sizes are rounded up to multiples of 8. A table is therefore good for the version
that trained it only. Positions in ``[-bound, bound]`` become ``[0, 1]``, which is what it takes.
"""

import functools
import importlib
import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoder.hashgrid.geometry import GridGeometry, HashGridConfig
from utils.errors import BackendError

_REMEDY = "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"


def available(device: torch.device) -> str | None:
    """``None`` when this version can run on ``device``, else the reason and the remedy."""
    if device.type != "cuda":
        return f"tiny-cuda-nn needs a GPU, this run uses the {device.type}"
    if importlib.util.find_spec("tinycudann") is None:
        return f"tiny-cuda-nn is not installed: {_REMEDY}; or use backend cuda"
    try:
        importlib.import_module("tinycudann")
    # Built for another GPU, PyTorch or CUDA it raises whatever it likes, not ImportError alone.
    except Exception as error:
        said = " ".join(str(error).split())
        return f"tiny-cuda-nn does not load ({type(error).__name__}: {said}): {_REMEDY}; or use backend cuda"
    return None


def num_table_entries(geometry: GridGeometry) -> int:
    """Rows of its table."""
    return _encoding(geometry.config)[1]


def encode(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
) -> Float[Tensor, "S W"]:
    """See the package's ``encode``."""
    module, _ = _encoding(geometry.config)
    scaled = positions / geometry.bound
    unit = ((scaled + 1.0) * 0.5).clamp(0.0, 1.0)
    levels = torch.func.functional_call(module, {"params": table.reshape(-1)}, (unit,))
    level_weights = geometry.level_weights_on(positions.device, active_levels)
    weighted = levels.float().reshape(len(positions), geometry.num_levels, -1) * level_weights[:, None]
    return torch.cat([scaled, weighted.flatten(1)], dim=1)


@functools.cache
def _encoding(config: HashGridConfig) -> tuple[nn.Module, int]:
    """Its module, emptied because each call brings a table of its own, and that table's number of rows."""
    settings = {
        "otype": "HashGrid",
        "n_levels": config.num_levels,
        "n_features_per_level": config.features_per_level,
        "log2_hashmap_size": config.log2_table_size,
        "base_resolution": config.base_resolution,
        "per_level_scale": config.growth,
        "interpolation": "Linear",
    }
    tinycudann = importlib.import_module("tinycudann")
    try:
        module = tinycudann.Encoding(3, settings, dtype=getattr(torch, config.table_dtype))
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise BackendError(
            "hash grid backend", f"tinycudann refuses the grid ({said})", "or use cuda"
        ) from error
    entries = module.params.numel() // config.features_per_level
    module.params = nn.Parameter(module.params.new_empty(0))
    return module, entries
