"""Small networks of linear layers with ReLU between them: colours, densities.

``reference.py`` is plain PyTorch, which a CPU uses, too; ``cuda.py`` has one Triton kernel for all layers in
each direction. ``tinycudann.py`` wraps a library that owns its parameters: it is a module to build, not a
function.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from utils.backend import available_anywhere, available_on_cpu, available_on_gpu, implementation

Precision = Literal["float32", "tf32", "bfloat16"]
"""What the factors of a matrix product are rounded to on a GPU; sums are float32 always."""

IMPLEMENTATIONS = {
    "cpu": available_on_cpu,
    "cuda": functools.partial(available_on_gpu, least=(8, 0)),
    "reference": available_anywhere,
}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""


def _available_tinycudann(device: torch.device) -> str | None:
    from encoder import hashgrid  # the same library: one check serves both

    return hashgrid.OPTIONAL["tinycudann"](device)


OPTIONAL = {"tinycudann": _available_tinycudann}
"""The same for optional libraries, which serve only whoever names them."""

_MODULES = {"cpu": "reference", "cuda": "cuda", "reference": "reference"}


def relu_mlp(
    inputs: Float[Tensor, "S I"],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    backend: str,
    count: Int64[Tensor, ""] | None = None,
    precision: Precision = "tf32",
) -> Float[Tensor, "S O"]:
    """Evaluate linear layers with ReLU between them and none after the last.

    Args:
        inputs: one row per sample.
        weights, biases: of the layers, first to last, ``(out, in)`` and ``(out,)``.
        backend: a key of :data:`IMPLEMENTATIONS`. The reference (which is also the CPU's) is differentiable
            any number of times, in any dtype; the CUDA version once. Networks that its kernels do not cover
            go to the reference: in other dtypes than float32, with no or more than 3 hidden layers, with
            hidden widths that differ or are not 16, 32 or 64, with more than 128 inputs or 16 outputs.
        count: rows from here on are padding, on the inputs' device; ``None``: there is none. Padding gives
            zeros, its gradient is zero and it has no part in the parameters' gradients, whatever it holds.
        precision: of the CUDA version's matrix products. ``tf32`` and ``bfloat16`` round the factors to 10
            and 7 bits; ``float32`` costs three times the arithmetic of ``tf32``.

    Returns:
        The last layer's outputs. One layer [[2, -1]] with bias [0.5] gives 2.5 for the input (2, 2).

    Raises:
        ValueError: for an unknown backend or precision, or layers that do not fit one another or the inputs.
    """
    if backend not in _MODULES:
        raise ValueError(f"ReLU network: backend must be one of {sorted(_MODULES)}, got {backend!r}")
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"ReLU network: precision must be float32, tf32 or bfloat16, got {precision!r}")
    width = inputs.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.shape != (len(bias), width):
            raise ValueError(
                f"ReLU network: weight {layer} must be {(len(bias), width)}, got {tuple(weight.shape)}"
            )
        width = len(bias)
    module = implementation("models.mlp", _MODULES[backend])
    return module.relu_mlp(inputs, weights, biases, count, precision)
