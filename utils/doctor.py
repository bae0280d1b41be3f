"""What this machine has and what is missing, as a table: ``python run.py --doctor``.

Optional packages are looked up, never imported: those for CUDA may take the process with them where the
driver does not fit.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

_ABSENT = "absent"


@dataclass(frozen=True)
class _Tool:
    """A package that some commands need."""

    module: str
    distribution: str
    needed_for: str
    install: str


_TOOLS = (
    _Tool(
        "pycolmap", "pycolmap", "--prepare, COLMAP captures, lens distortion", "pip install 'pycolmap>=4.2'"
    ),
    _Tool("rembg", "rembg", "--prepare: foreground masks", "pip install 'rembg[cpu]'"),
    _Tool("lpips", "lpips", "--test: LPIPS beside PSNR and SSIM", "pip install lpips"),
    _Tool("triton", "triton", "the kernels on a GPU", "comes with PyTorch's CUDA builds for Linux"),
    _Tool("nerfacc", "nerfacc", "model.backend=nerfacc, not needed otherwise", "pip install nerfacc"),
    _Tool(
        "tinycudann",
        "tinycudann",
        "model.backend=tinycudann, not needed otherwise",
        "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch",
    ),
)


def install_hint(module: str) -> str:
    """How to install a package that some commands need."""
    return next(tool.install for tool in _TOOLS if tool.module == module)


def doctor() -> str:
    """Look at the machine and at what is installed. Whatever cannot be found out says so; nothing raises.

    Returns:
        A table of lines ``name  found  what it is for``, and below it how to install what is absent.
    """
    rows = [
        ("Python", _probe(lambda: f"{platform.python_version()} ({sys.executable})"), ""),
        ("system", _probe(platform.platform), ""),
        ("CPU threads", _probe(_cpu_threads), ""),
        ("memory", _probe(_memory), ""),
        ("disk", _probe(_disk), "outputs, and pictures beyond the memory (dataset.memory)"),
        ("PyTorch", _probe(_torch_version), "everything"),
        ("device", _probe(_device), "--device auto takes the first"),
        ("ffmpeg", _probe(_ffmpeg), "videos in and out"),
        *((tool.module, _probe(partial(_version, tool)), tool.needed_for) for tool in _TOOLS),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {found:<{widths[1]}}  {use}".rstrip() for name, found, use in rows]
    found_by_name = {name: found for name, found, _ in rows}
    missing = [f"  {tool.module}: {tool.install}" for tool in _TOOLS if found_by_name[tool.module] == _ABSENT]
    if found_by_name["ffmpeg"] == _ABSENT:
        missing.insert(0, "  ffmpeg: pip install imageio-ffmpeg")
    if missing:
        lines += ["", "absent, and only needed for what the table says; to install:", *missing]
    return "\n".join(lines)


def _probe(find: Callable[[], str]) -> str:
    """What ``find`` says, or why it could not."""
    try:
        return find()
    # A broken installation raises anything, and saying what is broken is the purpose here.
    except Exception as error:
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())[:80]})"


def _version(tool: _Tool) -> str:
    if importlib.util.find_spec(tool.module) is None:
        return _ABSENT
    try:
        return metadata.version(tool.distribution)
    except metadata.PackageNotFoundError:
        return "present"


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _device() -> str:
    """The accelerators that PyTorch can use."""
    import torch

    found = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        f" ({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB, compute capability"
        f" {'.'.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found) or "cpu (no CUDA, no MPS)"


def _ffmpeg() -> str:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return _ABSENT
    import imageio_ffmpeg

    # Raises where the package came without its program.
    imageio_ffmpeg.get_ffmpeg_exe()
    return f"{imageio_ffmpeg.get_ffmpeg_version()} (imageio-ffmpeg {imageio_ffmpeg.__version__})"


def _cpu_threads() -> str:
    # Containers and batch systems lend fewer than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def _disk() -> str:
    disk = shutil.disk_usage(Path.cwd())
    return f"{disk.free / 2**30:.0f} of {disk.total / 2**30:.0f} GiB free in {Path.cwd()}"
