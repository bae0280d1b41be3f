import builtins
import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from utils.doctor import doctor

ROOT = Path(__file__).resolve().parents[2]


def rows() -> dict[str, str]:
    """The table's lines by their first word."""
    table, _, _ = doctor().partition("\n\n")
    return {line.split("  ")[0]: line for line in table.splitlines()}


def test_table_says_what_is_there() -> None:
    found = rows()
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in found["Python"]
    assert torch.__version__ in found["PyTorch"]
    assert metadata.version("pycolmap") in found["pycolmap"]
    assert "GiB free" in found["memory"]
    assert "GiB free" in found["disk"]
    assert "usable of" in found["CPU threads"]
    if not torch.cuda.is_available():
        assert "cpu (no CUDA" in found["device"] or "mps" in found["device"]
    assert {"rembg", "lpips", "ffmpeg"} <= found.keys()


def test_absent_tools_come_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    table, _, remedies = doctor().partition("\n\n")
    for name in ("pycolmap", "rembg", "lpips", "ffmpeg", "nerfacc"):
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert line.split()[1] == "absent"
        assert f"  {name}: pip install" in remedies
    assert len(remedies.splitlines()) == 8


def test_present_tools_have_no_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert "pip install" not in doctor()
    assert "1.2.3" in rows()["lpips"]


def test_broken_installations_are_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12:\n cannot open shared object file")
        return real(name, *args, **kwargs)

    def no_memory() -> None:
        raise RuntimeError("no /proc")

    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(psutil, "virtual_memory", no_memory)
    found = rows()
    assert "unknown (OSError: libcudart.so.12: cannot open shared object file)" in found["PyTorch"]
    assert "unknown (RuntimeError: no /proc)" in found["memory"]


def test_optional_packages_are_not_imported() -> None:
    program = (
        "import sys; from utils.doctor import doctor; print(doctor()); "
        "assert not {'nerfacc', 'tinycudann', 'triton', 'rembg', 'lpips', 'pycolmap'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Python ")
