"""How well ``run.py --prepare`` does: photos placed, seconds, and agreement with a known answer.

    python benchmarks/prepare.py [turntable] [bonsai alexander ...] [--data FOLDER] [key=value ...]

For a real capture the photos alone are given to it, without masks and model. Its cameras are then compared
with the capture's own model after the best similarity (Umeyama 1991): the error of a camera is the distance
of its centre from where the other model has it, in per cent of the spread (the root mean square distance of
all centres from their mean). ``turntable`` renders a textured figure that turns before a patterned wall and
compares with the true cameras.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from process_data.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
Floats = npt.NDArray[np.float64]


def centre_errors(found: Floats, known: Floats) -> Floats:
    """Distances of camera centres ``(N, 3)`` after the best similarity, in per cent of the known spread."""
    mean_found, mean_known = found.mean(axis=0), known.mean(axis=0)
    a, b = found - mean_found, known - mean_known
    u, stretch, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(stretch) @ sign) / np.square(a).sum()
    spread = np.sqrt(np.square(b).sum(axis=1).mean())
    return 100.0 * np.linalg.norm(scale * a @ rotation.T - b, axis=1) / spread


def centres(model: Path) -> dict[str, Floats]:
    import pycolmap

    images = pycolmap.Reconstruction(model).images.values()
    return {image.name: np.asarray(image.projection_center()) for image in images if image.has_pose}


def report(name: str, source: Path, known: dict[str, Floats], overrides: list[str], folder: Path) -> None:
    start = time.perf_counter()
    summary = prepare(source, folder / "out", overrides)
    seconds = time.perf_counter() - start
    found = centres(folder / "out" / "sparse" / "0")
    common = sorted(found.keys() & known.keys())
    errors = centre_errors(np.array([found[key] for key in common]), np.array([known[key] for key in common]))
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in summary.seconds.items())
    print(
        f"{name}: {summary.registered} of {summary.photos} photos placed in {seconds:.0f} s ({stages}); "
        f"{summary.points} points, {summary.mean_reprojection_error:.2f} px; centres of {len(common)} common "
        f"cameras: median error {np.median(errors):.3f} %, worst {errors.max():.2f} %",
        flush=True,
    )


def turntable_views(folder: Path, num_views: int, side: int) -> dict[str, Floats]:
    """Render a textured figure on a turntable before a patterned wall; gives the camera centres around it."""
    from PIL import Image

    from process_data.synthetic_mesh import ground_truth_mesh
    from utils.raster import render_mesh
    from utils.types import TriangleMesh

    mesh = ground_truth_mesh("figurine", 160)
    generator = np.random.default_rng(0)
    # Blotches of a few sizes on the surface, as real things have them.
    colors = np.zeros((len(mesh.vertices), 3))
    for size in (0.15, 0.06, 0.03):
        cells = np.floor(mesh.vertices / size).astype(np.int64)
        _, cell = np.unique(cells, axis=0, return_inverse=True)
        colors += generator.uniform(0, 85, (cell.max() + 1, 3))[cell.ravel()]
    textured = TriangleMesh(mesh.vertices, mesh.faces, mesh.normals, colors.astype(np.uint8))
    wall = np.zeros((side, side, 3))
    for size in (24, 9, 4):
        coarse = generator.uniform(0, 85, (side // size + 1, side // size + 1, 3))
        wall += np.kron(coarse, np.ones((size, size, 1)))[:side, :side]
    intrinsics = np.array([[1.6 * side, 0, side / 2], [0, 1.6 * side, side / 2], [0, 0, 1.0]])
    folder.mkdir(parents=True)
    known = {}
    for view in range(num_views):
        angle = 2 * np.pi * view / num_views
        outward = np.array([np.cos(angle) * 0.95, np.sin(angle) * 0.95, 0.31])
        forward = -outward / np.linalg.norm(outward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        centre = -3.6 * forward
        pose = np.stack([right, np.cross(forward, right), forward, centre], axis=1)
        picture = render_mesh(textured, pose, intrinsics, (side, side))
        assert picture.color is not None
        shown = np.where(picture.mask[..., None], 255.0 * picture.color, wall)
        noisy = np.clip(shown + generator.normal(0, 2.0, shown.shape), 0, 255).astype(np.uint8)
        name = f"view_{view:03d}.png"
        Image.fromarray(noisy).save(folder / name)
        known[name] = centre
    return known


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "captures", nargs="*", help="turntable, or folders of --data; all others are key=value"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--keep", type=Path, help="copy what was prepared to this folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [text for text in args.captures if "=" in text]
    for name in [text for text in args.captures if "=" not in text] or ["turntable", "bonsai", "alexander"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            photos = folder / "photos"
            if name == "turntable":
                known = turntable_views(photos, 36, 480)
                report(name, photos, known, ["turntable=true", *overrides], folder)
            else:
                shutil.copytree(args.data / name / "images", photos)
                known = centres(args.data / name / "sparse" / "0")
                report(name, photos, known, overrides, folder)
            if args.keep is not None:
                shutil.copytree(folder, args.keep / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
