"""The DTU protocol: accuracy and completeness of a mesh against DTU's structured-light scans, in millimetres.

::

    DIR/ObsMask/ObsMask65_10.mat      ObsMask (X, Y, Z) voxels seen by the scanner; BB (2, 3) box and Res, mm
    DIR/ObsMask/Plane65.mat           P (4, 1): above the table is where P . (x, y, z, 1) > 0
    DIR/Points/stl/stl065_total.ply   the scan's points

    mesh -> points every 0.2 mm, in the box --> those in ObsMask -> nearest scan point: accuracy
                                        |
    scan -> points above the plane -----------> nearest of these mesh points: completeness

``overall`` is the mean of the two. Distances of 20 mm and more are left out of both. Nothing is aligned: the
mesh must be in DTU's world frame, in which meshes of DTU scans are exported.

NeuS and its successors first cut the mesh by the dilated masks (:func:`cull_by_masks`); numbers of uncut
meshes do not compare with their tables.

Pitfalls: the box grows by 60 mm below and by 120 mm above, as in the Python port that NeuS and its successors
use. The port thins points in random order, which moves its result by about 0.01 %; here the order follows a
seed. Points outside of the box are dropped before the thinning, not after: that saves memory and can change
points at the box's walls alone.

Source: Jensen et al., "Large scale multi-view stereopsis evaluation", CVPR 2014; as ported to Python in
https://github.com/jzhangbs/DTUeval-python; culling: https://github.com/Totoro97/NeuS, issue 74.
"""

import os
from pathlib import Path
from typing import Any, no_type_check

import cv2
import numpy as np
import numpy.typing as npt
import scipy.io
import torch
from jaxtyping import Bool, Float64
from numba import njit
from scipy.spatial import cKDTree

from utils.errors import DataError
from utils.lens import project
from utils.mesh import keep_largest_components, read_mesh, select_faces
from utils.types import Scene, TriangleMesh

Floats = npt.NDArray[np.float64]

SPACING = 0.2
"""Millimetres between the points that stand for the mesh."""
MARGIN = 60.0
"""Millimetres by which the box of the scan grows below; above it is twice that."""
MAX_DISTANCE = 20.0
"""Millimetres from which on a distance is an outlier that does not count."""
NEUS_DILATION = 50 / 1600
"""Share of a picture's width by which NeuS grows the masks that cut: 50 of 1600 pixels (others: 12 or 24)."""
_VERTICES_AT_ONCE = 500_000
_QUERIES_AT_ONCE = 1_000_000
_SOURCE = (
    "give the folder that holds ObsMask/ (of SampleSet.zip, in 'MVS Data') and Points/stl/ (of Points.zip); "
    "both are at https://roboimagedata.compute.dtu.dk/?page_id=36"
)


def evaluate_dtu(
    mesh_path: str | Path, dtu_dir: str | Path, scan: int, scene: Scene | None = None, seed: int = 0
) -> dict[str, object]:
    """Measure a mesh file by the DTU protocol, ready for JSON.

    Args:
        mesh_path: a mesh, or a point cloud (no faces), in DTU's world frame (mm).
        dtu_dir: folder with ``ObsMask`` and ``Points``.
        scan: DTU's number of the scan, e.g. 65.
        scene: the scan with its masks; the mesh is cut by them and its largest component kept, as NeuS does.
            ``None``: the mesh is measured as it is.
        seed: of the order in which points are thinned out.

    Returns:
        ``accuracy`` (the port's mean_d2s, mesh to scan), ``completeness`` (mean_s2d, scan to mesh) and
        ``overall`` (their mean), in mm; ``*_points``, how many points were looked at for each, and
        ``*_outliers``, the share of these (0..1) left out for being 20 mm or more away; ``culled``, whether
        masks cut the mesh.

    Raises:
        DataError: a file is missing or unreadable, there are no masks to cull by, or no part of the mesh is
            where the scan is.
    """
    low, high, voxel, observed = _read_observation(Path(dtu_dir) / "ObsMask" / f"ObsMask{scan}_10.mat")
    plane_file = Path(dtu_dir) / "ObsMask" / f"Plane{scan}.mat"
    plane = np.asarray(_read_mat(plane_file, ("P",))["P"], np.float64).reshape(-1)
    if plane.shape != (4,):
        raise DataError(plane_file, f"P has {len(plane)} numbers instead of 4", _SOURCE)
    scan_file = Path(dtu_dir) / "Points" / "stl" / f"stl{scan:03}_total.ply"
    if not scan_file.is_file():
        raise DataError(scan_file, "no such file", _SOURCE)
    mesh = read_mesh(mesh_path)
    if scene is not None:
        mesh = keep_largest_components(cull_by_masks(mesh, scene))

    points = thin_points(points_on_mesh(mesh, low - MARGIN, high + 2 * MARGIN), SPACING, seed)
    index = np.rint((points - low) / voxel).astype(np.int64)
    inside = np.all((index >= 0) & (index < observed.shape), axis=1)
    inside[inside] = observed[tuple(index[inside].T)]
    truth = read_mesh(scan_file).vertices
    truth_above = truth[truth @ plane[:3] + plane[3] > 0]
    to_truth, to_mesh = _nearest(points[inside], truth), _nearest(truth_above, points)
    accuracy, accuracy_outliers = _mean_of_near(to_truth)
    completeness, completeness_outliers = _mean_of_near(to_mesh)
    if accuracy is None or completeness is None:
        raise DataError(
            mesh_path,
            f"no part of it is within {MAX_DISTANCE:g} mm of what was scanned",
            f"give the mesh of scan {scan} in world units, as --mesh writes it",
        )
    return {
        "mesh": str(mesh_path),
        "scan": scan,
        "unit": "mm",
        "culled": scene is not None,
        "accuracy": accuracy,
        "completeness": completeness,
        "overall": 0.5 * (accuracy + completeness),
        "accuracy_points": len(to_truth),
        "completeness_points": len(to_mesh),
        "accuracy_outliers": accuracy_outliers,
        "completeness_outliers": completeness_outliers,
    }


def cull_by_masks(mesh: TriangleMesh, scene: Scene, dilation: float = NEUS_DILATION) -> TriangleMesh:
    """Keep the faces whose corners all lie inside the grown masks of all views that show them.

    A view says nothing about what is behind it or outside of its frame.

    Args:
        mesh: in world coordinates.
        scene: its masks of all views are read, held out or not.
        dilation: how far each mask grows, as a share of its picture's width.

    Raises:
        DataError: the scene has no masks, or nothing is left.
    """
    if scene.masks is None:
        raise DataError(scene.name, "there are no masks to cull the mesh by", "set dataset.apply_mask=true")
    scene_from_world = np.linalg.inv(scene.world_from_scene.numpy())
    positions = mesh.vertices @ scene_from_world[:3, :3].T + scene_from_world[:3, 3]
    cameras = scene.metric().cameras
    is_kept = np.ones(len(positions), bool)
    for view in range(len(cameras)):
        mask = scene.masks.image(view)[..., 0].numpy()
        # Distances instead of a dilation: a disk of any size costs the same.
        distance = cv2.distanceTransform((mask < 128).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        grown = distance <= dilation * mask.shape[1]
        for start in range(0, len(positions), _VERTICES_AT_ONCE):
            part = slice(start, start + _VERTICES_AT_ONCE)
            pixels, _, shown = project(cameras, view, torch.from_numpy(positions[part]).float())
            column, row = pixels[shown].long().T.numpy()
            is_kept[part][shown.numpy()] &= grown[row, column]
    chosen = np.all(is_kept[mesh.faces], axis=1)
    if not chosen.any():
        raise DataError(
            scene.name, "no face of the mesh lies inside the masks", "give the mesh of this capture"
        )
    return select_faces(mesh, chosen)


def points_on_mesh(mesh: TriangleMesh, low: Floats, high: Floats, spacing: float = SPACING) -> Floats:
    """Cover the part of a mesh inside a box (``low <= point < high``) with points ``(P, 3)``.

    They are the vertices and, on each triangle, a regular grid with one point per ``spacing`` squared.
    """
    corners = mesh.vertices[mesh.faces]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    lengths = np.stack([np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)], axis=1)
    area = np.linalg.norm(np.cross(first, second), axis=1)
    has_area = area > 0
    corners, lengths, area = corners[has_area], lengths[has_area], area[has_area]
    # Steps along both sides whose parallelogram has the area spacing^2, however skew the triangle is.
    step = spacing * np.sqrt(lengths[:, 0] * lengths[:, 1] / area)
    divisions = np.floor(lengths / step[:, None]).astype(np.int64)
    count = _fill_triangles(corners, divisions, low, high, np.empty((0, 3)))
    points = np.empty((count, 3))
    _fill_triangles(corners, divisions, low, high, points)
    is_inside = ((mesh.vertices >= low) & (mesh.vertices < high)).all(axis=1)
    return np.concatenate([mesh.vertices[is_inside], points])


@no_type_check
@njit(cache=True)
def _fill_triangles(corners, divisions, low, high, points):
    """Write the grid points of triangles (F, 3, 3) in the box, as far as there is room; count them all."""
    count = 0
    for f in range(len(corners)):
        a, b, c = corners[f, 0], corners[f, 1], corners[f, 2]
        for i in range(divisions[f, 0]):
            u = (i + 0.5) / divisions[f, 0]
            for j in range(divisions[f, 1]):
                v = (j + 0.5) / divisions[f, 1]
                if u + v >= 1.0:
                    break
                x = a[0] + u * (b[0] - a[0]) + v * (c[0] - a[0])
                y = a[1] + u * (b[1] - a[1]) + v * (c[1] - a[1])
                z = a[2] + u * (b[2] - a[2]) + v * (c[2] - a[2])
                if low[0] <= x < high[0] and low[1] <= y < high[1] and low[2] <= z < high[2]:
                    if count < len(points):
                        points[count, 0], points[count, 1], points[count, 2] = x, y, z
                    count += 1
    return count


def thin_points(
    points: Float64[np.ndarray, "P 3"], spacing: float, seed: int = 0
) -> Float64[np.ndarray, "Q 3"]:
    """Keep each point, in an order shuffled by ``seed``, unless a kept one is within ``spacing``."""
    order = np.random.default_rng(seed).permutation(len(points))
    return points[_thin(points, order, spacing)]


@no_type_check
@njit(cache=True)
def _thin(points, order, spacing):
    """Whether each point (P, 3) is kept.

    heads   first kept point of each slot of a hash table of cells with side ``spacing``, or -1
    nexts   the kept point after a kept point in its slot, or -1

    Cells along z are neighbours in the table. Cells that share a slot cost a comparison and change nothing.
    """
    size = 1
    while size < len(points):
        size *= 2
    heads, nexts = np.full(size, -1, np.int32), np.empty(len(points), np.int32)
    is_kept = np.zeros(len(points), np.bool_)
    for p in order:
        x = np.int64(np.floor(points[p, 0] / spacing))
        y = np.int64(np.floor(points[p, 1] / spacing))
        z = np.int64(np.floor(points[p, 2] / spacing))
        is_free = True
        for column in range(9):
            base = (x + column // 3 - 1) * 73856093 ^ (y + column % 3 - 1) * 19349663
            for cell in range(z - 1, z + 2):
                q = heads[(base + cell) & (size - 1)]
                while q >= 0 and is_free:
                    squared = 0.0
                    for axis in range(3):
                        squared += (points[p, axis] - points[q, axis]) ** 2
                    is_free = squared > spacing * spacing
                    q = nexts[q]
            if not is_free:
                break
        if is_free:
            slot = ((x * 73856093 ^ y * 19349663) + z) & (size - 1)
            nexts[p], heads[slot], is_kept[p] = heads[slot], p, True
    return is_kept


def _nearest(points: Floats, targets: Floats) -> Floats:
    """Distance ``(P,)`` of each point to its nearest target; infinite from ``MAX_DISTANCE`` on."""
    if len(points) == 0 or len(targets) == 0:
        return np.full(len(points), np.inf)
    tree = cKDTree(targets, balanced_tree=False, compact_nodes=False)
    distances = np.empty(len(points))
    for start in range(0, len(points), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        distances[part] = tree.query(
            points[part], distance_upper_bound=MAX_DISTANCE, workers=min(os.cpu_count() or 1, 8)
        )[0]
    return distances


def _mean_of_near(distances: Floats) -> tuple[float | None, float]:
    """Mean of the finite distances (``None``: there are none), and the share of the others."""
    is_near = np.isfinite(distances)
    if not is_near.any():
        return None, 1.0
    return float(distances[is_near].mean()), float(1.0 - is_near.mean())


def _read_mat(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Arrays of a MATLAB file, by name."""
    if not path.is_file():
        raise DataError(path, "no such file", _SOURCE)
    try:
        arrays: dict[str, Any] = scipy.io.loadmat(path, variable_names=keys)
    except Exception as error:  # loadmat raises whatever a damaged file makes it stumble over.
        raise DataError(path, f"cannot be read as a MATLAB file ({error})", _SOURCE) from error
    absent = [key for key in keys if key not in arrays]
    if absent:
        raise DataError(path, f"holds no {', '.join(absent)}", _SOURCE)
    return arrays


def _read_observation(path: Path) -> tuple[Floats, Floats, float, Bool[np.ndarray, "X Y Z"]]:
    """Corners of the scanned box and side of its voxels, in mm, and which of them were scanned well."""
    arrays = _read_mat(path, ("ObsMask", "BB", "Res"))
    box, voxel, observed = np.asarray(arrays["BB"], np.float64), np.ravel(arrays["Res"]), arrays["ObsMask"]
    if box.shape != (2, 3) or voxel.shape != (1,) or voxel[0] <= 0 or observed.ndim != 3:
        raise DataError(
            path, f"BB, Res, ObsMask have the shapes {box.shape}, {voxel.shape}, {observed.shape}", _SOURCE
        )
    return box[0], box[1], float(voxel[0]), observed.astype(bool)
