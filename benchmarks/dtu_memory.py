"""Peak memory and time of `run.py --eval MESH --dtu DIR` on a mesh of millions of faces.

python benchmarks/dtu_memory.py [5000000]

Makes a folder like DTU's, with a wavy sphere 200 mm across as the scan (about as many points as a scan of
DTU's has: 3 million) and the same, 0.5 mm larger, as the mesh.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import numpy.typing as npt
import scipy.io

from benchmarks.machine import describe_machine
from utils.mesh import write_mesh
from utils.types import TriangleMesh

SCAN_POINTS = 3_000_000
RADIUS, CENTRE = 100.0, np.array([120.0, 120.0, 120.0])
BOX = 240


def wavy(directions: npt.NDArray[np.float64], offset: float = 0.0) -> npt.NDArray[np.float64]:
    """Points (P, 3), mm, along unit directions."""
    waves = 4.0 * np.sin(7 * directions[:, :1]) * np.sin(9 * directions[:, 1:2])
    return CENTRE + (RADIUS + offset + waves) * directions


def sphere_mesh(num_faces: int) -> TriangleMesh:
    """A grid of longitudes and latitudes, closed but for its poles."""
    rows = max(2, int((num_faces / 4) ** 0.5))
    columns = num_faces // (2 * rows)
    polar, around = np.linspace(0.01, np.pi - 0.01, rows + 1), np.arange(columns) * (2 * np.pi / columns)
    directions = np.stack(
        [
            np.outer(np.sin(polar), np.cos(around)),
            np.outer(np.sin(polar), np.sin(around)),
            np.outer(np.cos(polar), np.ones(columns)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    row, column = (index.ravel() for index in np.mgrid[:rows, :columns])
    a, b = row * columns + column, row * columns + (column + 1) % columns
    faces = np.concatenate([np.stack([a, a + columns, b], 1), np.stack([b, a + columns, b + columns], 1)])
    return TriangleMesh(wavy(directions, 0.5), faces)


def write_folder(folder: Path, num_faces: int) -> None:
    for name in ("ObsMask", "Points/stl"):
        (folder / name).mkdir(parents=True)
    observed = np.ones((BOX + 1,) * 3, np.uint8)
    box = np.array([[0.0, 0, 0], [BOX] * 3])
    scipy.io.savemat(folder / "ObsMask/ObsMask1_10.mat", {"ObsMask": observed, "BB": box, "Res": 1.0})
    scipy.io.savemat(folder / "ObsMask/Plane1.mat", {"P": np.array([[0.0], [0], [1], [-20]])})
    normal = np.random.default_rng(0).standard_normal((SCAN_POINTS, 3))
    points = wavy(normal / np.linalg.norm(normal, axis=1, keepdims=True))
    write_mesh(folder / "Points/stl/stl001_total.ply", TriangleMesh(points, np.empty((0, 3), np.int64)))
    write_mesh(folder / "mesh.ply", sphere_mesh(num_faces))


def main() -> None:
    num_faces = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: making the mesh must not count.
        if os.fork() == 0:
            write_folder(folder, num_faces)
            os._exit(0)
        os.wait()
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        command = [sys.executable, "run.py", "--eval", str(folder / "mesh.ply"), "--dtu", name, "--scan", "1"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        assert status == 0, "the evaluation failed"
        report = json.loads(printed)
    print(describe_machine())
    print(f"(writing the folder: {before / 2**20:.2f} GiB)")
    print(f"{num_faces:,} faces: peak memory {usage.ru_maxrss / 2**20:.2f} GiB, {seconds:.0f} s")
    print(
        f"accuracy {report['accuracy']:.3f} mm, completeness {report['completeness']:.3f} mm, made as 0.5 mm"
    )


if __name__ == "__main__":
    main()
