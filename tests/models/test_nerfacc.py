"""The adapters to nerfacc, against a stand-in with the functions of nerfacc 0.5.3 in plain PyTorch.

nerfacc itself runs on GPUs only and is no dependency.
"""

import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from helpers_triton import needs_triton
from torch import Tensor

from models.compositing import OPTIONAL, accumulate, render_weights
from models.marching import drop_hidden, march
from models.opacity import DENSITIES
from utils.backend import implementation
from utils.types import Rays

GPU = torch.device("cuda")


@dataclass
class Segments:
    vals: Tensor
    packed_info: Tensor
    ray_indices: Tensor
    is_left: Tensor | None = None
    is_right: Tensor | None = None


def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Tensor | None = None,
    far_planes: Tensor | None = None,
    step_size: float | None = 1e-3,
    cone_angle: float | None = 0.0,
) -> tuple[None, Segments, Tensor]:
    """Samples in the middles of steps from the near plane on, in the finest box around them."""
    assert near_planes is not None
    assert far_planes is not None
    assert cone_angle == 0.0
    assert isinstance(step_size, float)
    size = torch.tensor(binaries.shape[1:])
    middles: list[float] = []
    counts: list[int] = []
    for origin, direction, near, far in zip(rays_o, rays_d, near_planes, far_planes, strict=True):
        before = len(middles)
        for k in range(max(0, math.ceil(float(far - near) / step_size) + 1)):
            t = float(near) + (k + 0.5) * step_size
            position = origin + t * direction
            inside = ((position >= aabbs[:, :3]) & (position <= aabbs[:, 3:])).all(dim=1)
            if t >= float(far) or not inside.any():
                continue
            level = int(inside.int().argmax())
            low, high = aabbs[level, :3], aabbs[level, 3:]
            cell = ((position - low) / (high - low) * size).long().clamp(max=size - 1)
            if binaries[level, cell[0], cell[1], cell[2]]:
                middles.append(t)
        counts.append(len(middles) - before)
    num = torch.tensor(counts, dtype=torch.int64)
    packed_info = torch.stack([num.cumsum(0) - num, num], dim=1)
    ray_indices = torch.repeat_interleave(torch.arange(len(num)), num)
    return None, Segments(torch.tensor(middles), packed_info, ray_indices), far_planes


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the original, it leaves rows of no ray uninitialised."""
    assert packed_info is not None
    trans = torch.full_like(alphas, math.nan)
    for start, count in packed_info.tolist():
        rows = torch.arange(start, start + count)
        ones = torch.ones_like(alphas[:1])
        factors = torch.cat([ones, 1 - alphas[rows]])[:-1]
        trans = trans.index_copy(0, rows, torch.cumprod(factors, dim=0))
    return trans * alphas, trans


def accumulate_along_rays(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    assert values is not None
    assert ray_indices is not None
    assert n_rays is not None
    return torch.zeros(n_rays, values.shape[1]).index_add(0, ray_indices, weights[:, None] * values)


def forget_adapters() -> None:
    implementation.cache_clear()
    for package in ("models.marching", "models.compositing"):
        sys.modules.pop(f"{package}.nerfacc", None)


@pytest.fixture
def nerfacc(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in that imports as nerfacc, kernels included."""
    package, cuda, kernels = (ModuleType(f"nerfacc{end}") for end in ("", ".cuda", ".cuda._backend"))
    package.__spec__ = ModuleSpec("nerfacc", None)
    for function in (traverse_grids, render_weight_from_alpha, accumulate_along_rays):
        setattr(package, function.__name__, function)
    kernels._C = object()  # type: ignore[attr-defined]
    for module in (package, cuda, kernels):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    forget_adapters()
    yield package
    forget_adapters()


def test_a_gpu_is_needed() -> None:
    assert OPTIONAL["nerfacc"](torch.device("cpu")) == "nerfacc needs a GPU, this run uses the cpu"
    assert "nerfacc" not in sys.modules


@pytest.mark.skipif(importlib.util.find_spec("nerfacc") is not None, reason="nerfacc is installed")
def test_missing() -> None:
    assert OPTIONAL["nerfacc"](GPU) == ("nerfacc is not installed: pip install nerfacc, or use backend cuda")


def test_found(nerfacc: ModuleType) -> None:
    assert OPTIONAL["nerfacc"](GPU) is None


def test_disabled_by_itself(nerfacc: ModuleType) -> None:
    sys.modules["nerfacc.cuda._backend"]._C = None  # type: ignore[attr-defined]
    assert OPTIONAL["nerfacc"](GPU) == (
        "nerfacc found no CUDA toolkit and disabled itself: nerfacc 0.5.3 compiles against CUDA <= 12 only; "
        "install a prebuilt wheel for your torch, or use backend cuda"
    )


def test_too_old(nerfacc: ModuleType) -> None:
    del nerfacc.traverse_grids
    reason = OPTIONAL["nerfacc"](GPU)
    assert reason is not None
    assert "older than 0.5.3" in reason


def test_failing_to_compile(nerfacc: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("Error building extension 'nerfacc_cuda'\n[1/9] nvcc ...")

    monkeypatch.setattr(importlib, "import_module", fail)
    reason = OPTIONAL["nerfacc"](GPU)
    assert reason is not None
    assert reason.startswith(
        "nerfacc cannot be loaded (RuntimeError: Error building extension 'nerfacc_cuda'): nerfacc 0.5.3"
    )


def rays_through_the_middle(count: int) -> Rays:
    origins = 2.0 * torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    directions = torch.nn.functional.normalize(0.4 * torch.randn(count, 3) - origins, dim=1)
    near = torch.full((count,), 0.3)
    far = near + 3.0 * torch.rand(count)
    far[2] = -1.0
    return Rays(origins, directions, near, far, torch.zeros(count, dtype=torch.int64))


@needs_triton
@pytest.mark.parametrize("capacity", [None, 60])
def test_marching_and_dropping_as_ours(nerfacc: ModuleType, capacity: int | None) -> None:
    # Axes of different contents, so that none can be taken for another.
    occupied = torch.rand(2, 8, 8, 8) < 0.3
    rays, jitter = rays_through_the_middle(12), torch.rand(12)
    step = torch.tensor(0.083)
    ours = march(rays, occupied, step, jitter, "reference", capacity)
    theirs = march(rays, occupied, step, jitter, "nerfacc", capacity)
    assert len(ours) > 50
    assert torch.equal(theirs.ray_indices, ours.ray_indices)
    assert torch.equal(theirs.offsets, ours.offsets)
    assert (theirs.is_served is None) == (capacity is None)
    torch.testing.assert_close(theirs.t_starts, ours.t_starts, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.t_ends, ours.t_ends, atol=1e-5, rtol=0)

    sdf = 0.3 - ours.t_middle % 0.7
    for density in DENSITIES:
        visible = [
            drop_hidden(ours, sdf, 60.0, step, 1e-3, density, name, capacity)
            for name in ("reference", "nerfacc")
        ]
        assert 0 < int(visible[0].count) < int(ours.count)
        assert torch.equal(visible[0].offsets, visible[1].offsets)
        assert torch.equal(visible[0].t_starts, visible[1].t_starts)


def test_compositing_as_ours(nerfacc: ModuleType) -> None:
    offsets = torch.tensor([0, 3, 3, 8])  # and two rows of padding
    values, towards = torch.randn(10, 4), torch.randn(3, 4)
    results = []
    for name in ("reference", "nerfacc"):
        alpha = torch.linspace(0.05, 0.9, 10, requires_grad=True)
        weights = render_weights(alpha, offsets, name)
        sums = accumulate(weights, values, offsets, name)
        results.append([weights, sums, *torch.autograd.grad((sums * towards).sum(), alpha)])
    for theirs, ours in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(theirs, ours)


def test_adapters_are_imported_when_asked_for() -> None:
    assert "nerfacc" not in sys.modules
    assert "models.marching.nerfacc" not in sys.modules
