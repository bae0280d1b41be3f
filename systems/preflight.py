"""Before anything is loaded: what was asked for must be there, and must be used.

A key on the command line that changes nothing (``model.background.far=50`` without a background) is a run
that its author believes to be another one. Configs may hold such keys, since parts are switched on and off by
one key; the command line says what is meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

from models import Model
from process_data.batches import check_priors
from process_data.camera_paths import camera_path
from systems.poses import check_refinement
from systems.schedules import is_ever_on
from utils.errors import ConfigError
from utils.schema import as_written, setting_at
from utils.types import Scene

__all__ = [
    "check_extent",
    "check_model_keys",
    "check_overrides",
    "check_priors",
    "check_refinement",
    "check_video",
    "dataset_to_load",
]

_DEPTH_TERMS = ("system.loss.depth", "system.loss.depth_prior")
_PRIOR_TERMS = (*_DEPTH_TERMS, "system.loss.normal_prior")

_SWITCHES: dict[str, tuple[str, ...]] = {
    "model.background.": ("model.background.enabled",),
    "trainer.optimizer.background": ("model.background.enabled",),
    "trainer.poses.": ("trainer.poses.refine",),
    "model.occupancy.hull_tolerance": ("dataset.apply_mask",),
    "dataset.depth_unit": _DEPTH_TERMS,
    "dataset.depths": _DEPTH_TERMS,
    "dataset.normals": ("system.loss.normal_prior",),
    "dataset.num_points": ("system.loss.sparse_points", "system.loss.photo_consistency"),
    "system.sparsity_scale": ("system.loss.sparsity",),
    "system.sparse_max_error": ("system.loss.sparse_points",),
    "system.sparse_points_per_step": ("system.loss.sparse_points",),
    "system.free_space_points": ("system.loss.free_space",),
    "system.patch_size": ("system.loss.ssim", "system.loss.lpips"),
    "system.num_patches": ("system.loss.ssim", "system.loss.lpips"),
    "system.random_points_per_step": (
        *("system.loss.eikonal_random", "system.loss.eikonal_near"),
        *("system.loss.laplacian", "system.loss.curvature"),
    ),
    "system.curvature_step": ("system.loss.laplacian", "system.loss.curvature"),
    "system.surface_points_per_step": ("system.loss.smoothness",),
    "system.smoothness_step": ("system.loss.smoothness",),
    "system.near_std": ("system.loss.eikonal_near",),
    "system.consistency_rays": ("system.loss.photo_consistency",),
    "system.consistency_patch": ("system.loss.photo_consistency",),
    "system.background": ("dataset.apply_mask",),
    "trainer.strict": ("trainer.learning_step", "trainer.health_step"),
    "test.fps": ("test.video",),
    "test.path": ("test.video",),
    "test.video_scale": ("test.video",),
    "dataset.test_steps": ("test.video",),
}
"""A key, or all keys that begin so: what it does happens only where one of these is on."""

_VAIN: dict[str, tuple[str, str | tuple[str, ...], str]] = {
    "trainer.lookahead": ("trainer.buffers", "packed", "fixed"),
    "trainer.cuda_graph": ("trainer.buffers", "packed", "fixed"),
    "trainer.optimizer.skip_untouched": ("trainer.buffers", "packed", "fixed"),
    "model.initial_beta": ("model.density", "neus", "volsdf"),
    "model.initial_inv_s": ("model.density", "volsdf", "neus"),
    "system.cos_anneal_end": ("model.density", "volsdf", "neus"),
    "system.curvature_step": ("model.sdf.gradient", "numerical", "analytic"),
    "model.sdf.taps": ("model.sdf.gradient", "analytic", "numerical"),
    "trainer.optimizer.final_ratio": ("trainer.optimizer.decay", "constant", "exponential"),
    "model.appearance.width": ("model.appearance.mode", ("none", "exposure"), "embedding"),
    "model.background.proposal.": ("model.background.sampler", "inverse_distance", "proposal"),
    "model.background.surface_density": ("export.extent", ("1", "1.0"), "3"),
    "model.unit": ("model.contraction", "none", "linf"),
    "export.min_views": ("export.unseen", ("keep", "flag"), "cut"),
    "dataset.test_steps": ("test.path", "*.json", "orbit"),
}
"""A key, or all keys that begin so, without effect where another one has this value or form, or one of these,
and what that one would have to be."""

_LEARNED = ("model.initial_inv_s", "model.initial_beta", "trainer.optimizer.variance")
"""Keys of the learned sharpness."""

_GROUPS = ("grid", "networks", "variance", "background", "proposals")
"""Parameters with a learning rate of their own, in one method or another."""

_REPLACED: dict[str, str] = {
    "model.min_step": "model.importance",
    "model.step_per_width": "model.importance",
    "model.min_transmittance": "model.importance",
}
"""A key whose part another one has taken over where that is on."""


def check_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse keys on the command line that have no effect with the rest of the config.

    Args:
        tree: the whole config as plain values.
        overrides: ``key=value``.

    Raises:
        ConfigError: such a key, with the one that would make it count.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        switches = next((on for start, on in _SWITCHES.items() if _is_at(key, start)), ())
        known = [switch for switch in switches if setting_at(tree, switch) is not None]
        if known and key not in known and not any(_is_on(tree, switch) for switch in known):
            is_flag = isinstance(setting_at(tree, known[0]), bool)
            remedy = f"set {known[0]}=true" if is_flag else f"give {' or '.join(known)} a value above 0"
            raise ConfigError(key, f"has no effect while {_off(tree, known)}", f"{remedy}, or leave it out")
        if key in _LEARNED and setting_at(tree, "system.inv_s") is not None:
            raise ConfigError(
                key, "has no effect while system.inv_s prescribes the sharpness", "leave one of the two out"
            )
        for start, (other, values, wanted) in _VAIN.items():
            value, forms = setting_at(tree, other), (values,) if isinstance(values, str) else values
            if _is_at(key, start) and any(fnmatchcase(str(value), form) for form in forms):
                what = f"has no effect with {other}={value}"
                raise ConfigError(key, what, f"set {other}={wanted}, or leave it out")
        if key in _REPLACED:
            other = _REPLACED[key]
            if _is_on(tree, other):
                what = f"has no effect with {other}={setting_at(tree, other)}"
                raise ConfigError(key, what, f"set {other}=0, or leave it out")


def dataset_to_load(settings: Any, trains: bool) -> Any:
    """The dataset's config, in which ``use_priors`` says whether a loss term looks at depths or normals.

    Args:
        settings: the whole config.
        trains: whether there is training; nothing else looks at them.

    Raises:
        ConfigError: priors are asked for that no term looks at, left out that one needs, or of no scale.
    """
    dataset = settings.dataset
    if (
        trains
        and getattr(dataset, "depths", None) == "monocular"
        and _is_on(settings.tree, "system.loss.depth")
    ):
        remedy = "set dataset.depths=sensor, or use system.loss.depth_prior"
        raise ConfigError("system.loss.depth", "depths of dataset.depths=monocular have no scale", remedy)
    if "use_priors" not in {field.name for field in fields(dataset)}:
        return dataset
    if not trains:
        return replace(dataset, use_priors=False)
    terms = [key for key in _PRIOR_TERMS if _is_on(settings.tree, key)]
    key = "dataset.use_priors"
    if dataset.use_priors and not terms:
        what = "no loss term looks at depth or normal maps"
        raise ConfigError(key, what, f"give {' or '.join(_PRIOR_TERMS)} a weight, or set it to null")
    if dataset.use_priors is False and terms:
        raise ConfigError(
            key, f"leaves out the maps that {terms[0]} needs", f"set it to null, or {terms[0]}=0"
        )
    return replace(dataset, use_priors=bool(terms))


def check_model_keys(model: Model, overrides: Sequence[str]) -> None:
    """Refuse keys on the command line about parameters, cells and proposals that the model does not have.

    Raises:
        ConfigError: such a key.
    """
    has = model.parameter_groups()
    for override in overrides:
        key = override.partition("=")[0].strip()
        group = key.removeprefix("trainer.optimizer.")
        if key == f"trainer.optimizer.{group}" and group in _GROUPS and group not in has:
            known = ", ".join(f"trainer.optimizer.{name}" for name in has)
            what = f"has no effect: the rates of {type(model).__name__} are {known}"
            raise ConfigError(key, what, "set one of these, or leave it out")
        absent = {
            "trainer.occupancy_every": (hasattr(model, "occupancy"), "occupancy grid"),
            "system.proposal_anneal_end": (model.num_proposals > 0, "proposals in this config"),
        }
        if key in absent and not absent[key][0]:
            what = f"has no effect: {type(model).__name__} has no {absent[key][1]}"
            raise ConfigError(key, what, "leave it out")


def check_video(scene: Scene, config: Any) -> None:
    """Make sure that the video's camera path can be made.

    Raises:
        ConfigError: ``test.path`` is unknown, or its file holds no path.
        DataError: the file is missing or broken.
    """
    if config.video:
        camera_path(scene, config.path, num_steps=1)


def check_extent(model: Model, config: Any) -> None:
    """Make sure that there is a surface wherever one is to be meshed.

    Raises:
        ConfigError: ``export.extent`` is beyond the model's reach.
    """
    if config.extent > model.reach:
        what = f"{config.extent:g} is beyond what {type(model).__name__} has a surface in, {model.reach:g}"
        other = ", or model.background.enabled=true" if hasattr(model, "background") else ""
        raise ConfigError("export.extent", what, f"set it to 1{other}")


def _is_at(key: str, start: str) -> bool:
    return key.startswith(start) if start.endswith(".") else key == start


def _is_on(tree: Mapping[str, Any], key: str) -> bool:
    value = setting_at(tree, key)
    return value is not None and is_ever_on(value)


def _off(tree: Mapping[str, Any], switches: Sequence[str]) -> str:
    return " and ".join(f"{switch}={as_written(setting_at(tree, switch))}" for switch in switches)
