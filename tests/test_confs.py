"""The configs that come with the project: each loads, and names itself as the README says."""

from pathlib import Path

import pytest

from run import sections
from utils.command_line import VRAM
from utils.config import load_config

CONFS = sorted((Path(__file__).resolve().parents[1] / "confs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert "neus-synthetic" in [path.stem for path in CONFS]


@pytest.mark.parametrize(
    ("device", "vram"), [("cpu", None), ("cuda", None), *(("cuda", size) for size in VRAM)]
)
@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_config_loads_and_is_named_after_method_and_format(path: Path, device: str, vram: int | None) -> None:
    config = load_config(path, (), sections(), device, vram)
    method, form, *_ = path.stem.split("-")
    assert (config.model.density, config.dataset.name) == (method, form)
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
        tables = [config.model.sdf.hash_grid.log2_table_size for config in (cpu, small, gpu)]
        assert tables == sorted(set(tables))
        assert small.export.chunk < gpu.export.chunk
