"""SSIM and LPIPS on patches: against explicit sums, finite differences, and without what was not rendered."""

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import bare_model, raiser, tiny_config
from torch import Tensor, nn

from systems.neus import NeuSSystem
from systems.patch_losses import patch_lpips, patch_ssim
from utils import metrics
from utils.errors import ConfigError


def ssim_by_sums(rgb: Tensor, target: Tensor, window: int) -> float:
    """Wang et al. 2004, equations 14 to 16 and 13, window by window in double precision."""
    x, y = (pictures.detach().double().numpy() for pictures in (rgb, target))
    ticks = np.arange(window) - window // 2
    w = np.exp(-(ticks[:, None] ** 2 + ticks[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    found = []
    for patch in range(len(x)):
        for top in range(x.shape[1] - window + 1):
            for left in range(x.shape[2] - window + 1):
                for channel in range(3):
                    a, b = (p[patch, top : top + window, left : left + window, channel] for p in (x, y))
                    mu_a, mu_b = (w * a).sum(), (w * b).sum()
                    var_a, var_b = (w * (a - mu_a) ** 2).sum(), (w * (b - mu_b) ** 2).sum()
                    cov = (w * (a - mu_a) * (b - mu_b)).sum()
                    likeness = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
                    found.append(likeness / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return float(np.mean(found))


def similar(count: int, side: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.rand(count, side, side, 3, dtype=dtype)
    return (target + 0.2 * torch.randn_like(target)).clamp(0, 1), target


@pytest.mark.parametrize(("side", "window"), [(3, 3), (4, 3), (8, 7), (11, 11), (12, 11), (14, 11)])
def test_ssim_is_the_mean_over_all_windows(side: int, window: int) -> None:
    rgb, target = similar(3, side)
    expected = 1 - ssim_by_sums(rgb, target, window)
    assert 0.05 < expected < 1.0
    found = patch_ssim(rgb, target)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_ssim_by_hand() -> None:
    black, white = torch.zeros(2, 5, 5, 3), torch.ones(2, 5, 5, 3)
    # Without any variance only the means compare.
    assert float(patch_ssim(black, white)) == pytest.approx(1 - 1e-4 / (1 + 1e-4))
    assert float(patch_ssim(white, white)) == 0.0
    board = (
        ((torch.arange(11)[:, None] + torch.arange(11)) % 2).float()[None, :, :, None].expand(1, 11, 11, 3)
    )
    assert float(patch_ssim(board, 1 - board)) > 1.9


def test_the_loss_is_the_metric_of_one_picture() -> None:
    rgb, target = similar(1, 20)
    assert float(patch_ssim(rgb, target)) == pytest.approx(1 - metrics.ssim(rgb[0], target[0]), rel=1e-6)


@pytest.mark.parametrize("keep", [None, torch.tensor([True, False])])
def test_gradient_of_ssim_agrees_with_finite_differences(keep: Tensor | None) -> None:
    rgb, target = similar(2, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: patch_ssim(x, target, keep), (rgb.requires_grad_(),))
    loss = patch_ssim(rgb, target, keep)
    (gradient,) = torch.autograd.grad(loss, rgb)
    assert gradient[0].any()
    assert gradient[1].any() == (keep is None)


@pytest.mark.parametrize("term", [patch_ssim, patch_lpips])
def test_patches_that_are_not_kept_have_no_part(term: object, stub: ModuleType) -> None:
    assert callable(term)
    rgb, target = similar(4, 32)
    keep = torch.tensor([True, False, True, False])
    poisoned = torch.where(keep[:, None, None, None], rgb, torch.nan).requires_grad_()
    alone = rgb[keep].clone().requires_grad_()
    found, expected = term(poisoned, target, keep), term(alone, target[keep], None)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, poisoned)[0], torch.autograd.grad(expected, alone)[0]
    torch.testing.assert_close(gradients[0][keep], gradients[1])
    assert not gradients[0][~keep].any()
    nothing = term(poisoned, target, torch.zeros_like(keep))
    assert float(nothing.detach()) == 0.0
    assert not torch.autograd.grad(nothing, poisoned)[0].any()
    assert torch.isnan(term(poisoned, target, None))


def test_ssim_of_no_patches_is_a_zero_that_can_be_differentiated() -> None:
    empty = torch.zeros(0, 5, 5, 3, requires_grad=True)
    loss = patch_ssim(empty, empty.detach())
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_descent_makes_patches_alike() -> None:
    target, rgb = torch.rand(2, 11, 11, 3), torch.full((2, 11, 11, 3), 0.5, requires_grad=True)
    start = float(patch_ssim(rgb, target).detach())
    optimizer = torch.optim.Adam([rgb], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = patch_ssim(rgb, target)
        loss.backward()
        optimizer.step()
    assert start > 0.9
    assert float(loss.detach()) < 0.1


# LPIPS


class StubNetwork(nn.Module):
    """In the place of the package's network: a weighted squared difference of pictures in -1..1."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex"
        assert not verbose
        self.weight = nn.Parameter(0.5 + torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1] == y.shape[1] == 3
        return (self.weight * (x - y).square()).mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package lpips, with AlexNet's weights where it looks for them."""
    module = ModuleType("lpips")
    module.__spec__ = ModuleSpec("lpips", None)
    vars(module)["LPIPS"] = StubNetwork
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    metrics._lpips_network.cache_clear()
    yield module
    metrics._lpips_network.cache_clear()


def test_lpips_reaches_the_pictures_and_leaves_the_network_alone(stub: ModuleType) -> None:
    rgb, target = similar(3, 32)
    rgb.requires_grad_()
    before = torch.get_rng_state()
    loss = patch_lpips(rgb, target)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    network = metrics._lpips_network(torch.device("cpu"))
    assert not network.training
    (weight,) = network.parameters()
    assert weight.grad is None
    difference = weight.detach().view(3) * (2 * (rgb.detach() - target))
    assert rgb.grad is not None
    torch.testing.assert_close(rgb.grad, 4 * difference / rgb.numel())
    expected = (weight.detach().view(3) * (2 * (rgb.detach() - target)).square()).mean()
    torch.testing.assert_close(loss.detach(), expected)
    # The same network measures; it is made once.
    measured = np.mean([metrics.lpips_distances(rgb[i : i + 1], target[i : i + 1]).item() for i in range(3)])
    assert float(loss.detach()) == pytest.approx(measured, rel=1e-5)


def system_with_lpips(*overrides: str) -> NeuSSystem:
    config = tiny_config("system.loss.lpips=[[0,0],[0.5,0],[1,0.1]]", *overrides)
    # Rendering does without what training needs.
    system = NeuSSystem(config.system, 4, has_masks=True)
    system.check_training(bare_model())
    return system


def test_lpips_without_the_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = r"^system\.loss\.lpips: .* \(pip install lpips\); add it, or set system\.loss\.lpips=0$"
    with pytest.raises(ConfigError, match=line):
        system_with_lpips("system.patch_size=32")


def test_lpips_without_weights_says_where_they_belong(stub: ModuleType, tmp_path: Path) -> None:
    next(tmp_path.rglob("*.pth")).unlink()
    with pytest.raises(
        ConfigError, match=r"^system\.loss\.lpips: torchvision's AlexNet weights are not in /"
    ):
        system_with_lpips("system.patch_size=32")


def test_lpips_of_small_patches_names_their_size(stub: ModuleType) -> None:
    line = (
        r"^system\.patch_size: system\.loss\.lpips needs patches of at least 32 pixels, got 31; set it to 32,"
    )
    with pytest.raises(ConfigError, match=line):
        system_with_lpips("system.patch_size=31")
    system_with_lpips("system.patch_size=32")


def test_without_the_term_nobody_looks_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("systems.patch_losses.lpips_missing", raiser(AssertionError("looked")))
    NeuSSystem(tiny_config("system.loss.ssim=0.1").system, 4, has_masks=True).check_training(bare_model())


@pytest.mark.skipif(metrics.lpips_missing() is not None, reason=f"LPIPS: {metrics.lpips_missing()}")
def test_the_real_lpips_falls_by_descent() -> None:
    rgb, target = similar(2, 32)
    assert float(patch_lpips(target, target)) == pytest.approx(0.0, abs=1e-6)
    losses = []
    optimizer = torch.optim.Adam([rgb.requires_grad_()], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss = patch_lpips(rgb, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
