"""Triangle meshes: clean, transform, measure, sample, read and write.

Files: PLY (binary, uint8 ``red green blue``, perhaps ``seen``), OBJ (``v x y z r g b``), STL (binary, shape
alone) keep the axes and units of the mesh. GLB is turned so that ``up`` becomes +Y, and its colours are
linear light, both as glTF 2.0 demands.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch

from utils.errors import DataError, ExportError
from utils.ndc import NDC
from utils.types import TriangleMesh

Floats = npt.NDArray[np.float64]
Up = Literal["x", "y", "z", "-x", "-y", "-z"]
"""Which axis of a mesh points up."""
_ROWS_AT_ONCE = 20_000
FARTHEST_Z = (1.0 - 1e-3) / 3**0.5
"""Where warped surfaces (``dataset.ndc``) end, a thousandth before infinity."""


def face_areas_and_normals(mesh: TriangleMesh) -> tuple[Floats, Floats]:
    """Areas ``(F,)`` and unit normals ``(F, 3)``; a face without area has the normal zero."""
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    cross = np.cross(b - a, c - a)
    length = np.linalg.norm(cross, axis=1)
    return 0.5 * length, cross / np.maximum(length, 1e-300)[:, None]


def vertex_normals(mesh: TriangleMesh) -> npt.NDArray[np.float32]:
    """Unit normals ``(V, 3)`` from the geometry: the area-weighted mean of the faces around each vertex.

    A vertex without a face, or whose faces cancel, gets +z, so that every normal has unit length.
    """
    areas, normals = face_areas_and_normals(mesh)
    rows, count = mesh.faces.reshape(-1), len(mesh.vertices)
    summed = np.stack(
        [np.bincount(rows, np.repeat(areas * normals[:, axis], 3), count) for axis in range(3)], axis=1
    )
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    unit = np.where(length > 1e-300, summed / np.maximum(length, 1e-300), [0.0, 0.0, 1.0])
    return unit.astype(np.float32)


def select_faces(mesh: TriangleMesh, chosen: npt.NDArray[np.bool_]) -> TriangleMesh:
    """The mesh of the faces where ``chosen (F,)`` is true, without the vertices left unused."""
    faces = mesh.faces[chosen]
    used = np.zeros(len(mesh.vertices), bool)
    used[faces] = True
    return TriangleMesh(
        mesh.vertices[used],
        (np.cumsum(used) - 1)[faces],
        None if mesh.normals is None else mesh.normals[used],
        None if mesh.colors is None else mesh.colors[used],
        None if mesh.views is None else mesh.views[used],
    )


def face_components(mesh: TriangleMesh) -> npt.NDArray[np.int64]:
    """The connected component (faces that share vertices) of each face, ``(F,)``, numbered from 0."""
    count = len(mesh.vertices)
    starts, ends = mesh.faces[:, [0, 1]].reshape(-1), mesh.faces[:, [1, 2]].reshape(-1)
    graph = scipy.sparse.coo_matrix((np.ones(len(starts), np.int8), (starts, ends)), (count, count))
    labels = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    of_face = labels[mesh.faces[:, 0]] if len(mesh.faces) else np.empty(0, np.int64)
    return np.unique(of_face, return_inverse=True)[1].astype(np.int64)


def keep_largest_components(mesh: TriangleMesh, num: int = 1, min_faces: int = 0) -> TriangleMesh:
    """Keep the ``num`` components with the most faces (0 = all) that have at least ``min_faces`` faces.

    Raises:
        ExportError: nothing is left.
    """
    component = face_components(mesh)
    sizes = np.bincount(component)
    ranked = np.argsort(-sizes, kind="stable")[: num if num > 0 else None]
    kept = ranked[sizes[ranked] >= min_faces]
    if len(kept) == 0:
        largest = f"the largest of {len(sizes)} components has {sizes.max(initial=0)} faces"
        raise ExportError(
            "export.min_faces", f"no part of the mesh has {min_faces} faces ({largest})", "lower it"
        )
    return select_faces(mesh, np.isin(component, kept))


def drop_shells(
    mesh: TriangleMesh, radius: float = 1.0, margin: float = 0.02, share: float = 0.3
) -> TriangleMesh:
    """Drop components that lie glued to the wall of the region, as backgrounds do.

    A component goes when more than ``share`` of its area lies within ``margin`` (relative) of the sphere of
    ``radius`` around the origin. When that would leave nothing, the mesh is returned as it is.
    """
    component = face_components(mesh)
    areas = face_areas_and_normals(mesh)[0]
    centres = mesh.vertices[mesh.faces].mean(axis=1)
    at_wall = np.linalg.norm(centres, axis=1) > (1.0 - margin) * radius
    total = np.bincount(component, areas)
    shell = np.bincount(component, areas * at_wall) > share * total
    return mesh if shell.all() or not shell.any() else select_faces(mesh, ~shell[component])


def transform_mesh(mesh: TriangleMesh, matrix: Floats) -> TriangleMesh:
    """Apply an affine ``(4, 4)`` matrix to vertices and normals; a reflection also turns the faces around.

    Raises:
        ValueError: the matrix is not (4, 4) or cannot be inverted.
    """
    linear = np.asarray(matrix, np.float64)[:3, :3]
    determinant = np.linalg.det(linear)
    if np.shape(matrix) != (4, 4) or determinant == 0:
        raise ValueError("a mesh is transformed by an invertible (4, 4) matrix")
    vertices = mesh.vertices @ linear.T + np.asarray(matrix, np.float64)[:3, 3]
    normals = mesh.normals
    if normals is not None:
        turned = normals @ np.linalg.inv(linear)
        normals = (turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-300)).astype(
            np.float32
        )
    faces = mesh.faces if determinant > 0 else np.ascontiguousarray(mesh.faces[:, ::-1])
    return replace(mesh, vertices=vertices, faces=faces, normals=normals)


def unwarp_mesh(mesh: TriangleMesh, ndc: NDC) -> TriangleMesh:
    """Bring a mesh from the warped space of a forward-facing scene back to the metric scene.

    Faces within a thousandth of infinity are left out; normals are those of the geometry, because the warp
    keeps no angles.
    """
    vertices = ndc.to_metric(torch.from_numpy(mesh.vertices)).numpy()
    is_finite = mesh.vertices[:, 2] < FARTHEST_Z
    faces = mesh.faces[is_finite[mesh.faces].all(axis=1)]
    used, faces = np.unique(faces, return_inverse=True)
    colors = None if mesh.colors is None else mesh.colors[used]
    metric = TriangleMesh(vertices[used], faces.reshape(-1, 3).astype(np.int64), None, colors)
    return metric if mesh.normals is None else replace(metric, normals=vertex_normals(metric))


def sample_surface(
    mesh: TriangleMesh, num_samples: int, seed: int = 0
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Draw points uniformly by area: positions ``(num_samples, 3)`` and the faces ``(num_samples,)`` below.

    The faces are visited in order at evenly spaced, jittered shares of the area, which spreads the points
    better than independent draws and gives each face its due count to within one.

    Raises:
        ValueError: the mesh has no area.
    """
    cumulative = np.cumsum(face_areas_and_normals(mesh)[0])
    if len(cumulative) == 0 or cumulative[-1] <= 0:
        raise ValueError("a mesh without area cannot be sampled")
    generator = np.random.default_rng(seed)
    shares = (np.arange(num_samples) + generator.random(num_samples)) / num_samples
    faces = np.minimum(
        np.searchsorted(cumulative, shares * cumulative[-1], side="right"), len(cumulative) - 1
    )
    u, v = generator.random((2, num_samples, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = (mesh.vertices[mesh.faces[faces, corner]] for corner in range(3))
    return a + u * (b - a) + v * (c - a), faces


def read_mesh(path: str | Path) -> TriangleMesh:
    """Read a mesh or point cloud (no faces) in any format that trimesh knows, axes and vertices as stored.

    Vertex colours are sRGB, whatever the file holds; normals are left out (:func:`vertex_normals` makes
    them).

    Raises:
        DataError: no such file, unreadable, or without vertices.
    """
    import trimesh  # Takes a good part of a second, and training never needs it.

    path = Path(path)
    if not path.is_file():
        raise DataError(path, "no such file", "check the path")
    try:
        loaded = trimesh.load(path, process=False, skip_materials=True)
        if isinstance(loaded, trimesh.Scene):
            parts = loaded.dump()  # With the scene's transforms applied.
            loaded = parts[0] if len(parts) == 1 else trimesh.util.concatenate(parts)
    except Exception as error:  # trimesh's readers raise whatever a damaged file makes them stumble over.
        raise DataError(
            path, f"cannot be read as a mesh ({error})", "give a PLY, OBJ, STL or GLB file"
        ) from error
    vertices = np.asarray(getattr(loaded, "vertices", np.empty((0, 3))), np.float64)
    if len(vertices) == 0:
        raise DataError(path, "holds no vertices", "give a mesh or a point cloud")
    faces = np.asarray(getattr(loaded, "faces", np.empty((0, 3))), np.int64).reshape(-1, 3)
    if not np.isfinite(vertices).all() or (
        len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices)
    ):
        raise DataError(path, "has broken vertices or faces", "write it again")
    colors = _vertex_colors(loaded)
    if colors is not None and path.suffix.lower() in (".glb", ".gltf"):
        colors = srgb_from_linear(colors / 255.0)
    return TriangleMesh(vertices, faces, None, colors)


def _vertex_colors(loaded: Any) -> npt.NDArray[np.uint8] | None:
    """What trimesh holds as colours ``(V, 3)``, of a mesh or of a point cloud."""
    colors = getattr(loaded, "colors", None)  # Point clouds.
    visual = getattr(loaded, "visual", None)
    if visual is not None and visual.kind == "vertex":
        colors = visual.vertex_colors
    if colors is None or len(colors) != len(loaded.vertices):
        return None
    return np.asarray(colors, np.uint8)[:, :3].copy()


def write_mesh(path: str | Path, mesh: TriangleMesh, y_up: Floats | None = None) -> None:
    """Write ``.ply``, ``.obj``, ``.stl`` or ``.glb``, whole or not at all.

    Args:
        path: where to; the ending chooses the format, missing folders are made.
        mesh: normals and colours are written when present (STL holds neither), ``views`` to PLY alone.
        y_up: rotation ``(4, 4)`` that turns the mesh's upward direction to +Y, for GLB; absent: z is up.

    Raises:
        ExportError: the ending is unknown, or the file cannot be written.
    """
    path = Path(path)
    encoders: dict[str, Callable[[], bytes]] = {
        ".ply": lambda: _ply_bytes(mesh),
        ".obj": lambda: _obj_bytes(mesh),
        ".stl": lambda: _stl_bytes(mesh),
        ".glb": lambda: _glb_bytes(transform_mesh(mesh, y_up_from("z") if y_up is None else y_up)),
    }
    encode = encoders.get(path.suffix.lower())
    if encode is None:
        raise ExportError(path, "no known mesh format", f"end the name in {', '.join(encoders)}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encode())
        os.replace(part, path)
    except OSError as error:
        raise ExportError(
            path, f"cannot be written ({error})", "check permissions and free disk space"
        ) from error


def y_up_from(up: Up) -> Floats:
    """The rotation ``(4, 4)`` that turns the axis ``up`` to +Y; ``z`` gives (x, y, z) -> (x, z, -y)."""
    axis, sign = "xyz".index(up[-1]), -1.0 if up[0] == "-" else 1.0
    matrix = np.eye(4)
    if axis == 1:
        matrix[1, 1] = matrix[2, 2] = sign  # Half a turn about x when y points down.
        return matrix
    other = 2 - axis
    matrix[:3, :3] = 0.0
    matrix[1, axis] = sign
    matrix[axis, 1] = -sign
    matrix[other, other] = 1.0
    return matrix


def _float_type(mesh: TriangleMesh) -> str:
    """float32 unless that would move vertices visibly (captures in map coordinates)."""
    if len(mesh.vertices) == 0:
        return "<f4"
    extent = float(np.ptp(mesh.vertices, axis=0).max())
    return "<f8" if float(np.abs(mesh.vertices).max()) * 2**-23 > 1e-5 * extent else "<f4"


def _ply_bytes(mesh: TriangleMesh) -> bytes:
    real = _float_type(mesh)
    word = {"<f4": "float", "<f8": "double"}[real]
    columns: list[tuple[str, str, str, npt.NDArray[np.generic]]] = [
        (name, real, word, mesh.vertices[:, axis]) for axis, name in enumerate("xyz")
    ]
    if mesh.normals is not None:
        columns += [(f"n{name}", "<f4", "float", mesh.normals[:, axis]) for axis, name in enumerate("xyz")]
    if mesh.colors is not None:
        names = enumerate(("red", "green", "blue"))
        columns += [(name, "u1", "uchar", mesh.colors[:, axis]) for axis, name in names]
    if mesh.views is not None:
        columns.append(("seen", "u1", "uchar", np.minimum(mesh.views, 255)))
    rows = np.empty(len(mesh.vertices), [(name, kind) for name, kind, _, _ in columns])
    for name, _, _, values in columns:
        rows[name] = values
    faces = np.empty(len(mesh.faces), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, mesh.faces
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    lines += [f"property {word} {name}" for name, _, word, _ in columns]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    return "\n".join(lines).encode() + rows.tobytes() + faces.tobytes()


def _format_rows(line: str, rows: npt.NDArray[np.generic]) -> bytes:
    """``line`` filled with each row, thousands at a time, which is several times faster than one by one."""
    pieces = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        pieces.append((line * len(part) % tuple(part.reshape(-1).tolist())).encode())
    return b"".join(pieces)


def _obj_bytes(mesh: TriangleMesh) -> bytes:
    position = "v %.12g %.12g %.12g" if _float_type(mesh) == "<f8" else "v %.8g %.8g %.8g"
    if mesh.colors is None:
        text = _format_rows(position + "\n", mesh.vertices)
    else:
        text = _format_rows(position + " %.4f %.4f %.4f\n", np.hstack([mesh.vertices, mesh.colors / 255.0]))
    if mesh.normals is None:
        return text + _format_rows("f %d %d %d\n", mesh.faces + 1)
    text += _format_rows("vn %.5f %.5f %.5f\n", mesh.normals)
    return text + _format_rows("f %d//%d %d//%d %d//%d\n", np.repeat(mesh.faces + 1, 2, axis=1))


def _stl_bytes(mesh: TriangleMesh) -> bytes:
    rows = np.zeros(len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    rows["normal"], rows["corners"] = face_areas_and_normals(mesh)[1], mesh.vertices[mesh.faces]
    return b"binary STL".ljust(80) + struct.pack("<I", len(rows)) + rows.tobytes()


def linear_from_srgb(colors: npt.NDArray[np.uint8]) -> Floats:
    """Linear light 0..1 from sRGB 0..255 (IEC 61966-2-1)."""
    srgb = colors / 255.0
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def srgb_from_linear(light: Floats) -> npt.NDArray[np.uint8]:
    """SRGB 0..255 from linear light 0..1, the inverse of :func:`linear_from_srgb`."""
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0) ** (1 / 2.4) - 0.055)
    return np.rint(255.0 * np.clip(srgb, 0.0, 1.0)).astype(np.uint8)


def _glb_bytes(mesh: TriangleMesh) -> bytes:
    """One mesh in glTF 2.0's binary container; every part is a multiple of 4 bytes, as the format demands."""
    positions = mesh.vertices.astype("<f4")
    parts = [mesh.faces.astype("<u4").tobytes(), positions.tobytes()]
    count = len(positions)
    limits = {"min": positions.min(axis=0).tolist(), "max": positions.max(axis=0).tolist()}
    accessors: list[dict[str, object]] = [
        {"componentType": 5125, "count": mesh.faces.size, "type": "SCALAR"},
        {"componentType": 5126, "count": count, "type": "VEC3", **limits},
    ]
    attributes = {"POSITION": 1}
    if mesh.normals is not None:
        attributes["NORMAL"] = len(parts)
        parts.append(mesh.normals.astype("<f4").tobytes())
        accessors.append({"componentType": 5126, "count": count, "type": "VEC3"})
    if mesh.colors is not None:
        # Floats, since 8 bits are too few for dark colours in linear light, and readers differ about 16.
        attributes["COLOR_0"] = len(parts)
        parts.append(linear_from_srgb(mesh.colors).astype("<f4").tobytes())
        accessors.append({"componentType": 5126, "count": count, "type": "VEC3"})
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).tolist()
    views: list[dict[str, object]] = []
    for number, part in enumerate(parts):
        target = 34963 if number == 0 else 34962  # Element indices, vertex attributes.
        views.append({"buffer": 0, "byteOffset": offsets[number], "byteLength": len(part), "target": target})
        accessors[number]["bufferView"] = number
    material = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "surface"}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": 0, "material": 0}]}],
        "materials": [material],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": offsets[-1]}],
    }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    blob = b"".join(parts)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(blob))
    return (
        header
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + struct.pack("<I4s", len(blob), b"BIN\0")
        + blob
    )
