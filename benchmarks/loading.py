"""How long captures take to load, and how much memory that needs.

::

    python -m benchmarks.loading                        # everything, some minutes
    python -m benchmarks.loading --only real            # the captures in ../shared/data
    python -m benchmarks.loading --only 12mp 4k         # 300 photos of 12 megapixels, 500 of 4K

The large sets are one JPEG under many names (hard links) with a ``transforms.json`` beside it: every name is
decoded anew, so the times are those of as many photos, up to the file system's cache. Each capture is loaded
in a process of its own, which reports its seconds and its peak resident memory (VmHWM), imports included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

LARGE: dict[str, tuple[tuple[int, int], int, dict[str, object]]] = {
    "12mp": ((4000, 3000), 300, {"img_downscale": 4}),
    "4k": ((3840, 2160), 500, {"memory": "disk"}),
}
"""Size, number of photos, and how they are loaded."""
REAL: dict[str, tuple[str, dict[str, object]]] = {
    "fox": ("transforms", {}),
    "alexander": ("colmap", {}),
    "bonsai": ("colmap", {}),
    "nerf_synthetic/lego": ("blender", {}),
    "dtu_scan65": ("dtu", {"apply_mask": True}),
}
"""Format and options of each real capture."""


def make_photo(path: Path, size: tuple[int, int]) -> None:
    """Write a JPEG with structure at all scales, so that decoding costs what a photo's does."""
    rng = np.random.default_rng(0)
    width, height = size
    total = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64, 256, 1024):
        small = rng.normal(0.0, 1.0, (cells * height // width + 1, cells, 3))
        coarse = Image.fromarray(np.clip(128 + 50 * small, 0, 255).astype(np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) / 5
    Image.fromarray(total.astype(np.uint8)).save(path, quality=92)


def make_large(root: Path, size: tuple[int, int], number: int) -> None:
    """Write a capture of ``number`` photos on a ring around the origin."""
    (root / "images").mkdir(parents=True)
    make_photo(root / "images" / "0000.jpg", size)
    frames = []
    for index in range(number):
        path = root / "images" / f"{index:04d}.jpg"
        if index:
            path.hardlink_to(root / "images" / "0000.jpg")
        angle = 2 * np.pi * index / number
        backward = np.array([np.sin(angle), 0.0, np.cos(angle)])
        pose = np.eye(4)
        pose[:3] = np.column_stack([np.cross([0, 1, 0], backward), [0, 1, 0], backward, 3 * backward])
        frames.append({"file_path": f"images/{path.name}", "transform_matrix": pose.tolist()})
    focal = 1.2 * size[0]
    camera = {"w": size[0], "h": size[1], "fl_x": focal, "fl_y": focal, "cx": size[0] / 2, "cy": size[1] / 2}
    (root / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))


def load_here(name: str, root: str, options: str) -> None:
    """Load one capture in this process, and print what it took as one line of JSON."""
    from process_data import DATASETS, load_scene

    config = DATASETS[name][0](root_dir=root, **json.loads(options))
    start = time.perf_counter()
    scene = load_scene(config)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    mebibytes = scene.images.pixels.numel() * scene.images.pixels.element_size() / 2**20
    width, height = scene.images.size[0].tolist()
    print(json.dumps([len(scene.images), width, height, mebibytes, seconds, peak]))


def measure(label: str, name: str, root: Path, options: dict[str, object]) -> None:
    """Load one capture in a child process and print a row of the table."""
    command = [sys.executable, "-m", "benchmarks.loading", "--load", name, str(root), json.dumps(options)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        print(f"{label:<22} failed (exit code {result.returncode})", flush=True)
        return
    number, width, height, mebibytes, seconds, peak = json.loads(result.stdout.splitlines()[-1])
    said = " ".join(f"{key}={value}" for key, value in options.items())
    print(
        f"{label:<22} {number:>5} {f'{width}x{height}':>10} {mebibytes:>8.0f} MiB {seconds:>7.1f} s"
        f" {peak:>6.2f} GiB   {said}",
        flush=True,
    )


def main() -> None:
    """Measure what was asked for and print one row per capture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=[*LARGE, "real"], default=[*LARGE, "real"])
    parser.add_argument("--load", nargs=3, metavar=("FORMAT", "ROOT", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load_here(*args.load)
        return
    print(f"{'capture':<22} views       size       pixels   seconds  peak RSS   options", flush=True)
    if "real" in args.only:
        for folder, (name, options) in REAL.items():
            if (DATA / folder).is_dir():
                measure(folder, name, DATA / folder, options)
    for label in (label for label in LARGE if label in args.only):
        size, number, options = LARGE[label]
        with tempfile.TemporaryDirectory() as folder:
            make_large(Path(folder) / label, size, number)
            measure(f"{number} x {label}", "transforms", Path(folder) / label, options)


if __name__ == "__main__":
    main()
