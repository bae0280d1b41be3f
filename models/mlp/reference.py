"""ReLU networks in plain PyTorch: what a CPU uses, and what the kernels are tested on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.padding import zero_padding


def relu_mlp(
    inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], count: Tensor | None, precision: str
) -> Tensor:
    """See the package's ``relu_mlp``; the products are as precise as the tensors."""
    del precision
    # Padding may hold anything: NaN times a gradient of zero would be NaN in the weights' gradients.
    hidden = zero_padding(inputs, count)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        # In place, because a layer's sums are needed no more.
        hidden = torch.nn.functional.linear(hidden, weight, bias).relu_()
    return zero_padding(torch.nn.functional.linear(hidden, weights[-1], biases[-1]), count)
