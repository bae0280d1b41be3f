"""Frequency encoding of NeRF (Mildenhall et al. 2020, equation 4), without its factor pi, as in NeuS."""

import torch
from jaxtyping import Float
from torch import Tensor


def frequency_width(channels: int, num_frequencies: int) -> int:
    """Width of :func:`encode_frequency`'s result.

    >>> frequency_width(3, 6)
    39
    """
    return channels * (1 + 2 * num_frequencies)


def encode_frequency(
    inputs: Float[Tensor, "P C"], num_frequencies: int, active_frequencies: float | None = None
) -> Float[Tensor, "P W"]:
    """Concatenate the inputs with sin(2^k x) and cos(2^k x) for k = 0 .. num_frequencies - 1.

    Args:
        inputs: any range; the scene's positions lie in [-1, 1].
        num_frequencies: octaves; 0 returns the inputs as they are.
        active_frequencies: octaves in use, coarse to fine: octave k is multiplied by
            (1 - cos(pi * clip(a - k, 0, 1))) / 2 (BARF, Lin et al. 2021, equation 14). ``None`` uses all.

    Returns:
        ``(P, C * (1 + 2 * num_frequencies))``: the inputs, then per octave C sines and C cosines.
    """
    encoded = [inputs]
    for octave in range(num_frequencies):
        angles = inputs * 2.0**octave
        window = 1.0
        if active_frequencies is not None:
            share = min(max(active_frequencies - octave, 0.0), 1.0)
            window = 0.5 * (1.0 - float(torch.cos(torch.tensor(torch.pi * share))))
        encoded += [window * angles.sin(), window * angles.cos()]
    return torch.cat(encoded, dim=1)
