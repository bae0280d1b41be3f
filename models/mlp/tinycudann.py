"""ReLU networks of tiny-cuda-nn (https://github.com/NVlabs/tiny-cuda-nn): half precision, no biases.

The library keeps a network's parameters in one vector of its own, so this is a module to build instead of a
function of weights, and a checkpoint made with it can only be read with it.
"""

import importlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from utils.errors import BackendError
from utils.padding import zero_padding

_FUSED_WIDTHS = (16, 32, 64, 128)


class Network(nn.Module):
    """Linear layers without biases, with ReLU between them and none after the last.

    Args:
        widths: inputs, units of each hidden layer (all the same), outputs. Hidden layers of 16, 32, 64 or 128
            units run as one kernel (``FullyFusedMLP``), others layer by layer (``CutlassMLP``).

    Raises:
        ValueError: for hidden layers of different widths, which the library does not know.
        BackendError: the library cannot run this network on this GPU.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        num_inputs, *hidden, num_outputs = widths
        if len(set(hidden)) > 1:
            raise ValueError(f"tiny-cuda-nn: hidden layers must be equally wide, got {hidden}")
        width = hidden[0] if hidden else 0
        kind = "FullyFusedMLP" if width in _FUSED_WIDTHS else "CutlassMLP"
        config = {
            "otype": kind,
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": width,
            "n_hidden_layers": len(hidden),
        }
        library = importlib.import_module("tinycudann")
        # Its generator is its own; seeded from PyTorch's, so that a run's seed decides here, too.
        seed = int(torch.randint(2**31 - 1, ()))
        try:
            self.network = library.Network(num_inputs, num_outputs, config, seed=seed)
            self._try_both_ways(num_inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BackendError(
                "model.backend",
                f"tinycudann cannot run its {kind} on this GPU ({error})",
                "use model.backend=cuda",
            ) from error

    def _try_both_ways(self, num_inputs: int) -> None:
        """Run the kernels once: only then does the library find that a GPU has too little shared memory."""
        with torch.enable_grad():
            parameters = list(self.network.parameters())
            rows = torch.zeros(1, num_inputs, device=parameters[0].device)
            torch.autograd.grad(self.network(rows).float().sum(), parameters)

    def forward(
        self, inputs: Float[Tensor, "S I"], count: Int64[Tensor, ""] | None = None
    ) -> Float[Tensor, "S O"]:
        """Outputs in float32; rows from ``count`` on are padding and give zeros."""
        return zero_padding(self.network(zero_padding(inputs, count)).float(), count)
