"""The configs that come with the project: each loads, and names itself as the README says."""

from pathlib import Path

import pytest

from run import sections
from utils.config import load_config

CONFS = sorted((Path(__file__).resolve().parents[1] / "confs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert "neus-synthetic" in [path.stem for path in CONFS]


@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_config_loads_and_is_named_after_method_and_format(path: Path) -> None:
    config = load_config(path, (), sections())
    method, form, *_ = path.stem.split("-")
    assert (config.model.name, config.system.name, config.dataset.name) == (method, method, form)
    # A run ends by itself, and its name is that of one folder.
    assert config.trainer.max_steps > 0
    assert config.name == Path(config.name).name
