"""Which device, which implementation of an operation, which seeds, how many threads: decided once.

An operation with a fast version keeps its implementations side by side in one folder, each with a function
that says why it cannot run here (``None`` where it can). :func:`resolve_backend` turns a wish into a name. ::

    resolve_backend("compositing", "auto", {"cpu": check_of_cpu, "reference": check_of_reference}, device)
    -> ("cpu", "first choice on cpu")
"""

import difflib
import functools
import importlib
import importlib.util
import math
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from utils.errors import BackendError

Available = Callable[[], str | None]
"""``None`` where an implementation can run, else the reason why not and how to install it, in one line."""


def available_on_cpu(device: torch.device) -> str | None:
    """Check of the Numba versions: ``None`` where they run on ``device``, else the reason and the remedy."""
    if device.type == "cpu":
        return None
    return f"Numba kernels run on the CPU, this run uses {device.type}: use --device cpu"


def available_anywhere(device: torch.device) -> None:
    """Check of the plain PyTorch versions, which run on every device."""
    del device


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU (the environment's doing)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_on_gpu(device: torch.device, least: tuple[int, int] = (7, 0)) -> str | None:
    """Check of the Triton versions: ``None`` where they run on ``device``, else the reason and the remedy.

    Args:
        device: where the tensors live.
        least: compute capability that the kernels need: (7, 0) is Volta, (8, 0) Ampere, the first whose
            matrix units take float32.
    """
    if device.type != "cuda" and not is_interpreted():
        return f"Triton kernels need a GPU, this run uses the {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch's CUDA builds for Linux bring it): pip install triton"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < least:
            has, needs = (".".join(map(str, pair)) for pair in (capability, least))
            return f"this GPU has compute capability {has}, the kernels need {needs}: use backend reference"
    return None


@functools.cache
def implementation(package: str, name: str) -> ModuleType:
    """The module with one implementation of an operation, imported when it is first used.

    Nothing that this machine lacks (Triton, nerfacc, tiny-cuda-nn) is imported before a config asks for it.
    """
    return importlib.import_module(f"{package}.{name}")


def resolve_backend(
    operation: str, requested: str, implementations: Mapping[str, Available], device: torch.device
) -> tuple[str, str]:
    """Choose the implementation of an operation.

    Args:
        operation: what it is for, as error lines and the log name it, e.g. ``"hash grid"``.
        requested: a name from ``implementations``, or ``"auto"`` for the first that can run.
        implementations: by name, best first, the check of each.
        device: where the tensors live; it is only named in the reason, the checks know what they need.

    Returns:
        The name and, in one line, why it was chosen.

    Raises:
        BackendError: the name is unknown, the named one cannot run here, or none can.
    """
    where = f"{operation} backend"
    if requested != "auto":
        if requested not in implementations:
            near = difflib.get_close_matches(requested, [*implementations, "auto"], n=1)
            remedy = f"did you mean {near[0]}? " if near else ""
            raise BackendError(
                where, f"unknown name {requested!r}", f"{remedy}known: auto, {', '.join(implementations)}"
            )
        reason = implementations[requested]()
        if reason is not None:
            raise BackendError(where, f"{requested} cannot run here ({reason})", "or use backend auto")
        return requested, "asked for by name"

    refused: list[str] = []
    for name, available in implementations.items():
        reason = available()
        if reason is None:
            return (
                name,
                f"first choice on {device}"
                if not refused
                else f"the fastest that runs here; {'; '.join(refused)}",
            )
        refused.append(f"{name} cannot run ({reason})")
    raise BackendError(where, f"nothing can run on {device} ({'; '.join(refused)})", "install one of these")


def resolve_device(requested: str) -> torch.device:
    """``auto`` takes the GPU where PyTorch can use one, ``cpu`` and ``cuda`` are taken at their word.

    Raises:
        BackendError: ``cuda`` was asked for and there is none, or the name is another.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise BackendError("--device", f"unknown device {requested!r}", "choose auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        built_for_cpu = torch.version.cuda is None
        what = (
            "this PyTorch is built for CPUs only" if built_for_cpu else "PyTorch finds no usable NVIDIA GPU"
        )
        raise BackendError("--device cuda", what, "use --device cpu, or install a CUDA build and driver")
    return torch.device("cuda" if requested != "cpu" and has_gpu else "cpu")


def limit_memory(device: torch.device, gib: int | None) -> None:
    """Keep this process below so much of a GPU's memory; ``None``: take what it needs.

    Raises:
        BackendError: there is no GPU whose memory could be limited.
    """
    if gib is None:
        return
    if device.type != "cuda":
        raise BackendError("--vram", f"is about a GPU's memory, this run uses {device.type}", "leave it out")
    # The limit wants a number where other functions are content with "cuda".
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(gib / total, 1.0), index)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all GPUs included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from NumPy's global generator are meant, too.
    torch.manual_seed(seed)


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Set a generator to a state from a checkpoint; one of another kind of device leaves it as it is.

    A run that moves between a CPU and a GPU cannot repeat its draws, and goes on with others.
    """
    if len(state) == len(generator.get_state()):
        generator.set_state(state.cpu())


def set_cpu_threads() -> int:
    """Give PyTorch and Numba as many threads as this process may keep busy, and return the number.

    Both count the machine's cores. A container that is granted two of sixty-four would start sixty-four
    threads that wait for one another, so the scheduler's affinity and the cgroup's quota bound the number.
    ``OMP_NUM_THREADS`` set by the user wins.
    """
    import numba  # here, because importing it takes as long as all the rest of this module

    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() and int(wanted) > 0 else _granted_cores()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # After Numba, whose OpenMP layer sets the number for the whole process when it starts.
    torch.set_num_threads(threads)
    return threads


def _granted_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that the scheduler lets this process use, at least one."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cores
    # "max 100000" means no limit; "150000 100000" means one and a half cores, which two threads use up.
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
