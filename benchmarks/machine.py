"""What every benchmark needs: the machine in one line, peak memory, and a config with its scene."""

import platform
import resource
from pathlib import Path

import torch

from process_data import load_scene
from run import sections
from systems.preflight import dataset_to_load
from utils.backend import seed_everything, set_cpu_threads
from utils.config import Config, load_config
from utils.types import Scene


def describe_machine() -> str:
    """Processor, threads, Python and PyTorch in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {torch.get_num_threads()} threads, {versions}"


def peak_memory() -> float:
    """Largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load(path: str, *overrides: str) -> tuple[Config, Scene]:
    """A config with overrides and the scene it names, with threads and seeds set as run.py sets them."""
    config = load_config(path, overrides, sections())
    set_cpu_threads()
    seed_everything(config.seed)
    return config, load_scene(dataset_to_load(config, trains=True))
