"""The configs that come with the project: each loads, and names itself as the README says."""

from pathlib import Path
from typing import Any

import pytest

from run import sections
from systems.neus import NeuSSystem
from utils.command_line import VRAM
from utils.config import load_config

MODELS = {
    "neus": ("neus", "neus"),
    "neuralangelo": ("neus", "neus"),
    "volsdf": ("neus", "volsdf"),
    "nerf": ("nerf-ngp", None),
    "nerf-vanilla": ("nerf", None),
    "mipnerf360": ("mipnerf360", None),
}
"""By a config's method: ``model.name``, and ``model.density`` where there is one."""
UNBOUNDED = ("colmap", "transforms")
"""Formats whose captures show what surrounds the object: NeRF takes its samples from proposals there."""
CONFS = sorted((Path(__file__).resolve().parents[1] / "confs").glob("*.yaml"))


def method_and_format(path: Path) -> tuple[str, str]:
    """``nerf-vanilla-blender.yaml`` is ``nerf-vanilla`` on ``blender``."""
    method = max((name for name in MODELS if path.stem.startswith(f"{name}-")), key=len)
    return method, path.stem.removeprefix(f"{method}-").split("-")[0]


def test_there_are_configs() -> None:
    assert "neus-synthetic" in [path.stem for path in CONFS]


@pytest.mark.parametrize(
    ("device", "vram"), [("cpu", None), ("cuda", None), *(("cuda", size) for size in VRAM)]
)
@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_config_loads_and_is_named_after_method_and_format(path: Path, device: str, vram: int | None) -> None:
    config = load_config(path, (), sections(), device, vram)
    method, form = method_and_format(path)
    model = config.model.name, getattr(config.model, "density", None)
    if method == "nerf" and form in UNBOUNDED:
        assert config.model.contraction != "none"
        method_model = "nerf-proposal", None
    else:
        method_model = MODELS[method]
    assert (model, config.dataset.name) == (method_model, form)
    assert config.name.startswith(f"{method}-{form}")
    # A run ends by itself, and its name is that of one folder.
    assert config.trainer.max_steps > 0
    assert config.name == Path(config.name).name


def test_a_gpu_gets_larger_steps_and_little_memory_smaller_ones() -> None:
    for path in CONFS:
        cpu, gpu, small = (
            load_config(path, (), sections(), *where) for where in (("cpu",), ("cuda",), ("cuda", 4))
        )
        assert gpu.trainer.max_minutes is None
        assert cpu.trainer.samples_per_step < small.trainer.samples_per_step < gpu.trainer.samples_per_step
        grids = [_hash_grid(config.model) for config in (cpu, small, gpu)]
        tables = [grid.log2_table_size for grid in grids if grid is not None]
        assert tables == sorted(set(tables))
        assert small.export.chunk < gpu.export.chunk


def _hash_grid(model: Any) -> Any:
    field = getattr(model, "sdf", None) or getattr(model, "density_field", None)
    return None if field is None else field.hash_grid


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", [path for path in CONFS if path.stem.startswith("neuralangelo")], ids=str)
def test_the_laplacian_term_falls_as_the_taps_draw_nearer(path: Path, device: str) -> None:
    """Its weight is 5e-4 while the first levels are open, then falls with the grid's growth (section 3.3)."""
    config = load_config(path, (), sections(), device)
    grid = config.model.sdf.hash_grid
    system = NeuSSystem(config.system, grid.num_levels, has_masks=True)
    start, end = config.system.levels_start, config.system.levels_end
    assert (config.model.sdf.gradient, config.trainer.optimizer.weight_decay) == ("numerical", 0.01)
    assert "laplacian" not in system.progress_at(0.0).loss_weights
    for share in (0.0, 0.1, 0.25, 0.4, 0.5, 0.7, 0.9, 1.0):
        progress = system.progress_at(start + share * (end - start))
        assert progress.active_levels == pytest.approx(4 + share * (grid.num_levels - 4))
        expected = 5e-4 / grid.growth ** (progress.active_levels - 4)
        # Straight lines between points two or three levels apart.
        assert progress.loss_weights["laplacian"] == pytest.approx(expected, rel=0.12)
    assert system.progress_at(1.0).loss_weights["laplacian"] == pytest.approx(expected, rel=0.01)
