"""From a trained model to files: the surface with normals and colours, in world units, and its measures.

    extract (scene) -> shells and floaters off -> normals, colours -> world -> files

Normals are the gradient of the signed distance and colours the radiance seen from straight above each vertex:
the field is asked exactly at the surface, so that nothing from the space around it is mixed in.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from models.model import SurfaceModel
from process_data.geometry import up_axis
from utils.errors import ConfigError, ExportError
from utils.extraction import extract_surface
from utils.images import write_png
from utils.memory import Chunks
from utils.mesh import (
    Up,
    drop_shells,
    keep_largest_components,
    transform_mesh,
    unwarp_mesh,
    vertex_normals,
    write_mesh,
    y_up_from,
)
from utils.mesh_report import mesh_report, observed_holes
from utils.metrics import compare_surfaces
from utils.raster import contact_sheet
from utils.types import Scene, TriangleMesh
from utils.visibility import Sight, cut_unseen, sight_of, views_to_look_through

logger = logging.getLogger("systems.export")


@dataclass(frozen=True)
class ExportConfig:
    """How the surface is extracted and written."""

    resolution: int = 512
    """Voxels along each side of the box around the unit sphere, >= 8; 512 gives about a million faces."""
    extent: float = 1.0
    """Half a side of the cube in which the surface is looked for, scene units. 1: within the unit sphere;
    more, of methods whose field reaches further (in contracted space): what is around it, too."""
    formats: tuple[str, ...] = ("ply",)
    """Files written besides each other: ply, obj, glb, stl."""
    keep_components: int = 1
    """Connected parts kept, largest first; 0 keeps all."""
    min_faces: int = 20
    """Parts with fewer faces are dropped as debris."""
    cull_shells: bool = True
    """Drop parts that lie on the wall of the unit sphere with over 30 % of their area (backgrounds)."""
    unseen: Literal["keep", "cut", "flag"] = "keep"
    """What becomes of the surface where no camera looked, which is a guess: keep closes it (for printing),
    cut removes it, flag keeps it and writes to the PLY, as ``seen``, how many training views show it (of
    more than 100, so many are looked through)."""
    min_views: int = 2
    """Training views that have to show a place for it to be seen (with a single one, that one), >= 1."""
    up: Up | Literal["auto"] = "auto"
    """Which way is up, for GLB (whose up is +Y) alone: a world axis (x, y, z, -x, -y, -z), or auto: the axis
    of the scene that is up for the cameras, +z unless the format has axes of its own (see dataset.up)."""
    lipschitz: float = 1.5
    """Slope of the signed distance up to which no part of the surface is missed; more is safer, slower."""
    chunk: int = 2**18
    """Points asked of the model at once; halved when memory runs out."""

    def __post_init__(self) -> None:
        remedies = {
            "resolution": (self.resolution >= 8, "give at least 8"),
            "extent": (1.0 <= self.extent <= 100.0, "give 1 to 100"),
            "formats": (
                len(self.formats) > 0 and set(self.formats) <= {"ply", "obj", "glb", "stl"},
                "give some of ply, obj, glb, stl",
            ),
            "keep_components": (self.keep_components >= 0, "give 0 (all) or more"),
            "min_faces": (self.min_faces >= 0, "give 0 or more"),
            "unseen": (self.unseen != "flag" or "ply" in self.formats, "add ply to export.formats"),
            "min_views": (self.min_views >= 1, "give 1 or more"),
            "up": (self.up in ("auto", "x", "y", "z", "-x", "-y", "-z"), "give auto, x, y, z, -x, -y or -z"),
            "lipschitz": (self.lipschitz > 0, "give a positive slope, 1 for an exact distance"),
            "chunk": (self.chunk >= 1, "give at least 1"),
        }
        for name, (is_valid, remedy) in remedies.items():
            if not is_valid:
                raise ConfigError(f"export.{name}", f"{getattr(self, name)!r} does not work", remedy)


@runtime_checkable
class HasExport(Protocol):
    """The part of the whole configuration that is read here."""

    @property
    def export(self) -> ExportConfig:
        """The section ``export``."""


@runtime_checkable
class HasFolder(Protocol):
    """The part of a run that is used here."""

    @property
    def folder(self) -> Path:
        """Where the run's outputs go."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how good it is."""

    step: int
    paths: tuple[Path, ...]
    """Mesh files, then ``transform.json`` and ``mesh.png``."""
    mesh: dict[str, object]
    """:func:`utils.mesh_report.mesh_report` and :func:`utils.mesh_report.observed_holes`, in world units."""
    geometry: dict[str, float | None] | None
    """:func:`utils.metrics.compare_surfaces` to the reference mesh in world units; ``None`` without one."""
    in_scene: TriangleMesh
    """The written surface in metric scene space."""


def export_mesh(
    config: HasExport, scene: Scene, model: SurfaceModel, run: HasFolder, step: int
) -> ExportReport:
    """Extract, clean, colour and write the surface to ``run.folder/save``; compare it with the truth.

    Args:
        config: anything with a section ``export``.
        scene: gives ``world_from_scene`` and perhaps a reference mesh.
        model: answers for the surface.
        run: gives the folder.
        step: of the checkpoint, for the reports.

    Returns:
        Paths and measures.

    Raises:
        ExportError: no surface, nothing left after cleaning, colours that cannot be right, files that
            cannot be written, or no memory for a single point.
    """
    settings, folder = config.export, Path(run.folder) / "save"
    chunks = Chunks("points", settings.chunk, "export.chunk")
    found = extract_surface(
        model.query_sdf,
        settings.resolution,
        settings.extent,
        clip_to_sphere=settings.extent == 1.0,
        lipschitz=settings.lipschitz,
        chunks=chunks,
        device=model.device,
    )
    in_scene = clean_surface(found, settings)
    dropped = len(found.faces) - len(in_scene.faces)
    logger.info(
        "kept %s faces, dropped %s in shells and floaters", f"{len(in_scene.faces):,}", f"{dropped:,}"
    )
    observed = observed_holes(in_scene, scene)
    ndc = scene.cameras.ndc
    # In NDC the mesh is still warped, and directions in the world mean nothing to the model.
    sight = sight_of(in_scene, scene) if ndc is None else None
    in_scene = shade_surface(in_scene, model, chunks, sight)
    if ndc is not None:
        in_scene = unwarp_mesh(in_scene, ndc)
    in_scene = judge_unseen(in_scene, scene, settings, sight)
    world_from_scene = scene.world_from_scene.cpu().numpy()
    mesh = transform_mesh(in_scene, world_from_scene)

    y_up = _y_up(settings.up, scene)
    paths = [folder / f"mesh.{ending}" for ending in settings.formats]
    for path in paths:
        write_mesh(path, mesh, y_up)
    transform, picture = folder / "transform.json", folder / "mesh.png"
    _write_transform(transform, world_from_scene, y_up[1, :3], step)
    # In scene axes, because a capture's world may be tilted in any way.
    write_png(picture, contact_sheet(in_scene))
    paths += [transform, picture]

    truth = scene.reference_mesh
    geometry = None if truth is None else compare_surfaces(mesh, truth, scene.world_scale)
    report = ExportReport(step, tuple(paths), mesh_report(mesh) | observed, geometry, in_scene)
    _log_report(report)
    return report


def clean_surface(mesh: TriangleMesh, settings: ExportConfig) -> TriangleMesh:
    """Drop shells at the wall of the unit sphere, where it is one, then all but the largest parts.

    Raises:
        ExportError: nothing is left.
    """
    if settings.cull_shells and settings.extent == 1.0:
        mesh = drop_shells(mesh)
    return keep_largest_components(mesh, settings.keep_components, settings.min_faces)


def judge_unseen(
    mesh: TriangleMesh, scene: Scene, settings: ExportConfig, sight: Sight | None = None
) -> TriangleMesh:
    """Cut off or mark what no camera saw, as ``export.unseen`` says; ``mesh`` is in metric scene space.

    Raises:
        ExportError: nothing is left.
    """
    if settings.unseen == "keep":
        return mesh
    views = (sight or sight_of(mesh, scene)).views
    if settings.unseen == "flag":
        return replace(mesh, views=views)
    least = min(settings.min_views, len(views_to_look_through(scene)))
    kept = cut_unseen(mesh, views, least)
    logger.info(
        "cut off %s faces that fewer than %d training views show (export.unseen=keep closes the surface)",
        f"{len(mesh.faces) - len(kept.faces):,}",
        least,
    )
    return kept


def shade_surface(
    mesh: TriangleMesh, model: SurfaceModel, chunks: Chunks, sight: Sight | None = None
) -> TriangleMesh:
    """Add normals and colours from the model to a mesh in scene space.

    A gradient that vanishes leaves the normal of the geometry. Colours are seen from where the photographs
    were taken, on average; where none shows the place, or without a ``sight``, along minus the normal.

    Args:
        mesh: in the model's space.
        model: the surface.
        chunks: how many points at once.
        sight: of this very mesh.

    Raises:
        ExportError: more than 99 % of the colours are equal, as with a colour network that was never trained
            or loaded; or the device has no memory for a single vertex.
    """
    device = model.device
    fallback = torch.from_numpy(vertex_normals(mesh)).to(device)
    positions = torch.from_numpy(mesh.vertices.astype(np.float32)).to(device)
    towards = torch.zeros_like(positions) if sight is None else torch.from_numpy(sight.towards).to(device)

    def shade(part: slice) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        gradient = model.query_gradient(positions[part])
        length = gradient.norm(dim=1, keepdim=True)
        usable = torch.isfinite(length) & (length > 1e-6)
        normal = torch.where(usable, gradient / length.clamp_min(1e-6), fallback[part])
        is_seen = towards[part].any(dim=1, keepdim=True)
        rgb = model.query_color(positions[part], -torch.where(is_seen, towards[part], normal))
        color = (255.0 * rgb.float().nan_to_num().clamp(0.0, 1.0)).round().to(torch.uint8)
        return normal.float().cpu().numpy(), color.cpu().numpy()

    normals, colors = zip(*(pair for _, pair in chunks.results(shade, len(positions))), strict=True)
    shaded = replace(mesh, normals=np.concatenate(normals), colors=np.concatenate(colors))
    _check_colors(np.concatenate(colors))
    return shaded


def _check_colors(colors: npt.NDArray[np.uint8]) -> None:
    packed = colors.astype(np.int64) @ np.array([65536, 256, 1])
    values, counts = np.unique(packed, return_counts=True)
    if counts.max() > 0.99 * len(packed):
        common = int(values[counts.argmax()])
        shown = f"({common >> 16}, {common >> 8 & 255}, {common & 255})"
        raise ExportError(
            "mesh",
            f"{100.0 * counts.max() / len(packed):.1f} % of the vertex colours are {shown}",
            "the radiance network was not trained or not loaded: use a later checkpoint",
        )


def _y_up(up: Up | Literal["auto"], scene: Scene) -> npt.NDArray[np.float64]:
    """The rotation (4, 4) from world axes to GLB's, whose +Y points up."""
    if up != "auto":
        return y_up_from(up)
    seen = up_axis(scene.cameras.c2w.double().numpy())
    # Axes of a region that the format names may mean nothing: believe them where the cameras agree.
    steepest = int(np.abs(seen).argmax())
    axis = ("-" if seen[steepest] < 0 else "") + "xyz"[steepest]
    world_from_scene = scene.world_from_scene.numpy()
    turn = np.eye(4)
    turn[:3, :3] = world_from_scene[:3, :3].T / np.cbrt(np.linalg.det(world_from_scene[:3, :3]))
    return y_up_from(cast(Up, axis)) @ turn


def _write_transform(
    path: Path, world_from_scene: npt.NDArray[np.float64], up: npt.NDArray[np.float64], step: int
) -> None:
    content = {
        "world_from_scene": world_from_scene.tolist(),
        "scene_from_world": np.linalg.inv(world_from_scene).tolist(),
        "scale": float(np.cbrt(np.linalg.det(world_from_scene[:3, :3]))),
        "frame": "ply, obj and stl hold world coordinates: the axes and units of the input cameras. "
        "world = world_from_scene @ [x, y, z, 1] leads there from the unit sphere of training.",
        "up": up.tolist(),
        "glb": "glb holds world coordinates turned so that up becomes +Y; its colours are linear light.",
        "step": step,
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(
            path, f"cannot be written ({error})", "check permissions and free disk space"
        ) from error


def _log_report(report: ExportReport) -> None:
    mesh = report.mesh
    logger.info(
        "mesh: %s vertices, %s faces, %s component(s), volume %.6g, watertight: %s",
        *(mesh[key] for key in ("vertices", "faces", "components", "volume", "watertight")),
    )
    logger.info(
        "holes: %s with %s boundary edges and an area of %.4g; "
        "where the photographs look: %s with %s boundary edges and an area of %.4g",
        *(mesh[key] for key in ("holes", "boundary_edges", "hole_area")),
        *(mesh[key] for key in ("observed_holes", "observed_boundary_edges", "observed_hole_area")),
    )
    if report.geometry is not None:
        logger.info(
            "distance to the reference: %s", {k: float(f"{v:.5g}") for k, v in report.geometry.items()}
        )
    for path in report.paths:
        logger.info("wrote %s", path.absolute())
    logger.info("Blender shows the colours in Material Preview once the base colour is the colour attribute")
