"""Testing Triton kernels: in the interpreter where there is no GPU, and compiled ahead of time for some GPUs.

The interpreter runs kernels with NumPy and knows nothing of types and layouts that a GPU refuses, so every
kernel is compiled as well, down to machine code, which needs Triton's compiler but no GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where Triton kernels run here: a GPU, or the CPU in the interpreter."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with the types it is launched with."""

    module: str
    name: str
    signature: dict[str, str]
    """Argument -> Triton type (``*fp32``, ``*i64``, ``i32``, ``fp32``, ``constexpr``)."""
    constants: dict[str, object]
    """Values of the ``constexpr`` arguments."""
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


def compile_ahead(kernels: list[Kernel], capability: int) -> list[dict[str, int | str]]:
    """Compile for a compute capability (90 = Hopper), each in turn.

    Returns:
        One dictionary a kernel: ``error`` ("" if none), ``registers``, ``spilled`` (bytes of local memory).
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = str(root)
    request = json.dumps({"capability": capability, "kernels": [asdict(kernel) for kernel in kernels]})
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=request,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _compile(kernel: Kernel, capability: int) -> dict[str, int | str]:
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    index = {name: (position,) for position, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=kernel.signature,
        constexprs={index[name]: value for name, value in kernel.constants.items()},
        # As at a launch with PyTorch's tensors, whose memory is aligned: vectors are loaded as such.
        attrs={
            index[name]: [["tt.divisibility", 16]]
            for name, kind in kernel.signature.items()
            if kind.startswith("*")
        },
    )
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
                "maxnreg": kernel.maxnreg,
            },
        )
    except Exception as error:  # Whatever the compiler says is the test's result.
        return {"error": f"{type(error).__name__}: {error}"}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=False
        ).stdout
    registers, local = (re.search(f"{what}:(\\d+)", usage) for what in ("REG", "STACK"))
    return {
        "error": "",
        "registers": int(registers[1]) if registers else -1,
        "spilled": int(local[1]) if local else -1,
    }


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    print(json.dumps([_compile(Kernel(**kernel), asked["capability"]) for kernel in asked["kernels"]]))
