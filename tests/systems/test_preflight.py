"""What is refused before anything is loaded: keys without effect, priors that nobody looks at."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sphere_priors import scene_with_priors
from tiny import SECTIONS, tiny_config, tiny_model, tiny_scene

import run
from process_data.batches import Priors
from process_data.formats.dtu import DTUConfig
from systems.preflight import (
    _REPLACED,
    _SWITCHES,
    _VAIN,
    check_extent,
    check_model_keys,
    check_overrides,
    check_priors,
    check_video,
    dataset_to_load,
)
from systems.sweep.plan import load_sweep
from utils.config import load_config
from utils.errors import ConfigError
from utils.schema import keys_of

CONFS = Path(__file__).resolve().parents[2] / "confs"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.background.far=50"],
            (
                "model.background.far: has no effect while model.background.enabled=false; "
                "set model.background.enabled=true, or leave it out"
            ),
        ),
        (
            ["seed=3", "system.sparse_points_per_step=7"],
            (
                "system.sparse_points_per_step: has no effect while system.loss.sparse_points=0.0; "
                "give system.loss.sparse_points a value above 0, or leave it out"
            ),
        ),
        (
            ["system.curvature_step=0.02"],
            (
                "system.curvature_step: has no effect while system.loss.laplacian=0.0 and "
                "system.loss.curvature=0.0; give system.loss.laplacian or system.loss.curvature a value "
                "above 0, or leave it out"
            ),
        ),
        (["trainer.optimizer.background=0.1"], "set model.background.enabled=true"),
        (["model.background.hash_grid.num_levels=3"], "set model.background.enabled=true"),
        (["trainer.buffers=packed", "trainer.lookahead=3"], "no effect with trainer.buffers=packed"),
        (["model.initial_beta=0.1"], "has no effect with model.density=neus; set model.density=volsdf"),
        (
            ["model.importance=8", "model.min_step=0.002"],
            "model.min_step: has no effect with model.importance=8; set model.importance=0, or leave it out",
        ),
        (["system.patch_size=5"], "give system.loss.ssim or system.loss.lpips a value above 0"),
        (
            ["dataset.test_steps=9", "test.path=inputs/ride.json"],
            (
                "dataset.test_steps: has no effect with test.path=inputs/ride.json; set test.path=orbit, or "
                "leave it out"
            ),
        ),
        (["test.video=false", "test.fps=3"], "test.fps: has no effect while test.video=false"),
        (
            ["model.appearance.width=3"],
            "has no effect with model.appearance.mode=none; set model.appearance.mode",
        ),
        (
            ["model.appearance.mode=exposure", "model.appearance.width=3"],
            "no effect with model.appearance.mode=",
        ),
        (
            ["model.background.enabled=true", "model.background.proposal.num_levels=3"],
            "has no effect with model.background.sampler=inverse_distance",
        ),
        (
            ["model.background.enabled=true", "model.background.surface_density=3"],
            "has no effect with export.extent=1.0; set export.extent=3, or leave it out",
        ),
        (["export.min_views=3"], "has no effect with export.unseen=keep; set export.unseen=cut"),
        (["export.unseen=flag", "export.min_views=3"], "has no effect with export.unseen=flag"),
        (["trainer.strict=true"], "give trainer.learning_step or trainer.health_step a value above 0"),
    ],
)
def test_keys_without_effect(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(tiny_config(*overrides).tree, overrides)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.background.enabled=true", "model.background.far=50"],
        ["model.background.enabled=false"],
        ["model.background.enabled=true", "model.background.surface_density=3", "export.extent=2"],
        ["export.min_views=3", "export.unseen=cut"],
        ["system.loss.sparsity=[[0,0],[1,0.1]]", "system.sparsity_scale=3"],
        ["system.loss.curvature=0.1", "system.random_points_per_step=7"],
        ["trainer.lookahead=3", "trainer.cuda_graph=false"],
        ["dataset.test_steps=9", "test.path=interp"],
        ["test.path=inputs/ride.json"],
        ["trainer.health_step=5", "trainer.strict=true"],
        ["trainer.strict=true", "trainer.health_step=5"],
    ],
)
def test_keys_with_effect(overrides: list[str]) -> None:
    check_overrides(tiny_config(*overrides).tree, overrides)


@pytest.mark.parametrize(
    ("method", "override", "key"),
    [
        ("tiny", "model.background.proposal.num_samples=[1,1]", "model.background.proposal.num_samples"),
        ("tiny", "model.background.hash_grid.num_levels=0", "model.background.hash_grid.num_levels"),
        ("tiny", "model.sdf.hash_grid.num_levels=0", "model.sdf.hash_grid.num_levels"),
        ("tiny_nerf_proposal", "model.proposal.num_samples=[1,1]", "model.proposal.num_samples"),
        ("tiny_nerf_proposal", "model.proposal.max_resolutions=[4,4]", "model.proposal.max_resolutions"),
        ("tiny_mipnerf360", "model.proposal.num_samples=[1,1]", "model.proposal.num_samples"),
    ],
)
def test_a_number_out_of_range_names_its_key_in_full(method: str, override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: must "):
        tiny_config(override, method=method)


def test_mipnerf360_has_light_per_image_and_fainter_gradients() -> None:
    overrides = ["model.appearance.mode=embedding", "model.appearance.width=3", "model.gradient_scaling=1"]
    given = tiny_config(*overrides, method="tiny_mipnerf360")
    check_overrides(given.tree, overrides)
    check_model_keys(tiny_model(given), overrides)
    with pytest.raises(ConfigError, match=r"^model\.appearance\.width: has no effect"):
        check_overrides(tiny_config(method="tiny_mipnerf360").tree, overrides[1:2])


def test_configs_may_hold_what_is_off() -> None:
    tree = tiny_config().tree
    assert not tree["model"]["background"]["enabled"]
    check_overrides(tree, [])
    for planned in load_sweep(CONFS / "sweeps" / "losses.yaml", [], SECTIONS, "cpu", None).runs:
        check_overrides(planned.tree, planned.overrides)


def test_the_rules_are_about_keys_that_exist() -> None:
    known = set(keys_of(SECTIONS))
    for start, switches in _SWITCHES.items():
        assert {start.removesuffix("."), *switches} <= known
    for key, (other, _, _) in _VAIN.items():
        assert {key.removesuffix("."), other} <= known
    assert {*_REPLACED, *_REPLACED.values()} <= known


@dataclass(frozen=True)
class Settings:
    dataset: DTUConfig
    tree: dict[str, object]


def settings(use_priors: bool | None, **losses: object) -> Settings:
    return Settings(DTUConfig(use_priors=use_priors), {"system": {"loss": losses}})


def test_priors_are_loaded_where_a_term_looks_at_them() -> None:
    assert dataset_to_load(settings(None, depth=0.0, depth_prior=0.1), True).use_priors is True
    assert dataset_to_load(settings(None, normal_prior=[[0, 0.1], [1, 0]]), True).use_priors is True
    assert dataset_to_load(settings(None, depth=0.0, mask=1.0), True).use_priors is False
    assert dataset_to_load(settings(True, depth=0.1), True).use_priors is True
    with pytest.raises(
        ConfigError, match=r"^dataset\.use_priors: no loss term looks at depth or normal maps"
    ):
        dataset_to_load(settings(True, depth=0.0, depth_prior=[[0, 0], [1, 0]]), True)
    with pytest.raises(
        ConfigError, match=r"^dataset\.use_priors: leaves out the maps that system\.loss\.depth"
    ):
        dataset_to_load(settings(False, depth=0.1), True)
    synthetic = tiny_config()
    assert dataset_to_load(synthetic, True) is synthetic.dataset


def test_without_training_nobody_looks_at_priors() -> None:
    for use_priors in (None, True, False):
        assert dataset_to_load(settings(use_priors, depth=0.1), False).use_priors is False
        assert dataset_to_load(settings(use_priors, depth=0.0), False).use_priors is False


def test_missing_priors_are_refused_and_present_ones_are_not() -> None:
    everything = Priors(depth="key.depth", normal="key.normal", points="key.points")
    check_priors(scene_with_priors(), everything, 96)
    check_priors(tiny_scene(), Priors(), 96)
    for kind, lacking in (("depth", "depths"), ("normal", "normals"), ("points", "points")):
        with pytest.raises(ConfigError, match=rf"^key\.{kind}: "):
            check_priors(replace(scene_with_priors(), **{lacking: None}), everything, 96)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["system.loss.depth=0.1"], "system.loss.depth"),
        (["system.loss.depth=0.1", "dataset.depths=monocular"], "system.loss.depth"),
        (["system.loss.sparse_points=0.1"], "system.loss.sparse_points"),
        (["model.background.far=50"], "model.background.far"),
        (["system.inv_s=50", "trainer.optimizer.variance=0.1"], "trainer.optimizer.variance"),
        (["system.loss.ssim=0.5"], "trainer.max_rays"),
        (["system.loss.ssim=0.5", "system.patch_size=33", "trainer.max_rays=9999"], "system.patch_size"),
        (
            ["system.loss.photo_consistency=1", "dataset.num_images=2", "dataset.holdout=[1]"],
            "system.loss.photo_consistency",
        ),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], key: str
) -> None:
    tiny = str(Path(__file__).with_name("tiny.yaml"))
    command = ["--config", tiny, "--train", "--device", "cpu", "--outputs_dir", str(tmp_path / "o")]
    assert run.main([*command, *overrides]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"run.py: {key}: ")
    assert not (tmp_path / "o").exists()


def test_load_config_is_enough_for_the_rules() -> None:
    config = load_config(CONFS / "neus-dtu.yaml", ["model.background.far=50"], SECTIONS)
    check_overrides(config.tree, ["model.background.far=50"])
    assert (
        dataset_to_load(SimpleNamespace(dataset=config.dataset, tree=config.tree), True).use_priors is False
    )


def test_a_video_path_that_does_not_exist_is_refused_before_anything_is_trained() -> None:
    scene = tiny_scene()
    check_video(scene, tiny_config("test.path=interp").test)
    check_video(scene, tiny_config("test.path=spiral", "test.video=false").test)
    with pytest.raises(ConfigError, match=r"test\.path: 'spiral' is not known"):
        check_video(scene, tiny_config("test.path=spiral").test)


def test_a_mesh_beyond_the_model_is_refused() -> None:
    config = tiny_config("export.extent=2")
    model = tiny_model(config)
    with pytest.raises(ConfigError, match=r"export\.extent: 2 is beyond what NeuS has a surface in, 1"):
        check_extent(model, config.export)
    check_extent(model, tiny_config().export)
    model.reach = float("inf")
    check_extent(model, config.export)


def test_rates_and_cells_that_a_model_does_not_have_are_refused() -> None:
    model = tiny_model(tiny_config(method="tiny_nerf"))
    check_model_keys(model, ["trainer.optimizer.networks=0.1", "trainer.optimizer.eps=1e-8"])
    for key in ("trainer.optimizer.grid", "trainer.optimizer.variance", "trainer.optimizer.proposals"):
        with pytest.raises(ConfigError, match=rf"{key}: has no effect: the rates of VanillaNeRF are"):
            check_model_keys(model, [f"{key}=0.1"])
    with pytest.raises(ConfigError, match=r"trainer\.occupancy_every: has no effect"):
        check_model_keys(model, ["trainer.occupancy_every=4"])
    for quiet in (model, tiny_model(tiny_config())):
        with pytest.raises(
            ConfigError, match=r"system\.proposal_anneal_end: has no effect: \w+ has no proposals"
        ):
            check_model_keys(quiet, ["system.proposal_anneal_end=0.2"])
    check_model_keys(tiny_model(tiny_config(method="tiny_nerf_proposal")), ["system.proposal_anneal_end=0.2"])
    check_model_keys(
        tiny_model(tiny_config()), ["trainer.occupancy_every=4", "trainer.optimizer.variance=0.1"]
    )
