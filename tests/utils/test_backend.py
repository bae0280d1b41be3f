"""Choice of implementation and device, seeds, and the number of threads."""

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils import backend
from utils.errors import BackendError

CPU = torch.device("cpu")


def works() -> str | None:
    return None


def no_gpu() -> str | None:
    return "needs a GPU"


def not_built() -> str | None:
    return "not installed: pip install fast"


def test_auto_takes_the_first_that_runs_and_says_why() -> None:
    assert backend.resolve_backend("hash grid", "auto", {"cpu": works, "reference": works}, CPU) == (
        "cpu",
        "first choice on cpu",
    )
    choices = {"cuda": no_gpu, "fast": not_built, "cpu": works, "reference": works}
    name, why = backend.resolve_backend("hash grid", "auto", choices, CPU)
    assert name == "cpu"
    reasons = "cuda cannot run (needs a GPU); fast cannot run (not installed: pip install fast)"
    assert why == f"the fastest that runs here; {reasons}"


def test_checks_of_numba_and_of_plain_pytorch() -> None:
    gpu = torch.device("cuda")
    assert backend.available_on_cpu(CPU) is backend.available_anywhere(CPU) is None
    assert backend.available_anywhere(gpu) is None
    line = "Numba kernels run on the CPU, this run uses cuda: use --device cpu"
    assert backend.available_on_cpu(gpu) == line


def test_named_implementation_is_taken_at_its_word() -> None:
    choices = {"cuda": no_gpu, "cpu": works, "reference": works}
    assert backend.resolve_backend("hash grid", "reference", choices, CPU) == (
        "reference",
        "asked for by name",
    )
    with pytest.raises(BackendError) as caught:
        backend.resolve_backend("hash grid", "cuda", choices, CPU)
    assert str(caught.value) == "hash grid backend: cuda cannot run here (needs a GPU); or use backend auto"


def test_unknown_name_and_nothing_that_runs() -> None:
    with pytest.raises(BackendError) as caught:
        backend.resolve_backend("hash grid", "refrence", {"cpu": works, "reference": works}, CPU)
    assert str(caught.value) == (
        "hash grid backend: unknown name 'refrence'; did you mean reference? known: auto, cpu, reference"
    )
    with pytest.raises(BackendError, match=r"nothing can run on cpu \(cuda cannot run \(needs a GPU\)\)"):
        backend.resolve_backend("hash grid", "auto", {"cuda": no_gpu}, CPU)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.resolve_device("auto") == backend.resolve_device("cpu") == CPU
    with pytest.raises(BackendError, match=r"--device cuda: .*; use --device cpu"):
        backend.resolve_device("cuda")
    with pytest.raises(BackendError, match="choose auto, cpu or cuda"):
        backend.resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.resolve_device("auto") == backend.resolve_device("cuda") == torch.device("cuda")
    assert backend.resolve_device("cpu") == CPU


def test_seeds_repeat_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    backend.seed_everything(7)
    first = draw()
    backend.seed_everything(8)
    other = draw()
    backend.seed_everything(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_threads_follow_the_user_then_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert backend.set_cpu_threads() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(backend.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    assert backend._granted_cores(quota) == 8
    for text, cores in [("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), ("1000 100000", 1)]:
        quota.write_text(text)
        assert backend._granted_cores(quota) == cores


def test_memory_is_limited_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.limit_memory(CPU, None)
    with pytest.raises(BackendError, match=r"^--vram: is about a GPU's memory, this run uses cpu; leave it"):
        backend.limit_memory(CPU, 8)
    limits = []
    card = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # What PyTorch's own function hands to the driver, so that it has its say about the device.
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *args: limits.append(args), raising=False)
    for gib in (4, 8, 24):
        backend.limit_memory(torch.device("cuda"), gib)
    assert limits == [(0.25, 0), (0.5, 0), (1.0, 0)]


def test_old_gpus_are_refused_with_what_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    gpu = torch.device("cuda")
    for capability, least, reason in [
        ((7, 5), (7, 0), None),
        ((9, 0), (8, 0), None),
        (
            (7, 5),
            (8, 0),
            "this GPU has compute capability 7.5, the kernels need 8.0: use backend reference",
        ),
        ((6, 1), (7, 0), "this GPU has compute capability 6.1, the kernels need 7.0: use backend reference"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        assert backend.available_on_gpu(gpu, least) == reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.available_on_gpu(gpu))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend.available_on_gpu(CPU) == "Triton kernels need a GPU, this run uses the cpu"


def test_generators_of_another_kind_of_device_stay_as_they_are() -> None:
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    backend.restore_generator(generator, other.get_state())
    assert torch.equal(generator.get_state(), other.get_state())
    # A GPU's state has sixteen bytes.
    backend.restore_generator(generator, torch.zeros(16, dtype=torch.uint8))
    assert torch.equal(generator.get_state(), other.get_state())
