"""Training steps whose Triton launches are compiled for a real GPU, with their very arguments, and not run.

A program of its own: ``python tests/launches.py CAPABILITY [key=value ...]`` takes fixed-buffer steps of the
tiny run on the CPU, with kernels that do nothing, and prints each kernel that was compiled. What a launch
passes (types, alignments, ``None``, options) thus meets Triton's compiler where there is no GPU.
"""

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "systems")]

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from utils import backend


class NoDriver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def main(capability: int, overrides: list[str]) -> Counter[str]:
    """Take steps; returns how often each kernel would have been launched."""
    driver.set_active(NoDriver(capability))
    launches: Counter[str] = Counter()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches[self.fn.__name__] += 1
        size = grid(options) if callable(grid) else grid
        assert all(isinstance(side, int) and side > 0 for side in size), (self.fn.__name__, size)
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    backend.is_interpreted = lambda: True

    from tiny import new_trainer

    with tempfile.TemporaryDirectory() as folder:
        training = new_trainer(Path(folder), "model.backend=cuda", "trainer.buffers=fixed", *overrides)
        # The optimiser takes plain PyTorch on a CPU; its kernel is asked for here.
        training.optimizer._update = backend.implementation("systems.adam", "cuda").update_
        for _ in range(2):
            training.train_step()
            training.step += 1
        training.run.close()
    return launches


if __name__ == "__main__":
    print(f"Triton {triton.__version__}", dict(main(int(sys.argv[1]), sys.argv[2:])))
