"""What a user asks about a mesh before trusting it: counts, measures, and its holes.

A *boundary edge* has one face. Boundary edges that share vertices make up the rim of a hole; two holes that
touch in a vertex count as one. A hole's area is that of a fan from the middle of its rim: exact where the rim
is flat and star-shaped, otherwise more than that of the smallest patch, so that no hole is called small which
is not.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch

from utils.lens import project
from utils.mesh import FARTHEST_Z, face_areas_and_normals, face_components
from utils.types import Scene, TriangleMesh

RIM_MARGIN = 0.02
"""Share of the unit sphere's radius next to its wall, where it is the sphere that cuts the surface."""
MIN_VIEWS = 2
"""Training views that have to show a place for it to be observed, as in the occupancy grid."""


@dataclass(frozen=True)
class Holes:
    """The holes of a mesh."""

    edges: npt.NDArray[np.int64]
    """``(E, 2)`` vertices of the boundary edges."""
    labels: npt.NDArray[np.int64]
    """``(E,)`` the hole that each edge belongs to, numbered from 0."""
    areas: npt.NDArray[np.float64]
    """Of each hole, in squared units of the mesh."""


def _edges(mesh: TriangleMesh) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each edge once, ``(E, 2)``, lower vertex first, and how many faces it has."""
    count = max(len(mesh.vertices), 1)
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    keys, uses = np.unique(edges[:, 0] * count + edges[:, 1], return_counts=True)
    return np.stack([keys // count, keys % count], axis=1), uses


def find_holes(mesh: TriangleMesh) -> Holes:
    """Group the boundary edges of a mesh into holes and measure these."""
    edges, uses = _edges(mesh)
    return _holes_of(mesh, edges[uses == 1])


def _holes_of(mesh: TriangleMesh, edges: npt.NDArray[np.int64]) -> Holes:
    rim, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = scipy.sparse.coo_matrix((np.ones(len(ends), np.int8), tuple(ends.T)), (len(rim), len(rim)))
    num_holes, of_vertex = scipy.sparse.csgraph.connected_components(graph, directed=False)
    labels = of_vertex[ends[:, 0]].astype(np.int64)
    first, second = mesh.vertices[edges[:, 0]], mesh.vertices[edges[:, 1]]
    # The middle of the rim as a curve, whichever way it is cut into edges.
    lengths = np.linalg.norm(second - first, axis=1)
    total = np.maximum(np.bincount(labels, lengths, num_holes), 1e-300)
    moments = lengths[:, None] * 0.5 * (first + second)
    middle = np.stack([np.bincount(labels, moments[:, axis], num_holes) for axis in range(3)], axis=1)
    middle = (middle / total[:, None])[labels]
    fan = 0.5 * np.linalg.norm(np.cross(first - middle, second - middle), axis=1)
    return Holes(edges, labels, np.bincount(labels, fan, num_holes).astype(np.float64))


def mesh_report(mesh: TriangleMesh) -> dict[str, object]:
    """Counts and measures of a mesh, ready for JSON: what a user asks before trusting it.

    ``boundary_edges`` have one face, ``holes`` are their loops and ``hole_area`` the sum of their areas (see
    the module); ``nonmanifold_edges`` have more than two; ``watertight`` means neither kind exists.
    ``volume`` is signed (positive = normals point out) and in cubed units of the mesh; it means little with
    holes.
    """
    edges, uses = _edges(mesh)
    holes, nonmanifold = _holes_of(mesh, edges[uses == 1]), int((uses > 2).sum())
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    has_vertices = len(mesh.vertices) > 0
    return {
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "components": int(face_components(mesh).max(initial=-1)) + 1,
        "boundary_edges": len(holes.edges),
        "holes": len(holes.areas),
        "hole_area": float(holes.areas.sum()),
        "nonmanifold_edges": nonmanifold,
        "watertight": len(mesh.faces) > 0 and len(holes.edges) == 0 and nonmanifold == 0,
        "euler_number": len(np.unique(mesh.faces)) - len(edges) + len(mesh.faces),
        "area": float(face_areas_and_normals(mesh)[0].sum()),
        "volume": float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0),
        "bounds": [mesh.vertices.min(axis=0).tolist(), mesh.vertices.max(axis=0).tolist()]
        if has_vertices
        else [],
    }


def observed_holes(mesh: TriangleMesh, scene: Scene) -> dict[str, object]:
    """The holes of a mesh where the photographs look, ready for JSON: those that are the method's fault.

    Observed are boundary edges whose middle lies inside the unit sphere, 2 % of its radius away from the
    wall that cuts every surface, and in the frame of at least two training views (of one, if there is only
    one). That something may stand in between is not looked at.

    Args:
        mesh: in scene space (the warped one, if the cameras have one).
        scene: gives the training cameras and the world's unit.

    Returns:
        ``observed_boundary_edges``; ``observed_holes``, which have such edges; ``observed_hole_area``, all of
        these holes' areas, in squared world units (of the unwarped surface).
    """
    holes = find_holes(mesh)
    areas = holes.areas
    if scene.cameras.ndc is not None:
        # A hole that reaches infinity is measured up to where the written mesh ends: one number without
        # bound would drown the others.
        ends = np.minimum(mesh.vertices, [np.inf, np.inf, FARTHEST_Z])
        metric = scene.cameras.ndc.to_metric(torch.from_numpy(ends)).numpy()
        areas = _holes_of(replace(mesh, vertices=metric), holes.edges).areas
    middle = mesh.vertices[holes.edges].mean(axis=1)
    is_observed = np.linalg.norm(middle, axis=1) < 1.0 - RIM_MARGIN
    views = np.zeros(int(is_observed.sum()), np.int64)
    for view in scene.train_indices if len(views) else ():
        positions = torch.from_numpy(middle[is_observed]).float()
        views += project(scene.cameras, view, positions)[2].numpy()
    is_observed[is_observed] = views >= min(MIN_VIEWS, len(scene.train_indices))
    found = np.unique(holes.labels[is_observed])
    scale = scene.world_scale
    return {
        "observed_boundary_edges": int(is_observed.sum()),
        "observed_holes": len(found),
        "observed_hole_area": float(areas[found].sum()) * scale**2,
    }
