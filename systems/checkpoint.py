"""Checkpoints: tensors, numbers, strings and dictionaries, which ``torch.load(weights_only=True)`` reads.

A file is written next to its final name, flushed to the disk and renamed: whatever happens on the way, the
previous checkpoint is still there.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.schema import as_written, setting_at

FORMAT_VERSION = 1
"""Raised whenever older code could not read what newer code writes."""
_REMEDY = "use the config of that run (config/parsed.yaml beside the ckpt folder)"
_MEANING = (
    *("model.name", "model.density", "model.activation"),
    *("model.contraction", "model.encoding.contracted", "model.unit"),
    *("model.sdf.hash_grid.base_resolution", "model.sdf.hash_grid.max_resolution"),
    *("model.density_field.hash_grid.base_resolution", "model.density_field.hash_grid.max_resolution"),
    *("model.background.hash_grid.base_resolution", "model.background.hash_grid.max_resolution"),
    *("model.proposal.base_resolution", "model.proposal.max_resolutions"),
    *("model.background.proposal.base_resolution", "model.background.proposal.max_resolutions"),
)
"""Keys that say what weights mean, not how many there are: with other values they load and show nonsense."""


def write_file(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically.

    Raises:
        CheckpointError: no permission, disk full; an older file of that name is left as it was.
    """
    temporary = path.with_suffix(path.suffix + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            path,
            f"cannot be written ({error})",
            "free disk space or choose --outputs_dir; earlier checkpoints are kept",
        ) from error


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``ckpt_<step>.pth`` and let ``last.pth`` be the same file; all but the ``keep`` newest go.

    ``last.pth`` is a hard link where the file system has them, else a copy; it is replaced atomically.
    """
    path = folder / f"ckpt_{step:06d}.pth"
    write_file(path, {"format_version": FORMAT_VERSION, "step": step, **state})
    pointer = folder / "last.pth.partial"
    pointer.unlink(missing_ok=True)
    try:
        os.link(path, pointer)
        pointer.replace(folder / "last.pth")
    except OSError:
        write_file(folder / "last.pth", {"format_version": FORMAT_VERSION, "step": step, **state})
    # By age, not by step: a run resumed from an older checkpoint writes lower steps than lie there already.
    others = [file for file in folder.glob("ckpt_*.pth") if file != path]
    others.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for old in others[keep - 1 :]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: missing, truncated or corrupt, not a checkpoint of ours, or of a newer version.
    """
    if not path.is_file():
        raise CheckpointError(
            path, "no such checkpoint", "give a file such as outputs/NAME/TRIAL/ckpt/last.pth"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Arbitrary bytes make the unpickler stumble in any way, IndexError too.
        raise CheckpointError(
            path, "is truncated or not a checkpoint", "resume from an older ckpt_*.pth in the same folder"
        ) from error
    if not isinstance(state, dict) or "format_version" not in state:
        raise CheckpointError(path, "is not one of this project's checkpoints", "give a ckpt_*.pth of a run")
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            path,
            f"has format version {state['format_version']}, this code reads up to {FORMAT_VERSION}",
            "update the code",
        )
    return state


def meaning_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a config (as plain values) says about the weights' meaning, by dotted key, for the checkpoint."""
    values = {key: setting_at(tree, key) for key in _MEANING}
    return {key: value for key, value in values.items() if value is not None}


def load_weights(path: Path, state: dict[str, Any], model: nn.Module, tree: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a model.

    Args:
        path: of the checkpoint, for error messages.
        state: its content.
        model: of the same shapes.
        tree: the config of now as plain values, which has to give the weights the same meaning. Checkpoints
            of before this was written into them are taken at their word.

    Raises:
        CheckpointError: the checkpoint is of another model; names the first difference.
    """
    for key, value in state.get("meaning", {}).items():
        now = setting_at(tree, key)
        # A key that this code no longer has says nothing.
        if now is not None and now != value:
            trained = f"{key}={as_written(value)}"
            what = f"was trained with {trained}, this config has {as_written(now)}"
            raise CheckpointError(path, what, f"set {trained}, or {_REMEDY}")
    stored, wanted = state["model"], model.state_dict()
    for name in sorted(set(stored) | set(wanted)):
        if name not in stored or name not in wanted:
            place = "the checkpoint" if name not in stored else "the model"
            raise CheckpointError(path, f"belongs to another model ({place} has no {name})", _REMEDY)
        _check_images(path, name, stored[name], wanted[name])
        if stored[name].shape != wanted[name].shape:
            shapes = f"{tuple(stored[name].shape)} against {tuple(wanted[name].shape)}"
            raise CheckpointError(path, f"belongs to another model ({name}: {shapes})", _REMEDY)
    model.load_state_dict(stored)


def load_poses(path: Path, state: dict[str, Any], poses: nn.Module | None) -> None:
    """Put a checkpoint's refined poses into their module, if there is one.

    Raises:
        CheckpointError: only one of the two refines poses, or they are of other images.
    """
    if (poses is None) == ("poses" in state):
        remedy = f"set trainer.poses.refine={str(poses is None).lower()}, as in that run"
        what = f"was trained {'with' if poses is None else 'without'} refinement of poses"
        raise CheckpointError(path, what, remedy)
    if poses is not None:
        for name, wanted in poses.state_dict().items():
            _check_images(path, f"poses.{name}", state["poses"][name], wanted)
        poses.load_state_dict(state["poses"])


def _check_images(path: Path, name: str, stored: Tensor, wanted: Tensor) -> None:
    """What is learned per image (``models/per_image.py``) serves the images that it was learned from."""
    remedy = "use the dataset and the dataset.holdout of that run (config/parsed.yaml beside the ckpt folder)"
    if name.endswith(".per_image") and len(stored) != len(wanted):
        what = f"was trained on {len(stored)} images, this scene has {len(wanted)} to train on ({name})"
        raise CheckpointError(path, what, remedy)
    if name.endswith(".row_of_view") and not torch.equal(stored, wanted.to(stored.device)):
        raise CheckpointError(path, f"was trained on other views of this scene ({name})", remedy)


def load_model(path: Path, model: nn.Module, tree: Mapping[str, Any]) -> tuple[int, float]:
    """Put a checkpoint's weights into a model of this config (as plain values), for testing or export.

    Returns:
        The step, and the fraction of training that was done, on which annealing and open levels depend.

    Raises:
        CheckpointError: see :func:`load` and :func:`load_weights`.
    """
    state = load(path)
    load_weights(path, state, model, tree)
    return state["step"], state["fraction"]
