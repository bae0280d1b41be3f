"""ReLU networks: by hand, all gradients against float64, padding, and what happens to NaN."""

import importlib.machinery
import itertools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from helpers_gradients import assert_same_gradient
from helpers_triton import DEVICE, needs_triton
from torch import Tensor, nn

from encoder import hashgrid
from models import mlp
from models.fields import ReLUNetwork, make_network
from models.mlp import relu_mlp
from utils.backend import resolve_backend
from utils.errors import BackendError

Layers = tuple[list[Tensor], list[Tensor]]


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "cuda" else torch.device("cpu")


def random_layers(widths: list[int]) -> Layers:
    weights = [torch.randn(b, a) / a**0.5 for a, b in itertools.pairwise(widths)]
    return weights, [torch.randn(width) * 0.3 for width in widths[1:]]


def derivatives(
    inputs: Tensor,
    layers: Layers,
    backend: str,
    dtype: torch.dtype,
    count: int | None = None,
    precision: mlp.Precision = "float32",
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random function of them in the inputs and in every parameter."""
    device = device_of(backend)
    weights, biases = ([p.to(device, dtype).requires_grad_() for p in group] for group in layers)
    rows = inputs.to(device, dtype).requires_grad_()
    real = None if count is None else torch.tensor(count, device=device)
    outputs = relu_mlp(rows, weights, biases, backend, real, precision)
    d_outputs = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(outputs, [rows, *weights, *biases], d_outputs.to(device, dtype))
    names = [f"{kind} {layer}" for kind in ("weight", "bias") for layer in range(len(weights))]
    found = {"outputs": outputs.detach(), "inputs": gradients[0]}
    return {
        name: value.cpu() for name, value in (found | dict(zip(names, gradients[1:], strict=True))).items()
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert_same_gradient(actual[name], value, tolerance)


def test_by_hand(backend: str) -> None:
    # Hidden units relu(x - y + 1) and relu(-x): at (2, 1) they are 2 and 0, at (-1, 3) 0 and 1.
    weights = [torch.tensor([[1.0, -1.0], [-1.0, 0.0]]), torch.tensor([[3.0, 5.0]])]
    biases = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5])]
    inputs = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    # As wide as the kernels take it: units of weight zero change nothing.
    weights = [nn.functional.pad(weights[0], (0, 0, 0, 14)), nn.functional.pad(weights[1], (0, 14))]
    biases[0] = nn.functional.pad(biases[0], (0, 14))
    device = device_of(backend)
    there = inputs.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases]
    torch.testing.assert_close(relu_mlp(*there, backend).cpu(), torch.tensor([[5.5], [4.5]]))


def test_one_layer_is_linear(backend: str) -> None:
    device = device_of(backend)
    weight, bias = torch.tensor([[2.0, -1.0]], device=device), torch.tensor([0.5], device=device)
    outputs = relu_mlp(torch.tensor([[2.0, 2.0]], device=device), [weight], [bias], backend)
    assert outputs.item() == 2.5


def test_reference_equals_a_loop() -> None:
    inputs, (weights, biases) = torch.randn(4, 5), random_layers([5, 7, 6, 2])
    for row, actual in zip(inputs, relu_mlp(inputs, weights, biases, "reference"), strict=True):
        values = row.tolist()
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            sums = [
                sum(w * v for w, v in zip(line, values, strict=True)) + b
                for line, b in zip(weight.tolist(), bias.tolist(), strict=True)
            ]
            values = [max(s, 0.0) for s in sums] if layer < 2 else sums
        torch.testing.assert_close(actual, torch.tensor(values))


def test_reference_is_differentiable_twice() -> None:
    weights, biases = ([p.double().requires_grad_() for p in g] for g in random_layers([3, 5, 2]))
    inputs = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def network(*tensors: Tensor) -> Tensor:
        return relu_mlp(tensors[0], tensors[1:3], tensors[3:], "reference", torch.tensor(2))

    assert torch.autograd.gradcheck(network, (inputs, *weights, *biases))
    assert torch.autograd.gradgradcheck(network, (inputs, *weights, *biases))


WIDTHS = [
    [70, 64, 64, 3],
    [35, 32, 9],
    [25, 32, 3],
    [3, 16, 16, 16, 16],
    [128, 16, 1],
    [33, 64, 64, 64, 4],
    [16, 16, 16],
]
"""One to three hidden layers; inputs that fill their tiles and such that do not."""


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_values_and_all_gradients(widths: list[int], backend: str) -> None:
    inputs, layers = torch.randn(33, widths[0]), random_layers(widths)
    expected = derivatives(inputs, layers, "reference", torch.float64)
    assert_close(derivatives(inputs, layers, backend, torch.float32), expected)


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_any_number_of_rows(rows: int, backend: str) -> None:
    inputs, layers = torch.randn(rows, 20), random_layers([20, 16, 16, 5])
    expected = derivatives(inputs, layers, "reference", torch.float64)
    actual = derivatives(inputs, layers, backend, torch.float32)
    assert actual["outputs"].shape == (rows, 5)
    assert_close(actual, expected)


@pytest.mark.parametrize("count", [0, 1, 64, 70, 129, 150])
def test_padding_is_zero_and_has_no_part(count: int, backend: str) -> None:
    inputs, layers = torch.randn(150, 20), random_layers([20, 16, 16, 5])
    padded = inputs.clone()
    padded[count:] = float("nan")
    actual = derivatives(padded, layers, backend, torch.float32, count)
    assert not actual["outputs"][count:].any()
    assert not actual["inputs"][count:].any()
    expected = derivatives(inputs, layers, "reference", torch.float64, count)
    assert_close(actual, expected)
    alone = relu_mlp(inputs[:count], *layers, "reference")
    torch.testing.assert_close(actual["outputs"][:count], alone, atol=1e-5, rtol=1e-5)


def test_dead_units_get_no_gradient(backend: str) -> None:
    inputs, layers = torch.randn(50, 20), random_layers([20, 16, 16, 5])
    layers[1][0][3], layers[1][1][[0, 7]] = -100.0, -100.0
    expected = derivatives(inputs, layers, "reference", torch.float64)
    actual = derivatives(inputs, layers, backend, torch.float32)
    assert_close(actual, expected)
    assert not actual["weight 0"][3].any()
    assert not actual["bias 1"][[0, 7]].any()
    assert not actual["weight 2"][:, [0, 7]].any()
    assert actual["weight 1"][[1, 2]].any()


def test_nan_is_passed_on(backend: str) -> None:
    inputs, (weights, biases) = torch.randn(5, 20), random_layers([20, 16, 5])
    inputs[2, 4] = float("nan")
    device = device_of(backend)
    there = inputs.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases]
    outputs = relu_mlp(*there, backend)
    assert outputs[2].isnan().all()
    assert outputs[[0, 1, 3, 4]].isfinite().all()


def test_other_dtypes_and_widths_work_everywhere(backend: str) -> None:
    device = device_of(backend)
    for widths, dtype in (([20, 16, 5], torch.float64), ([20, 24, 12, 17], torch.float32)):
        inputs = torch.randn(6, 20, dtype=dtype)
        weights, biases = ([p.to(dtype) for p in group] for group in random_layers(widths))
        expected = relu_mlp(inputs, weights, biases, "reference")
        there = inputs.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases]
        outputs = relu_mlp(*there, backend)
        assert outputs.dtype == dtype
        torch.testing.assert_close(outputs.cpu(), expected)


def test_callers_mistakes() -> None:
    inputs, (weights, biases) = torch.zeros(2, 3), random_layers([3, 4, 2])
    with pytest.raises(ValueError, match=r"backend must be one of \['cpu', 'cuda', 'reference'\], got 'tpu'"):
        relu_mlp(inputs, weights, biases, "tpu")
    with pytest.raises(ValueError, match=r"weight 0 must be \(4, 5\), got \(4, 3\)"):
        relu_mlp(torch.zeros(2, 5), weights, biases, "reference")
    with pytest.raises(ValueError, match=r"weight 1 must be \(2, 4\), got \(4, 3\)"):
        relu_mlp(inputs, [weights[0], weights[0]], biases, "reference")


def test_a_cpu_takes_pytorch() -> None:
    checks = {
        name: (lambda check=check: check(torch.device("cpu"))) for name, check in mlp.IMPLEMENTATIONS.items()
    }
    assert resolve_backend("network", "auto", checks, torch.device("cpu"))[0] == "cpu"


@needs_triton
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = mlp.IMPLEMENTATIONS["cuda"](torch.device("cuda"))
    assert reason == "this GPU has compute capability 7.5, the kernels need 8.0: use backend reference"


# ---- tiny-cuda-nn, played by a stand-in: the library needs a GPU of its own --------------------------------


class Network(nn.Module):
    """With the signature of ``tinycudann.Network``: no biases, one vector of parameters, half precision."""

    def __init__(
        self, n_input_dims: int, n_output_dims: int, network_config: dict[str, object], seed: int = 1337
    ) -> None:
        super().__init__()
        assert network_config["activation"] == "ReLU"
        assert network_config["output_activation"] == "None"
        self.kind = network_config["otype"]
        self.seed = seed
        depth, width = network_config["n_hidden_layers"], network_config["n_neurons"]
        assert isinstance(depth, int)
        assert isinstance(width, int)
        self.widths = [n_input_dims, *[width] * depth, n_output_dims]
        self.sizes = [a * b for a, b in itertools.pairwise(self.widths)]
        draw = torch.Generator().manual_seed(seed)
        self.params = nn.Parameter(torch.randn(sum(self.sizes), generator=draw) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        shapes = [(b, a) for a, b in itertools.pairwise(self.widths)]
        weights = [p.view(shape) for p, shape in zip(self.params.split(self.sizes), shapes, strict=True)]
        return relu_mlp(x, weights, [torch.zeros(len(w)) for w in weights], "reference").half()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], None]:
    def install(network: type[nn.Module]) -> None:
        module = ModuleType("tinycudann")
        module.__spec__ = importlib.machinery.ModuleSpec("tinycudann", None)
        module.Network = network  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tinycudann", module)

    return install


def test_tinycudann_owns_its_parameters(library: Callable[[type[nn.Module]], None]) -> None:
    library(Network)
    network = make_network([20, 32, 32, 5], "tinycudann")
    assert [tuple(p.shape) for p in network.parameters()] == [(20 * 32 + 32 * 32 + 32 * 5,)]
    assert all(p.grad is None for p in network.parameters())
    inputs = torch.randn(10, 20)
    inputs[7:] = float("nan")
    outputs = network(inputs, torch.tensor(7))
    assert outputs.dtype == torch.float32
    assert outputs[:7].any(dim=1).all()
    assert not outputs[7:].any()
    (gradient,) = torch.autograd.grad(outputs.sum(), list(network.parameters()))
    assert gradient.isfinite().all()
    assert gradient.any()
    # A network of ours is another module.
    assert isinstance(make_network([20, 32, 5], "cuda"), ReLUNetwork)


def test_tinycudann_draws_from_the_runs_seed(library: Callable[[type[nn.Module]], None]) -> None:
    library(Network)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds += [make_network([3, 16, 2], "tinycudann").network.seed for _ in range(2)]  # type: ignore[union-attr]
    assert seeds[:2] == seeds[2:4]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("widths", "kind"),
    [([3, 64, 64, 2], "FullyFusedMLP"), ([3, 128, 2], "FullyFusedMLP"), ([3, 48, 2], "CutlassMLP")],
)
def test_tinycudann_fuses_what_it_can(
    library: Callable[[type[nn.Module]], None], widths: list[int], kind: str
) -> None:
    library(Network)
    assert make_network(widths, "tinycudann").network.kind == kind  # type: ignore[union-attr]


def test_tinycudann_knows_one_width(library: Callable[[type[nn.Module]], None]) -> None:
    library(Network)
    with pytest.raises(ValueError, match=r"hidden layers must be equally wide, got \[32, 16\]"):
        make_network([3, 32, 16, 2], "tinycudann")


def test_tinycudanns_refusal_names_the_remedy(library: Callable[[type[nn.Module]], None]) -> None:
    class Refusing(Network):
        """Like the library finds only when it runs that shared memory does not suffice."""

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("FullyFusedMLP: insufficient shared memory\navailable on the GPU.")

    library(Refusing)
    with pytest.raises(BackendError) as caught:
        make_network([3, 64, 2], "tinycudann")
    assert str(caught.value) == (
        "model.backend: tinycudann cannot run its FullyFusedMLP on this GPU (FullyFusedMLP: insufficient "
        "shared memory available on the GPU.); use model.backend=cuda"
    )


def test_tinycudann_without_memory_is_not_blamed(library: Callable[[type[nn.Module]], None]) -> None:
    class Large(Network):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    library(Large)
    with pytest.raises(torch.OutOfMemoryError):
        make_network([3, 64, 2], "tinycudann")


def test_one_check_for_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hashgrid.OPTIONAL, "tinycudann", lambda device: f"not on {device}")
    assert mlp.OPTIONAL["tinycudann"](torch.device("cpu")) == "not on cpu"
    assert "tinycudann" not in mlp.IMPLEMENTATIONS
