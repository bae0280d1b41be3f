"""A mesh from where the photographs were taken: photograph, clay and vertex colours side by side.

python benchmarks/mesh_views.py outputs/NAME/TRIAL picture.png --views 0 10 20 --height 300
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from process_data import load_scene
from run import sections
from utils.config import load_config
from utils.images import panel, to_uint8, write_png
from utils.mesh import read_mesh, transform_mesh
from utils.raster import render_mesh


def row(mesh: object, scene: object, view: int, height: int) -> npt.NDArray[np.uint8]:
    """Photograph, clay, vertex colours of one view. The mesh is seen through the pinhole part of the lens."""
    cameras = scene.cameras
    width, full = cameras.size[view].tolist()
    scale = 2 * height / full
    size = (round(width * scale), 2 * height)
    intrinsics = np.diag([scale, scale, 1.0]) @ cameras.intrinsics[view].double().numpy()
    pose = cameras.c2w[view].double().numpy()
    render = render_mesh(mesh, pose, intrinsics, size)
    facing = np.abs(render.normal @ pose[:, 2])[..., None]
    seen = render.mask[..., None]
    clay = np.where(seen, (0.12 + 0.78 * facing) * np.array([1.0, 0.98, 0.95]), 1.0)
    color = np.where(seen, render.color, 1.0)
    pictures = [scene.images.image(view).numpy(), to_uint8(clay), to_uint8(color)]
    return panel([cv2.resize(p, (size[0] // 2, height), interpolation=cv2.INTER_AREA) for p in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that has a mesh")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--views", type=int, nargs="+", default=[0])
    parser.add_argument("--height", type=int, default=300)
    args = parser.parse_args()
    settings = load_config(args.run / "config" / "parsed.yaml", [], sections())
    scene = load_scene(settings.dataset)
    world = read_mesh(args.run / "save" / "mesh.ply")
    mesh = transform_mesh(world, np.linalg.inv(scene.world_from_scene.numpy()))
    rows = [row(mesh, scene, view, args.height) for view in args.views]
    write_png(
        args.picture, np.concatenate([np.pad(r, ((0, 4), (0, 0), (0, 0)), constant_values=255) for r in rows])
    )


if __name__ == "__main__":
    main()
