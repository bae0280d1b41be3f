"""Adam without a host: against PyTorch's, nothing changed by a bad step, checkpoints in both directions."""

import copy
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_triton import DEVICE, Kernel, compile_ahead, needs_triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from systems.adam import Adam, all_finite, clip_norm, reference
from utils.backend import implementation
from utils.errors import BackendError

BETAS, EPS = (0.9, 0.99), 1e-15
# One element, fewer than a block, rows of 1, 2 and 4 elements, several blocks with a part of one at the end.
SHAPES = ((), (3,), (7, 2), (64, 16), (1255, 2), (2049,))
YES, NO = torch.tensor(True, device=DEVICE), torch.tensor(False, device=DEVICE)


@pytest.fixture(params=["reference", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def new_parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]


def gradients_of(parameters: list[nn.Parameter], seed: int) -> list[Tensor]:
    """Of sizes from 1e-12 to 1e3, as those of rows of a hash table are."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(parameter: Tensor) -> Tensor:
        exponent = 15.0 * torch.rand(parameter.shape, generator=generator) - 12.0
        return (torch.randn(parameter.shape, generator=generator) * 10**exponent).to(DEVICE)

    return [draw(parameter) for parameter in parameters]


def set_gradients(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all that an optimiser changes."""
    return [
        tensor.detach().clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *optimizer.state[parameter].values())
    ]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_one_step_by_hand(backend: str) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 5.0], device=DEVICE))
    optimizer = Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1.0, backend=backend)
    parameter.grad = torch.tensor([2.0, -6.0, 0.0], device=DEVICE)
    optimizer.step(YES)
    # m = 0.1 g and v = 0.01 g^2, which their corrections undo: a step of lr g / (|g| + 1).
    expected = torch.tensor([1.0 - 0.2 / 3, -2.0 + 0.6 / 7, 5.0], device=DEVICE)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
    state = optimizer.state[parameter]
    assert float(state["step"]) == 1.0
    torch.testing.assert_close(state["exp_avg"].cpu(), torch.tensor([0.2, -0.6, 0.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"].cpu(), torch.tensor([0.04, 0.36, 0.0]), rtol=1e-6, atol=0)


def test_many_steps_are_those_of_pytorch(backend: str) -> None:
    ours, theirs = new_parameters(), new_parameters()
    rate = torch.tensor(0.0, device=DEVICE)
    groups = [{"params": ours[:3], "lr": rate}, {"params": ours[3:], "lr": 0.02}]
    optimizer = Adam(groups, betas=BETAS, eps=EPS, backend=backend)
    # In float64: whatever differs is rounding of ours.
    exact = [nn.Parameter(parameter.detach().double()) for parameter in theirs]
    judge = torch.optim.Adam([{"params": exact[:3]}, {"params": exact[3:], "lr": 0.02}], betas=BETAS, eps=EPS)
    start = values(optimizer)
    for step in range(30):
        gradients = gradients_of(ours, step)
        set_gradients(ours, gradients)
        set_gradients(exact, [gradient.double() for gradient in gradients])
        rate.fill_(0.01 * (1 + step % 3))
        judge.param_groups[0]["lr"] = float(rate)
        optimizer.step(YES)
        judge.step()
    expected = values(judge)
    for kind, row in enumerate(("parameter", "step", "exp_avg", "exp_avg_sq")):
        for old, new, wanted in zip(
            start[kind::4], values(optimizer)[kind::4], expected[kind::4], strict=True
        ):
            if row == "parameter":
                # Thirty steps, each rounded to 6e-8 of a parameter of size 1 and of its own size.
                torch.testing.assert_close(new - old, (wanted - old).float(), rtol=1e-5, atol=3e-6, msg=row)
            else:
                # Terms of m cancel: to a millionth of the largest gradients that went into it.
                scale = 1e-6 * float(wanted.abs().max()) if row == "exp_avg" else 0.0
                torch.testing.assert_close(new, wanted.float(), rtol=3e-6, atol=scale, msg=row)


@pytest.mark.parametrize("decay", [1e-4, 0.3])
def test_weight_decay_is_that_of_adamw(backend: str, decay: float) -> None:
    """Of one group, the other has none; PyTorch's in float64, which splits its update otherwise."""
    ours = new_parameters()
    exact = [nn.Parameter(parameter.detach().double()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    rate = torch.tensor(0.02, device=DEVICE)
    groups = [{"params": ours[:3], "lr": rate, "weight_decay": decay}, {"params": ours[3:], "lr": 0.02}]
    optimizer = Adam(groups, betas=BETAS, eps=EPS, backend=backend)
    judge_groups = [{"params": exact[:3], "weight_decay": decay}, {"params": exact[3:], "weight_decay": 0.0}]
    judge = torch.optim.AdamW(judge_groups, lr=0.02, betas=BETAS, eps=EPS)
    for step in range(20):
        gradients = gradients_of(ours, step)
        set_gradients(ours, gradients)
        set_gradients(exact, [gradient.double() for gradient in gradients])
        optimizer.step(YES)
        judge.step()
    for old, new, wanted in zip(start, ours, exact, strict=True):
        change = (wanted - old).detach().float()
        torch.testing.assert_close((new - old).detach(), change, rtol=1e-5, atol=3e-6)


def test_weight_decay_by_hand(backend: str) -> None:
    """Twenty per cent of a tenth; what no gradient reaches decays, unless it is to be left alone."""
    for skips, second in ((False, 4.0 * 0.98), (True, 4.0)):
        parameter = nn.Parameter(torch.tensor([5.0, 4.0], device=DEVICE))
        optimizer = Adam(
            *([parameter], 0.1, BETAS, 1e-15),
            weight_decay=0.2,
            skip_untouched=skips,
            backend=backend,
        )
        parameter.grad = torch.tensor([3.0, 0.0], device=DEVICE)
        optimizer.step(NO)
        assert parameter.tolist() == [5.0, 4.0]
        optimizer.step(YES)
        assert parameter.tolist() == pytest.approx([5.0 * 0.98 - 0.1, second], rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 100, 999, 20000])
def test_corrections_hold_from_the_first_step_to_the_last(backend: str, count: int) -> None:
    """With means that a constant gradient leaves as they are, a step's size is that of the corrections."""
    parameter = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = Adam([parameter], lr=1.0, betas=BETAS, eps=EPS, backend=backend)
    state = optimizer.state[parameter]
    state["step"].fill_(count)
    state["exp_avg"].fill_(2.0)
    state["exp_avg_sq"].fill_(4.0)
    parameter.grad = torch.full((4,), 2.0, device=DEVICE)
    optimizer.step(YES)
    assert float(state["step"]) == count + 1
    expected = -math.sqrt(1 - 0.99 ** (count + 1)) / (1 - 0.9 ** (count + 1))
    assert parameter.tolist() == pytest.approx([expected] * 4, rel=5e-7)


@pytest.mark.parametrize("skip_untouched", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(backend: str, skip_untouched: bool) -> None:
    parameters = new_parameters()
    optimizer = Adam(parameters, 0.1, BETAS, EPS, skip_untouched=skip_untouched, backend=backend)
    set_gradients(parameters, gradients_of(parameters, 0))
    optimizer.step(YES)
    before = values(optimizer)
    set_gradients(parameters, gradients_of(parameters, 1))
    for gradient in (float("nan"), float("inf"), 1.0):
        parameters[3].grad = torch.full((64, 16), gradient, device=DEVICE)
        optimizer.step(NO)
        assert_same(values(optimizer), before)
    optimizer.step(YES)
    after = values(optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert [float(count) for count in after[1::4]] == [2.0] * len(SHAPES)


def test_untouched_elements_are_left_alone(backend: str) -> None:
    parameter, dense = new_parameters(((3000, 2),)), new_parameters(((3000, 2),))
    optimizer = Adam(parameter, 0.1, BETAS, EPS, skip_untouched=True, backend=backend)
    full = Adam(dense, 0.1, BETAS, EPS, backend=backend)
    for one in (parameter, dense):
        set_gradients(one, gradients_of(one, 0))
    optimizer.step(YES)
    full.step(YES)
    assert_same(values(optimizer), values(full))
    before = values(optimizer)
    # Alone in its row of four; two of a row; a block without any; a whole block; -0 is no gradient, either.
    touched = torch.zeros(6000, dtype=torch.bool, device=DEVICE)
    touched[[5, 12, 14, 5999]] = True
    touched[2048:3072] = True
    gradient = gradients_of(parameter, 1)[0].flatten()
    gradient = torch.where(touched, gradient, 0.0)
    gradient[100:200] = -0.0
    for one in (parameter, dense):
        set_gradients(one, [gradient.view(3000, 2)])
    optimizer.step(YES)
    full.step(YES)
    after, decayed = values(optimizer), values(full)
    for index in (0, 2, 3):
        old, new, all_new = (tensors[index].flatten() for tensors in (before, after, decayed))
        assert torch.equal(new[~touched], old[~touched])
        assert torch.equal(new[touched], all_new[touched])
        assert (new[touched] != old[touched]).all()
        assert (all_new[~touched] != old[~touched]).any()
    assert float(after[1]) == 2.0


def test_parameters_without_a_gradient_are_skipped(backend: str) -> None:
    parameters = new_parameters()
    optimizer = Adam(parameters, 0.1, BETAS, EPS, backend=backend)
    before = values(optimizer)
    optimizer.step(YES)
    assert_same(values(optimizer), before)
    parameters[2].grad = gradients_of(parameters, 0)[2]
    optimizer.step(YES)
    after = values(optimizer)
    assert_same([*after[:8], *after[12:]], [*before[:8], *before[12:]])
    assert not torch.equal(after[8], before[8])
    # Now all; the one is a step ahead, in its corrections, too.
    set_gradients(parameters, gradients_of(parameters, 1))
    optimizer.step(YES)
    assert [float(count) for count in values(optimizer)[1::4]] == [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("skip_untouched", [False, True])
def test_nothing_is_written_beyond_the_end(backend: str, skip_untouched: bool) -> None:
    for count in (1, 6, 1024, 1028):
        buffers = [torch.ones(count + 2048, device=DEVICE) for _ in range(4)]
        parameter, gradient, *means = (buffer[:count] for buffer in buffers)
        implementation("systems.adam", backend).update_(
            *(parameter, gradient, *means),
            lr=0.1,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            corrections=torch.tensor([0.5, 0.5], dtype=torch.float64, device=DEVICE),
            finite=YES,
            skip_untouched=skip_untouched,
        )
        assert (parameter < 1.0).all()
        assert all((buffer[count:] == 1.0).all() for buffer in buffers)


def test_gradients_need_not_be_contiguous(backend: str) -> None:
    plain, strided = new_parameters(((40, 6),)), new_parameters(((40, 6),))
    (gradient,) = gradients_of(plain, 0)
    plain[0].grad, strided[0].grad = gradient, gradient.T.contiguous().T
    for parameters in (plain, strided):
        Adam(parameters, 0.1, BETAS, EPS, backend=backend).step(YES)
    assert not strided[0].grad.is_contiguous()
    assert torch.equal(plain[0], strided[0])


# Checkpoints


def written(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": parameters[:2], "lr": 0.03, "base_lr": 0.03, "name": "networks", "weight_decay": 0.1},
        {"params": parameters[2:], "lr": 0.01, "base_lr": 0.01, "name": "grid", "weight_decay": 0.0},
    ]


def ours_of(parameters: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return Adam(groups_of(parameters), betas=BETAS, eps=EPS, backend=backend)


def theirs_of(parameters: list[nn.Parameter], _: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(parameters), betas=BETAS, eps=EPS, fused=True)


def take(optimizer: torch.optim.Optimizer, seeds: range) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for seed in seeds:
        gradients = gradients_of(parameters, seed)
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            # The second never has a gradient: PyTorch keeps no state of it.
            parameter.grad = None if index == 1 else gradient
        if isinstance(optimizer, Adam):
            optimizer.step(YES)
        else:
            optimizer.step()


@pytest.mark.parametrize(
    ("writer", "reader"), [(theirs_of, ours_of), (ours_of, theirs_of), (ours_of, ours_of)]
)
def test_a_checkpoint_goes_on_with_the_other(
    writer: Callable[..., Any], reader: Callable[..., Any], backend: str
):
    first = new_parameters()
    writing = writer(first, backend)
    take(writing, range(5))
    state = written(writing)
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    reading = reader(second, backend)
    # Whatever was there before is overwritten.
    for parameter in second:
        parameter.grad = torch.ones_like(parameter)
    reading.step(*([YES] if isinstance(reading, Adam) else []))
    for parameter, wanted in zip(second, first, strict=True):
        parameter.data.copy_(wanted.data)
    reading.load_state_dict(state)
    take(writing, range(5, 10))
    take(reading, range(5, 10))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert all(float(tensor.abs().max()) == 0.0 for tensor in reading.state[second[1]].values())
    assert [group["name"] for group in reading.param_groups] == ["networks", "grid"]
    assert [group["fused"] for group in reading.param_groups] == [True, True]
    assert [float(group["lr"]) for group in reading.param_groups] == [0.03, 0.01]
    assert [group["weight_decay"] for group in reading.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("reader", [theirs_of, ours_of])
def test_a_checkpoint_of_adam_goes_on_with_adamw(reader: Callable[..., Any], backend: str) -> None:
    first = new_parameters()
    groups = [group | {"weight_decay": 0.0} for group in groups_of(first)]
    writing = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=True)
    take(writing, range(5))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    reading = reader(second, backend)
    reading.load_state_dict(written(writing))
    take(writing, range(5, 10))
    take(reading, range(5, 10))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert all(group["decoupled_weight_decay"] for group in reading.param_groups)


def test_loading_moves_no_tensor(backend: str) -> None:
    """A recorded step goes on reading and writing where it did."""
    parameters = new_parameters()
    rate = torch.tensor(0.03, device=DEVICE)
    optimizer = ours_of(parameters, backend)
    optimizer.param_groups[0]["lr"] = rate
    take(optimizer, range(3))
    state, after_three = copy.deepcopy(written(optimizer)), values(optimizer)
    assert state["param_groups"][0]["lr"] == pytest.approx(0.03)
    tensors = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    take(optimizer, range(3, 6))
    rate.fill_(1.0)
    optimizer.load_state_dict(state)
    assert [tensor.data_ptr() for entry in optimizer.state.values() for tensor in entry.values()] == addresses
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.03)
    for index, (old, new) in enumerate(zip(after_three, values(optimizer), strict=True)):
        assert torch.equal(old, new) or index % 4 == 0


def test_loaded_betas_count(backend: str) -> None:
    fast, slow = new_parameters(), new_parameters()
    wanted = Adam(fast, 0.1, (0.5, 0.6), EPS, backend=backend)
    other = Adam(slow, 0.1, BETAS, EPS, backend=backend)
    other.load_state_dict(written(wanted))
    for optimizer in (wanted, other):
        take(optimizer, range(3))
    assert_same(values(wanted), values(other))


def test_states_of_others_are_refused(backend: str) -> None:
    optimizer = Adam(new_parameters(((3,), (4, 2))), backend=backend)
    before = values(optimizer)
    for shapes in (((3,),), ((3,), (4, 2), (1,))):
        with pytest.raises(ValueError, match="zip"):
            optimizer.load_state_dict(Adam(new_parameters(shapes), backend=backend).state_dict())
    # A single row could be spread over all of them without anyone noticing.
    with pytest.raises(ValueError, match=r"exp_avg of shape \(1, 2\), expected \(4, 2\)"):
        optimizer.load_state_dict(Adam(new_parameters(((3,), (1, 2))), backend=backend).state_dict())
    decaying = torch.optim.Adam(new_parameters(((3,), (4, 2))), weight_decay=0.1, amsgrad=True)
    with pytest.raises(ValueError, match="with weight_decay within the gradient, amsgrad"):
        optimizer.load_state_dict(decaying.state_dict())
    assert_same(values(optimizer), before)


@pytest.mark.parametrize("parameter", [torch.zeros(3, dtype=torch.float64), torch.zeros(4, 6).T])
def test_other_parameters_are_refused(parameter: Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous, float32"):
        Adam([nn.Parameter(parameter)])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the kernels are first choice")
def test_on_a_cpu_plain_pytorch_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "systems.adam"):
        optimizer = Adam(new_parameters())
    assert "optimizer: backend cpu (first choice on cpu)" in caplog.text
    assert optimizer._update is reference.update_


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(BackendError, match="optimizer backend: unknown name 'numba'"):
        Adam(new_parameters(), backend="numba")


# On the device


class Waiting(TorchDispatchMode):
    """Lists the operations for which a host waits for a device."""

    def __enter__(self) -> "Waiting":
        self.found: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_waiting_is_noticed() -> None:
    with Waiting() as waiting:
        float(torch.ones(()))
    assert waiting.found == ["_local_scalar_dense"]


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks this itself, see the test below")
@pytest.mark.parametrize("skip_untouched", [False, True])
def test_a_step_waits_for_nothing(
    backend: str, skip_untouched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = new_parameters()
    groups = groups_of(parameters)
    groups[0]["lr"] = torch.tensor(0.01, device=DEVICE)
    optimizer = Adam(groups, betas=BETAS, eps=EPS, skip_untouched=skip_untouched, backend=backend)
    set_gradients(parameters, gradients_of(parameters, 0))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if backend == "cuda":
        # The interpreter itself copies what kernels are given.
        monkeypatch.setattr("systems.adam.cuda._update_kernel", {(1,): launch, (2,): launch, (3,): launch})
    with Waiting() as waiting:
        finite = all_finite(gradients)
        clip_norm(gradients, 0.1)
        optimizer.step(finite)
    assert waiting.found == []


def launch(*_: object, **__: object) -> None:
    """Stands for the launch of a kernel."""


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("skip_untouched", [False, True])
def test_a_recorded_step_is_replayed(backend: str, skip_untouched: bool) -> None:
    def run(records: bool) -> Iterator[list[Tensor]]:
        parameters = new_parameters()
        rate = torch.tensor(0.0, device=DEVICE)
        optimizer = Adam(parameters, rate, BETAS, EPS, skip_untouched=skip_untouched, backend=backend)
        set_gradients(parameters, [torch.zeros_like(parameter) for parameter in parameters])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        def step() -> None:
            finite = all_finite(gradients)
            clip_norm(gradients, 1e3)
            optimizer.step(finite)

        step()
        graph = torch.cuda.CUDAGraph()
        if records:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
        for seed in range(6):
            rate.fill_(0.01 * seed)
            for gradient, new in zip(gradients, gradients_of(parameters, seed), strict=True):
                gradient.copy_(new)
            if seed == 3:
                gradients[2][1, 1] = float("nan")
            graph.replay() if records else step()
            yield values(optimizer)

    for replayed, eager in zip(run(True), run(False), strict=True):
        for one, other in zip(replayed, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert float(eager[1]) == 6.0


def test_all_finite() -> None:
    tensors = [torch.ones(5, 2), torch.tensor(3.0), torch.zeros(7)]
    assert bool(all_finite(tensors))
    assert all_finite(tensors).shape == ()
    for bad in (float("nan"), float("inf"), -float("inf")):
        for index in range(3):
            broken = [tensor.clone() for tensor in tensors]
            broken[index].view(-1)[-1] = bad
            assert not bool(all_finite(broken))
    assert not bool(all_finite([torch.tensor([float("inf"), -float("inf")])]))


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_norm_is_that_of_pytorch(max_norm: float) -> None:
    parameters = new_parameters()
    set_gradients(parameters, gradients_of(parameters, 0))
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    clip_norm(gradients, max_norm)
    for parameter, gradient, old in zip(parameters, gradients, before, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
        assert torch.equal(gradient, old) == (max_norm == 1e6)
    clip_norm([], max_norm)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    pointers = dict.fromkeys(("parameter", "gradient", "exp_avg", "exp_avg_sq"), "*fp32")
    numbers = dict.fromkeys(("beta2", "rest1", "rest2", "eps", "weight_decay"), "fp32")
    constants = ("BLOCK", "WIDTH", "SKIP", "RATE_ON_DEVICE")
    kernels = [
        Kernel(
            "systems.adam.cuda",
            "_update_kernel",
            {
                **pointers,
                "lr": "*fp32" if on_device else "fp32",
                **{"corrections": "*fp64", "finite": "*i1", "num_rows": "i32"},
                **numbers,
                **dict.fromkeys(constants, "constexpr"),
            },
            dict(zip(constants, (1024, width, skip, on_device), strict=True)),
            num_warps=8,
        )
        for width, skip, on_device in ((4, False, True), (4, True, True), (2, True, False), (1, False, False))
    ]
    for compiled in compile_ahead(kernels, capability):
        assert compiled["error"] == ""
        assert int(compiled["registers"]) <= 80
        assert int(compiled["spilled"]) == 0
