"""Surface extraction from a trained model: time and peak memory, each resolution in a process of its own.

python benchmarks/mesh.py outputs/NAME/TRIAL/ckpt/last.pth [256 512 1024]
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.machine import describe_machine, load, peak_memory
from models import build_model
from systems import SYSTEMS, checkpoint
from utils.extraction import extract_surface


def measure(path: Path, resolution: int) -> None:
    config, scene = load(str(path.parent.parent / "config" / "parsed.yaml"))
    model = build_model(config.model, scene, torch.device("cpu"))
    system = SYSTEMS[config.system.name][1](config.system, model.num_levels, scene.masks is not None)
    _, fraction = checkpoint.load_model(path, model, config.tree)
    surface = model.frozen_at(system.progress_at(fraction))
    extract_surface(surface.query_sdf, 64)  # compiles the kernels, once per installation
    before, start = peak_memory(), time.perf_counter()
    mesh = extract_surface(surface.query_sdf, resolution)
    seconds = time.perf_counter() - start
    print(
        f"{resolution}^3: {seconds:.1f} s, {len(mesh.faces):,} faces, peak memory {peak_memory():.2f} GiB "
        f"({before:.2f} GiB before)",
        flush=True,
    )


def main() -> None:
    path = Path(sys.argv[1])
    print(describe_machine(), flush=True)
    for resolution in [int(argument) for argument in sys.argv[2:]] or [512]:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(path, resolution))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
