"""The fused ReLU networks: which networks they cover, precisions, many programs, compilation for GPUs."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_gradients import assert_no_lost_gradient, assert_same_gradient
from helpers_triton import DEVICE, Kernel, compile_ahead, needs_triton
from torch import Tensor

from models import mlp
from models.mlp import reference, relu_mlp

cuda = pytest.importorskip("models.mlp.cuda", reason="Triton is not installed (pip install triton)")

Layers = tuple[list[Tensor], list[Tensor]]
ABSENT = "constexpr"


def random_layers(widths: list[int]) -> Layers:
    weights = [torch.randn(b, a, device=DEVICE) / a**0.5 for a, b in itertools.pairwise(widths)]
    return weights, [torch.randn(width, device=DEVICE) * 0.3 for width in widths[1:]]


def gradients(
    inputs: Tensor, layers: Layers, d_outputs: Tensor, backend: str, precision: mlp.Precision = "float32"
) -> list[Tensor]:
    weights, biases = ([p.detach().to(inputs.dtype).requires_grad_() for p in group] for group in layers)
    rows = inputs.detach().requires_grad_()
    outputs = relu_mlp(rows, weights, biases, backend, None, precision)
    return [outputs.detach(), *torch.autograd.grad(outputs, [rows, *weights, *biases], d_outputs)]


@pytest.mark.parametrize(
    ("widths", "head", "tail"),
    [
        ([70, 64, 64, 3], 64, 16),
        ([35, 32, 9], 32, 16),
        ([25, 32, 3], 16, 16),
        ([128, 16, 16], 64, 64),
        ([97, 16, 16], 64, 64),
        ([96, 16, 16], 64, 32),
        ([64, 16, 1], 64, 0),
        ([31, 16, 1], 16, 16),
        ([3, 16, 16, 16, 1], 16, 0),
    ],
)
def test_inputs_are_split_to_fit(widths: list[int], head: int, tail: int) -> None:
    sizes = cuda.kernel_sizes(widths[0], widths[1:-1], widths[-1])
    assert (sizes["HEAD"], sizes["TAIL"]) == (head, tail)
    assert sizes["INPUTS"] == widths[0]
    assert sizes["LAYERS"] == len(widths) - 2


@pytest.mark.parametrize(
    "widths",
    [[129, 16, 3], [8, 3], [8, 16, 16, 16, 16, 3], [8, 16, 32, 3], [8, 48, 3], [8, 128, 3], [8, 16, 17]],
    ids=str,
)
def test_other_networks_are_the_references(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.kernel_sizes(widths[0], widths[1:-1], widths[-1]) is None
    called = []
    original = reference.relu_mlp
    monkeypatch.setattr(reference, "relu_mlp", lambda *given: called.append(given) or original(*given))
    count = torch.tensor(3, device=DEVICE)
    outputs = relu_mlp(torch.randn(5, widths[0], device=DEVICE), *random_layers(widths), "cuda", count)
    assert len(called) == 1
    assert not outputs[3:].any()


def is_clear_of_kinks(inputs: Tensor, layers: Layers, margin: float) -> Tensor:
    """Rows where rounding does not decide on which side of a ReLU's kink a unit is."""
    hidden, is_clear = inputs.double(), torch.ones(len(inputs), dtype=torch.bool, device=DEVICE)
    for weight, bias in zip(layers[0][:-1], layers[1][:-1], strict=True):
        sums = torch.nn.functional.linear(hidden, weight.double(), bias.double())
        is_clear &= (sums.abs() > margin).all(dim=1)
        hidden = sums.relu()
    return is_clear


@pytest.mark.parametrize(("precision", "rounding"), [("tf32", 2.0**-10), ("bfloat16", 2.0**-8)])
def test_lower_precisions(precision: mlp.Precision, rounding: float) -> None:
    inputs, layers = torch.randn(300, 35, device=DEVICE), random_layers([35, 32, 32, 9])
    is_clear = is_clear_of_kinks(inputs, layers, margin=8 * rounding)
    assert is_clear.sum() > 30
    d_outputs = torch.randn(300, 9, device=DEVICE) * is_clear[:, None]
    found = gradients(inputs, layers, d_outputs, "cuda", precision)
    expected = gradients(inputs.double(), layers, d_outputs.double(), "reference")
    for actual, exact in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_no_lost_gradient(actual, exact)
        # Three layers forward and three backward, each of which rounds both factors.
        assert (actual - exact).norm() <= 6 * rounding * exact.norm()
    if precision == "bfloat16":
        assert (found[0] - expected[0]).norm() > 0.1 * rounding * expected[0].norm()


def test_sums_of_several_programs_and_blocks() -> None:
    # Blocks of 64 rows: two programs (in the interpreter) of several blocks each, the last one partly filled.
    inputs, layers = torch.randn(5 * cuda.ROWS + 3, 20, device=DEVICE), random_layers([20, 16, 16, 16, 5])
    d_outputs = torch.randn(len(inputs), 5, device=DEVICE)
    found = gradients(inputs, layers, d_outputs, "cuda")
    expected = gradients(inputs.double(), layers, d_outputs.double(), "reference")
    for actual, exact in zip(found, expected, strict=True):
        assert_same_gradient(actual, exact, tolerance=1e-5)
    again = gradients(inputs, layers, d_outputs, "cuda")
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))


def test_everything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poisoned(self: Tensor, *shape: int, **options: object) -> Tensor:
        tensor = new_empty(self, *shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(float("nan")))
    rows = 3 * cuda.ROWS + 5
    inputs = torch.randn(rows, 40, device=DEVICE, requires_grad=True)
    for widths in ([40, 16, 5], [40, 16, 16, 16, 16]):
        weights, biases = ([p.requires_grad_() for p in group] for group in random_layers(widths))
        for count in (None, 0, 65, rows):
            real = None if count is None else torch.tensor(count, device=DEVICE)
            outputs = relu_mlp(inputs, weights, biases, "cuda", real)
            found = torch.autograd.grad(outputs.sum(), [inputs, *weights, *biases])
            assert all(tensor.isfinite().all() for tensor in (outputs, *found))


def test_strided_tensors() -> None:
    (weights, biases), wide = random_layers([20, 16, 5]), torch.randn(30, 45, device=DEVICE)
    weights = [weight.t().contiguous().t() for weight in weights]
    assert not any(weight.is_contiguous() for weight in weights)
    # And a gradient that is one number, expanded.
    found, expected = (
        gradients(
            wide[:, 3:43:2].to(dtype),
            (weights, biases),
            torch.ones((), dtype=dtype, device=DEVICE).expand(30, 5),
            backend,
        )
        for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64))
    )
    for actual, exact in zip(found, expected, strict=True):
        assert_same_gradient(actual, exact, tolerance=1e-5)


def test_only_what_is_asked_for() -> None:
    inputs, (weights, biases) = torch.randn(10, 20, device=DEVICE), random_layers([20, 16, 5])
    for tensor in (*weights, *biases):
        tensor.requires_grad_()
    outputs = relu_mlp(inputs, weights, biases, "cuda", None, "float32")
    found = torch.autograd.grad(outputs.sum(), [*weights, *biases])
    expected = gradients(inputs, (weights, biases), torch.ones_like(outputs), "reference")[2:]
    for actual, exact in zip(found, expected, strict=True):
        assert_same_gradient(actual, exact, tolerance=1e-5)
    with torch.no_grad():
        assert not relu_mlp(inputs, weights, biases, "cuda").requires_grad


def test_differentiable_once() -> None:
    inputs = torch.randn(4, 20, device=DEVICE, requires_grad=True)
    outputs = relu_mlp(inputs, *random_layers([20, 16, 5]), "cuda")
    d_outputs = torch.ones_like(outputs, requires_grad=True)
    (slope,) = torch.autograd.grad(outputs, inputs, d_outputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def kernels(widths: list[int], precision: str = "tf32", padded: bool = True) -> list[Kernel]:
    """Both kernels as they are launched."""
    constants = {
        **cuda.kernel_sizes(widths[0], widths[1:-1], widths[-1]),
        "ROWS": cuda.ROWS,
        "PRECISION": precision,
    }
    count = "*i64" if padded else ABSENT
    given = {"inputs": "*fp32", "parameters": "*fp32"}
    forward = {**given, "outputs": "*fp32", "count": count, "num_rows": "i32"}
    backward = {**given, "d_outputs": "*fp32", "d_inputs": "*fp32", "d_parameters": "*fp32"}
    backward |= {"count": count, "num_rows": "i32"}
    absent = {} if padded else {"count": None}
    return [
        Kernel(
            "models.mlp.cuda",
            name,
            signature | dict.fromkeys(constants, ABSENT),
            constants | absent,
            cuda.NUM_WARPS,
        )
        for name, signature in (("forward_kernel", forward), ("backward_kernel", backward))
    ]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_fit(capability: int) -> None:
    wanted = [
        *kernels([70, 64, 64, 3]),
        *kernels([35, 32, 9]),
        *kernels([25, 32, 3], "bfloat16", padded=False),
    ]
    # Sums of 64 x 80 and 64 x 64 numbers leave the widest network's backward pass short of registers; what it
    # puts aside comes from the cache. (Before Hopper a matrix product takes both its factors from registers.)
    allowed = {90: 100, 80: 320}[capability]
    for kernel, result in zip(wanted, compile_ahead(wanted, capability), strict=True):
        assert result["error"] == "", (kernel, result["error"])
        is_wide = kernel.name == "backward_kernel" and kernel.constants["HIDDEN"] == 64
        assert int(result["spilled"]) <= (allowed if is_wide else 0), (kernel, result)
        # Three programs of 128 threads share a multiprocessor's 65536 registers; two always do.
        if capability == 90 and kernel.name == "forward_kernel":
            assert int(result["registers"]) <= 168, (kernel, result)


def test_the_package_does_not_import_them() -> None:
    program = "import sys, models.mlp; assert not {'models.mlp.cuda', 'tinycudann'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_step_can_be_recorded() -> None:
    layers, count = random_layers([70, 64, 64, 3]), torch.tensor(200, device=DEVICE)
    weights, biases = ([p.requires_grad_() for p in group] for group in layers)
    inputs = torch.randn(1000, 70, device=DEVICE, requires_grad=True)
    wanted = [inputs, *weights, *biases]

    def step() -> tuple[Tensor, ...]:
        outputs = relu_mlp(inputs, weights, biases, "cuda", count, "float32")
        return torch.autograd.grad(outputs.square().sum(), wanted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step()
    for real in (200, 0, 1000):
        count.fill_(real)
        graph.replay()
        outputs = relu_mlp(inputs, weights, biases, "reference", count)
        expected = torch.autograd.grad(outputs.square().sum(), wanted)
        for actual, exact in zip(recorded, expected, strict=True):
            assert_same_gradient(actual, exact, tolerance=1e-4)
