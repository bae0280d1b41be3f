"""The way to tiny-cuda-nn's hash grid, walked with a stand-in for the library: it needs a GPU of its own."""

import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers_gradients import assert_same_gradient
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig
from encoder.hashgrid import IMPLEMENTATIONS, OPTIONAL, GridGeometry, encode, num_table_entries, reference
from encoder.hashgrid import tinycudann as adapter
from utils.errors import BackendError

CONFIG = HashGridConfig(
    num_levels=3, features_per_level=2, log2_table_size=8, base_resolution=4, max_resolution=16
)
EXTRA = 8
"""Rows that only the stand-in's tables have, so that nobody can mistake them for ours."""


class Encoding(nn.Module):
    """With the signature and the conventions of ``tinycudann.Encoding``, made from our reference."""

    def __init__(
        self,
        n_input_dims: int,
        encoding_config: dict[str, object],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        del seed
        assert n_input_dims == 3
        levels, features = encoding_config["n_levels"], encoding_config["n_features_per_level"]
        if features not in (1, 2, 4, 8):
            raise RuntimeError("GridEncoding:\n n_features_per_level must be 1, 2, 4, or 8.")
        base, growth = encoding_config["base_resolution"], encoding_config["per_level_scale"]
        config = HashGridConfig(
            num_levels=levels,
            features_per_level=features,
            log2_table_size=encoding_config["log2_hashmap_size"],
            base_resolution=base,
            max_resolution=round(base * growth ** (levels - 1)),
        )
        assert encoding_config["otype"] == "HashGrid"
        assert encoding_config["interpolation"] == "Linear"
        self.geometry, self.features, self.dtype = GridGeometry.from_config(config, 1.0), features, dtype
        self.params = nn.Parameter(torch.zeros((self.geometry.num_entries + EXTRA) * features))

    def forward(self, x: Tensor) -> Tensor:
        assert x.detach().min() >= 0
        assert x.detach().max() <= 1
        table = self.params.reshape(-1, self.features)[: self.geometry.num_entries]
        levels = float(self.geometry.num_levels)
        return reference.encode(2 * x - 1, table, self.geometry, levels)[:, 3:].to(self.dtype)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("tinycudann")
    module.__spec__ = importlib.machinery.ModuleSpec("tinycudann", None)
    module.Encoding = Encoding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinycudann", module)
    adapter._encoding.cache_clear()
    yield
    adapter._encoding.cache_clear()


def available(device: str) -> str:
    return str(OPTIONAL["tinycudann"](torch.device(device)))


@pytest.mark.usefixtures("library")
def test_tables_have_the_librarys_size() -> None:
    grid = HashGrid(CONFIG, 1.0, "tinycudann")
    assert (
        len(grid.table) == num_table_entries(grid.geometry, "tinycudann") == grid.geometry.num_entries + EXTRA
    )
    assert num_table_entries(grid.geometry, "reference") == grid.geometry.num_entries
    with pytest.raises(ValueError, match=f"table must have {len(grid.table)} rows"):
        encode(torch.zeros(1, 3), torch.zeros(8, 2), grid.geometry, 3.0, "tinycudann")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("count", [None, 13])
def test_values_and_derivatives_are_passed_on(count: int | None) -> None:
    geometry = GridGeometry.from_config(CONFIG, bound=1.5)
    table = torch.rand(geometry.num_entries + EXTRA, 2) * 2 - 1
    positions = (torch.rand(20, 3) * 2 - 1) * 1.6
    cotangent, direction = torch.randn(20, 9), torch.randn(20, 3)
    # The stand-in's cube is ours, mapped to one of edge 1 and back: fractions of cells lose some last bits.
    results = []
    for backend, rows in (("reference", geometry.num_entries), ("tinycudann", len(table))):
        points, entries = positions.clone().requires_grad_(), table[:rows].clone().requires_grad_()
        real = None if count is None else torch.tensor(count)
        encoded = encode(points, entries, geometry, torch.tensor(2.25), backend, real)
        (slope,) = torch.autograd.grad((encoded * cotangent).sum(), points, create_graph=True)
        (second,) = torch.autograd.grad((slope * direction).sum() + encoded.square().sum(), entries)
        results.append([encoded.detach(), slope.detach(), second[: geometry.num_entries]])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_gradient(actual, expected, tolerance=1e-5)


@pytest.mark.usefixtures("library")
def test_half_precision_is_asked_for_and_widened() -> None:
    config = HashGridConfig(
        num_levels=2, log2_table_size=8, base_resolution=4, max_resolution=8, table_dtype="float16"
    )
    grid = HashGrid(config, 1.0, "tinycudann")
    encoded = grid(torch.rand(5, 3), 2.0)
    assert encoded.dtype == torch.float32
    assert torch.equal(encoded[:, 3:], encoded[:, 3:].half().float())


@pytest.mark.usefixtures("library")
def test_one_module_serves_all_tables_of_a_shape() -> None:
    first, second = (adapter._encoding(HashGridConfig(num_levels=2)) for _ in range(2))
    assert first is second
    # Its own parameters, as large as a table, are not kept.
    assert first[0].params.numel() == 0


@pytest.mark.usefixtures("library")
def test_what_the_library_refuses_is_named() -> None:
    with pytest.raises(BackendError, match=r"refuses the grid \(GridEncoding: n_features_per_level must be"):
        HashGrid(HashGridConfig(features_per_level=3), 1.0, "tinycudann")


@pytest.mark.usefixtures("library")
def test_runs_on_a_gpu_by_name_only() -> None:
    assert "tinycudann" not in IMPLEMENTATIONS
    assert available("cuda") == "None"
    assert available("cpu") == "tiny-cuda-nn needs a GPU, this run uses the cpu"


def test_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tinycudann", raising=False)
    monkeypatch.setattr(sys, "path", [])
    said = available("cuda")
    assert said.startswith("tiny-cuda-nn is not installed: pip install git+https://github.com/NVlabs/")
    assert "backend cuda" in said


@pytest.mark.parametrize("error", ["OSError('no\\nGPU of\\nthis kind')", "ImportError('undefined symbol')"])
def test_broken_library_is_named_with_its_remedy(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tinycudann", raising=False)
    (tmp_path / "tinycudann.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = available("cuda")
    assert "\n" not in said
    assert said.startswith(f"tiny-cuda-nn does not load ({error.partition('(')[0]}: ")
    assert "pip install git+https://github.com/NVlabs/tiny-cuda-nn" in said
