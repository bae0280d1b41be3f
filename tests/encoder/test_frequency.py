"""Frequency encoding: order of columns, octaves, and the coarse-to-fine window."""

import math

import pytest
import torch
from torch import Tensor

from encoder import encode_frequency, frequency_width


def test_by_hand() -> None:
    encoded = encode_frequency(torch.tensor([[math.pi / 2, 0.0]]), 2)
    # The inputs, then per octave the sines of both channels and the cosines of both channels.
    expected = [math.pi / 2, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 1.0]
    torch.testing.assert_close(encoded, torch.tensor([expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "octaves"), [(3, 6), (3, 0), (1, 4)])
def test_width(channels: int, octaves: int) -> None:
    assert encode_frequency(torch.zeros(2, channels), octaves).shape == (
        2,
        frequency_width(channels, octaves),
    )


def test_width_of_nerf() -> None:
    assert frequency_width(3, 10) == 63


def test_no_octaves_return_the_inputs() -> None:
    inputs = torch.randn(4, 3)
    assert torch.equal(encode_frequency(inputs, 0), inputs)


def test_against_a_loop() -> None:
    inputs = torch.rand(5, 3, dtype=torch.float64) * 2 - 1
    encoded = encode_frequency(inputs, 3)
    for row in range(5):
        expected = inputs[row].tolist()
        for octave in range(3):
            expected += [math.sin(2**octave * x) for x in inputs[row].tolist()]
            expected += [math.cos(2**octave * x) for x in inputs[row].tolist()]
        torch.testing.assert_close(encoded[row], torch.tensor(expected, dtype=torch.float64))


def octave_sizes(encoded: Tensor) -> list[float]:
    """Length of (sine, cosine) per octave for one input channel: 1 for an open octave."""
    return encoded[0, 1:].view(-1, 2).norm(dim=1).tolist()


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        (0.0, [0, 0, 0]),
        (1.0, [1, 0, 0]),
        (1.5, [1, 0.5, 0]),
        # (1 - cos(pi / 4)) / 2 = 0.1464
        (2.25, [1, 1, 0.5 - 0.5 * math.sqrt(0.5)]),
        (3.0, [1, 1, 1]),
        (9.0, [1, 1, 1]),
    ],
)
def test_window_opens_octave_by_octave(active: float, expected: list[float]) -> None:
    encoded = encode_frequency(torch.tensor([[0.37]]), 3, active)
    assert octave_sizes(encoded) == pytest.approx(expected, abs=1e-6)
    assert encoded[0, 0] == torch.tensor(0.37)


def test_all_octaves_are_open_by_default() -> None:
    inputs = torch.randn(3, 2)
    torch.testing.assert_close(encode_frequency(inputs, 4), encode_frequency(inputs, 4, 4.0))


def test_empty() -> None:
    assert encode_frequency(torch.zeros(0, 3), 4).shape == (0, 27)


def test_gradient() -> None:
    inputs = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: encode_frequency(x, 3, 2.5), inputs)
    torch.autograd.gradgradcheck(lambda x: encode_frequency(x, 3, 2.5), inputs)
