"""Who may import whom, and what the project may depend on."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "utils": {"utils"},
    "encoder": {"utils", "encoder"},
    "process_data": {"utils", "process_data"},
    "models": {"utils", "encoder", "models"},
    "systems": {"utils", "encoder", "models", "process_data", "systems"},
}
OPTIONAL = {"tinycudann", "nerfacc", "lpips", "triton", "rembg"}
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
}
COMES_WITH = {"yaml": "omegaconf", "PIL": "imageio", "imageio_ffmpeg": "imageio", "psutil": "imageio"}


def imports_of(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a source file imports anywhere in it; dots for relative ones."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level or str(node.module).partition(".")[0]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def requirements(name: str) -> dict[str, str]:
    """Distribution names with what follows them, comments left out."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {re.split(r"[=<>[]", line)[0].strip(): line for line in lines}


def test_imports_of_finds_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import os.path, re as r\nfrom .. import b\ndef f():\n    from c.d import e\n")
    assert sorted(imports_of(file)) == ["..", "c", "os", "re"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_in_one_direction(room: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(room)
        for name in imports_of(file)
        if name.startswith("..") or (name in {*MAY_IMPORT, "run", "tests"} and name not in MAY_IMPORT[room])
    ]
    assert not wrong


def test_rooms_need_neither_cuda_nor_optional_packages() -> None:
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in MAY_IMPORT
        for file in sources(room)
        if not file.stem.startswith("cuda") and file.stem != "nerfacc"
    )
    program = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
for room in {sorted(MAY_IMPORT)!r}:
    exec(f"from {{room}} import *")
import torch
assert not torch.cuda.is_initialized()
assert not {OPTIONAL - {"triton"}!r} & set(sys.modules), "an optional package was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_import_is_required() -> None:
    required = set(requirements("requirements.txt"))
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in [*(file for room in MAY_IMPORT for file in sources(room)), ROOT / "run.py"]
        for name in imports_of(file)
        if not name.startswith(".")
        and name not in sys.stdlib_module_names | MAY_IMPORT.keys() | OPTIONAL
        and COMES_WITH.get(name, DISTRIBUTIONS.get(name, name)) not in required
    ]
    assert not wrong


def test_requirements_are_floors_and_the_lock_is_exact() -> None:
    floors = requirements("requirements.txt")
    lock = requirements("requirements.lock")
    assert len(floors) <= 12
    assert all(re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", line) for line in floors.values())
    assert all(
        re.fullmatch(r"[\w.-]+==[\w.]+( ; python_version (<|>=) \"3\.11\")?", line) for line in lock.values()
    )
    assert floors.keys() <= lock.keys()
    assert {"pytest", "beartype", "ruff", "mypy"} <= lock.keys()


def test_licences() -> None:
    assert (
        (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The project's authors\n")
    )
    for name in requirements("requirements.lock"):
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue  # Only needed by another Python version.
        fields = ("License", "License-Expression", "Classifier")
        # Some put the whole text of all their licences into the field; its name is in the first line.
        lines = [value.partition("\n")[0] for field in fields for value in about.get_all(field) or []]
        text = "\n".join(lines)
        assert not re.search(r"non-?commercial|CC-BY-NC", text, re.IGNORECASE), name
