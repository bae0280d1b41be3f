"""Packed alpha compositing: weights along rays, sums per ray, and their gradients."""

import math

import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, Kernel, compile_ahead, needs_triton
from torch import Tensor

from models import compositing


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def render_weights(alpha: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Composite where the backend's tensors live; all else here is on the CPU."""
    device = DEVICE if backend == "cuda" else "cpu"
    return compositing.render_weights(alpha.to(device), offsets.to(device), backend).cpu()


def accumulate(weights: Tensor, values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    device = DEVICE if backend == "cuda" else "cpu"
    packed = weights.to(device), values.to(device), offsets.to(device)
    return compositing.accumulate(*packed, backend).cpu()


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def test_by_hand(backend: str) -> None:
    # 0.4; (1 - 0.4) * 0.8; (1 - 0.4) * (1 - 0.8) * 0.5. The next ray starts anew.
    weights = render_weights(torch.tensor([0.4, 0.8, 0.5, 0.3]), offsets_of(3, 1), backend)
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.48, 0.06, 0.3]))


def test_accumulate_by_hand(backend: str) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sums = accumulate(torch.tensor([1.0, 0.5, 2.0]), values, offsets_of(2, 0, 1), backend)
    assert sums.tolist() == [[2.5, 4.0], [0.0, 0.0], [10.0, 12.0]]


def test_an_opaque_sample_hides_what_is_behind(backend: str) -> None:
    alpha = torch.tensor([0.25, 1.0, 0.5, 1.0], requires_grad=True)
    weights = render_weights(alpha, offsets_of(4), backend)
    assert weights.tolist() == [0.25, 0.75, 0.0, 0.0]
    # d loss / d alpha_i = T_i (what i shows - what would be seen behind it).
    (gradient,) = torch.autograd.grad(weights @ torch.tensor([1.0, 10.0, 100.0, 1000.0]), alpha)
    # 1 - 10; 0.75 * (10 - (0.5 * 100 + 0.5 * 1000)); nothing reaches the last two.
    assert gradient.tolist() == [-9.0, 0.75 * (10 - 550), 0.0, 0.0]


def test_transparent_samples_weigh_nothing(backend: str) -> None:
    alpha = torch.zeros(5, requires_grad=True)
    weights = render_weights(alpha, offsets_of(2, 3), backend)
    assert not weights.any()
    (gradient,) = torch.autograd.grad(weights @ torch.arange(1.0, 6.0), alpha)
    assert gradient.tolist() == [1, 2, 3, 4, 5]


def random_case() -> tuple[Tensor, Tensor, Tensor]:
    """Alpha, colours and offsets of rays with 0 to 40 samples; first, last and two in the midst have none."""
    counts = torch.randint(0, 41, (30,))
    counts[[0, 11, 12, 29]] = 0
    alpha = torch.rand(int(counts.sum())) ** 3
    alpha[torch.rand(len(alpha)) < 0.03] = 1.0
    alpha[torch.rand(len(alpha)) < 0.1] = 0.0
    return alpha, torch.randn(len(alpha), 4), offsets_of(*counts.tolist())


def composite_slowly(alpha: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and sums, one number after another."""
    weights, sums = [], []
    for first, last in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True):
        transmittance = torch.ones((), dtype=alpha.dtype)
        total = torch.zeros(values.shape[1], dtype=alpha.dtype)
        for i in range(first, last):
            weights.append(transmittance * alpha[i])
            total = total + weights[-1] * values[i]
            transmittance = transmittance * (1 - alpha[i])
        sums.append(total)
    return torch.stack(weights), torch.stack(sums)


def test_weights_and_opacity_stay_in_range(backend: str) -> None:
    alpha, _, offsets = random_case()
    weights = render_weights(alpha, offsets, backend)
    opacity = accumulate(weights, torch.ones(len(alpha), 1), offsets, backend)[:, 0]
    assert (weights >= 0).all()
    assert (weights <= alpha).all()
    # Thirty sums of roundings of 6e-8 each.
    assert (opacity <= 1 + 2e-6).all()
    for ray, (first, last) in enumerate(zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True)):
        expected = 1 - float((1 - alpha[first:last].double()).prod())
        assert opacity[ray].item() == pytest.approx(expected, abs=2e-6)


def test_values_and_gradients_against_a_loop(backend: str) -> None:
    alpha, values, offsets = random_case()
    towards = torch.randn(len(offsets) - 1, 4)
    extra = torch.randn(len(alpha))
    results = {}
    for dtype in (torch.float32, torch.float64):
        a, v = alpha.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()
        if dtype == torch.float32:
            weights = render_weights(a, offsets, backend)
            sums = accumulate(weights, v, offsets, backend)
        else:
            weights, sums = composite_slowly(a, v, offsets)
        # Losses see the weights directly (distortion) and through pixels; both paths meet in alpha.
        loss = (sums * towards.to(dtype)).sum() + (weights * extra.to(dtype)).sum()
        results[dtype] = [weights.detach(), sums.detach(), *torch.autograd.grad(loss, [a, v])]
    for actual, expected in zip(results[torch.float32], results[torch.float64], strict=True):
        # 40 factors and sums of 6e-8 each.
        assert_same_gradient(actual, expected, tolerance=5e-6)


def test_one_sample(backend: str) -> None:
    alpha = torch.tensor([0.7], requires_grad=True)
    weights = render_weights(alpha, offsets_of(1), backend)
    assert weights.tolist() == alpha.tolist()
    (weights * 3).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [3.0]


@pytest.mark.parametrize("num_rays", [0, 3])
def test_no_samples(backend: str, num_rays: int) -> None:
    alpha = torch.zeros(0, requires_grad=True)
    values = torch.zeros(0, 3, requires_grad=True)
    offsets = torch.zeros(num_rays + 1, dtype=torch.int64)
    weights = render_weights(alpha, offsets, backend)
    sums = accumulate(weights, values, offsets, backend)
    assert weights.shape == (0,)
    assert torch.equal(sums, torch.zeros(num_rays, 3))
    sums.sum().backward()
    assert alpha.grad is not None
    assert values.grad is not None
    assert alpha.grad.shape == (0,)
    assert values.grad.shape == (0, 3)


def test_non_contiguous(backend: str) -> None:
    alpha, values, offsets = random_case()
    wide = torch.stack([alpha, torch.full_like(alpha, 9.0)], dim=1).requires_grad_()
    tall = values.t().contiguous().requires_grad_()
    strided_alpha, strided_values = wide[:, 0], tall.t()
    assert not strided_alpha.is_contiguous()
    assert not strided_values.is_contiguous()
    weights = render_weights(strided_alpha, offsets, backend)
    sums = accumulate(weights, strided_values, offsets, backend)
    # The gradient of a sum arrives expanded, without memory of its own.
    d_wide, d_tall = torch.autograd.grad(sums.sum() + weights.sum(), [wide, tall])

    plain_alpha, plain_values = alpha.clone().requires_grad_(), values.clone().requires_grad_()
    plain_weights = render_weights(plain_alpha, offsets, backend)
    plain_sums = accumulate(plain_weights, plain_values, offsets, backend)
    loss = (plain_sums * torch.ones_like(plain_sums)).sum() + (plain_weights * torch.ones_like(alpha)).sum()
    d_alpha, d_values = torch.autograd.grad(loss, [plain_alpha, plain_values])
    assert torch.equal(weights, plain_weights)
    assert torch.equal(sums, plain_sums)
    torch.testing.assert_close(d_wide[:, 0], d_alpha)
    assert not d_wide[:, 1].any()
    torch.testing.assert_close(d_tall.t(), d_values)


def test_weights_of_accumulate_may_be_strided(backend: str) -> None:
    alpha, values, offsets = random_case()
    strided = torch.stack([alpha, alpha], dim=1)[:, 1]
    assert torch.equal(
        accumulate(strided, values, offsets, backend), accumulate(alpha, values, offsets, backend)
    )


@pytest.mark.parametrize("channels", [1, 3, 20])
def test_long_rays_and_many_channels(backend: str, channels: int) -> None:
    # Rays over several of the CUDA kernels' blocks of 32, and such as end where a block does.
    offsets = offsets_of(100, 0, 32, 64, 33, 1)
    alpha = torch.rand(int(offsets[-1])) ** 4
    alpha[[40, 131]] = 1.0
    values = torch.randn(len(alpha), channels)
    towards, extra = torch.randn(6, channels), torch.randn(len(alpha))
    results = {}
    for dtype in (torch.float32, torch.float64):
        a, v = alpha.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()
        name = backend if dtype == torch.float32 else "reference"
        weights = render_weights(a, offsets, name)
        sums = accumulate(weights, v, offsets, name)
        loss = (sums * towards.to(dtype)).sum() + (weights * extra.to(dtype)).sum()
        results[dtype] = [weights.detach(), sums.detach(), *torch.autograd.grad(loss, [a, v])]
    for actual, expected in zip(results[torch.float32], results[torch.float64], strict=True):
        # 100 factors and sums of 6e-8 each.
        assert_same_gradient(actual, expected, tolerance=1e-5)


def test_padding_weighs_nothing_and_gets_no_gradient(backend: str) -> None:
    # Three samples and three rows of padding, in which anything may be written.
    offsets = offsets_of(2, 0, 1, 0)
    alpha = torch.tensor([0.4, 0.8, 0.5, math.nan, 1.0, 0.3], requires_grad=True)
    values = torch.tensor([[1.0], [2.0], [3.0], [math.nan], [math.inf], [4.0]], requires_grad=True)
    weights = render_weights(alpha, offsets, backend)
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.48, 0.5, 0.0, 0.0, 0.0]))
    sums = accumulate(weights, values, offsets, backend)
    torch.testing.assert_close(sums, torch.tensor([[1.36], [0.0], [1.5], [0.0]]))
    d_alpha, d_values = torch.autograd.grad(sums.sum(), [alpha, values])
    # 1 - 0.8 * 2; 0.6 * 2; 3.
    torch.testing.assert_close(d_alpha, torch.tensor([-0.6, 1.2, 3.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(d_values[:, 0], torch.tensor([0.4, 0.48, 0.5, 0.0, 0.0, 0.0]))

    # Whatever comes back for padding from a loss on the weights goes no further.
    padded = alpha.detach().requires_grad_()
    towards = torch.tensor([1.0, 1.0, 1.0, math.nan, 5.0, 5.0])
    (d_padded,) = torch.autograd.grad(render_weights(padded, offsets, backend), padded, towards)
    torch.testing.assert_close(d_padded, torch.tensor([0.2, 0.6, 1.0, 0.0, 0.0, 0.0]))


def test_derivatives_of_finite_differences_in_float64(backend: str) -> None:
    offsets = offsets_of(0, 3, 1)
    alpha = torch.tensor([0.2, 0.9, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def function(a: Tensor, v: Tensor) -> Tensor:
        return accumulate(render_weights(a, offsets, backend), v, offsets, backend)

    torch.autograd.gradcheck(function, (alpha, values))


def test_reference_has_the_second_derivatives_of_finite_differences() -> None:
    offsets = offsets_of(0, 3, 1)
    alpha = torch.tensor([0.2, 0.9, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def function(a: Tensor, v: Tensor) -> Tensor:
        return accumulate(render_weights(a, offsets, "reference"), v, offsets, "reference")

    torch.autograd.gradgradcheck(function, (alpha, values))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    module, kernels = "models.compositing.cuda", []
    forward = {"alpha": "*fp32", "offsets": "*i64", "weights": "*fp32", "transmittance": "*fp32"}
    backward = forward | {"d_weights": "*fp32", "d_alpha": "*fp32"}
    del backward["weights"]
    for name, signature in (("_weights_kernel", forward), ("_weights_backward_kernel", backward)):
        kernels.append(Kernel(module, name, signature | {"BLOCK": "constexpr"}, {"BLOCK": 32}, num_warps=1))
    packed = {"weights": "*fp32", "values": "*fp32", "offsets": "*i64"}
    forward = packed | {"sums": "*fp32"}
    backward = packed | {"d_sums": "*fp32", "d_weights": "*fp32", "d_values": "*fp32"}
    for channels, block in ((1, 1), (4, 4), (7, 8), (20, 16)):
        constants = {"CHANNELS": channels, "BLOCK": 32, "BLOCK_C": block}
        sizes = dict.fromkeys(constants, "constexpr")
        for name, signature in (("_accumulate_kernel", forward), ("_accumulate_backward_kernel", backward)):
            kernels.append(Kernel(module, name, signature | sizes, constants, num_warps=1))
    for kernel, result in zip(kernels, compile_ahead(kernels, capability), strict=True):
        assert not result["error"]
        assert result["spilled"] == 0
        # More would leave less than the 32 programs of one warp that fit into a multiprocessor.
        is_common = kernel.constants.get("BLOCK_C", 1) <= 8
        assert 0 < int(result["registers"]) <= (64 if is_common else 255)
