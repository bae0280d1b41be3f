"""NeuS's rules: progress is a pure function, terms of weight zero cost nothing, errors name their key."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sphere_priors import RADIUS, scene_with_priors
from tiny import WITHOUT_MASKS, new_trainer, raiser, resumed_trainer, tiny_config, tiny_model, tiny_scene
from torch import Tensor

from process_data.batches import Priors, RayBatches
from run import main, sections
from systems import losses
from systems.histogram_losses import distortion, interlevel
from systems.neus import LossConfig, NeuSSystem, NeuSSystemConfig
from systems.step import weighted_sum
from utils.config import load_config
from utils.errors import ConfigError
from utils.types import Batch, Field, Progress, RenderOutput

FUNCTION_OF = {
    **{"rgb_l1": "rgb_l1", "rgb_l2": "rgb_l2", "rgb_charbonnier": "rgb_charbonnier", "eikonal": "eikonal"},
    **{"mask": "mask_bce", "mask_iou": "mask_iou", "opacity": "opacity_entropy", "sparsity": "sparsity"},
    **{"sparse_points": "sparse_points", "depth": "depth_l1", "depth_prior": "depth_prior"},
    **{"normal_prior": "normal_prior", "curvature": "curvature", "laplacian": "laplacian"},
    **{"free_space": "free_space"},
}
NEEDS_PRIORS = ("depth", "depth_prior", "normal_prior", "sparse_points")
Seen = tuple[RenderOutput, Batch, Progress, Field]


def system_of(**changes: Any) -> NeuSSystem:
    return NeuSSystem(NeuSSystemConfig(**changes), num_levels=12, has_masks=True)


@pytest.fixture(scope="module")
def seen() -> Seen:
    """A render of an untrained model, the photographs and what sensors say, and the field itself."""
    model = tiny_model(tiny_config())
    progress = system_of().progress_at(0.5)
    priors = system_of(loss=LossConfig(**dict.fromkeys(NEEDS_PRIORS, 1.0))).priors
    batch = RayBatches(scene_with_priors(), indices=[1, 2], seed=0, priors=priors).draw(240)
    render = model.render(batch.rays, progress, torch.ones(3))
    return render, batch, progress, partial(model.query_field, progress=progress)


def test_progress_by_hand() -> None:
    system = system_of(
        loss=LossConfig(eikonal=[[0.0, 0.0], [0.5, 0.2]], mask=0.1),
        cos_anneal_end=0.25,
        initial_levels=4.0,
        levels_end=0.5,
    )
    start, later, end = (system.progress_at(fraction) for fraction in (0.0, 0.125, 1.0))
    assert (start.fraction, start.cos_anneal, start.active_levels) == (0.0, 0.0, 4.0)
    assert (later.fraction, later.cos_anneal, later.active_levels) == (0.125, 0.5, 6.0)
    assert (end.fraction, end.cos_anneal, end.active_levels) == (1.0, 1.0, 12.0)
    assert [p.loss_weights.get("eikonal") for p in (start, later, end)] == [None, pytest.approx(0.05), 0.2]
    assert list(start.loss_weights) == ["rgb_l1", "mask"]


def test_progress_is_a_pure_function() -> None:
    system = system_of()
    first = [system.progress_at(k / 10) for k in range(11)]
    backwards = [system.progress_at(k / 10) for k in reversed(range(11))]
    assert first == backwards[::-1]
    assert first[3] == NeuSSystem(system.config, 12, True).progress_at(0.3)


def test_prescribed_sharpness_is_geometric_between_its_points() -> None:
    assert system_of().progress_at(0.3).inv_s is None
    assert system_of(inv_s=64).progress_at(0.3).inv_s == pytest.approx(64.0)
    scheduled = system_of(inv_s=[[0.0, 20.0], [0.5, 2000.0]])
    found = [scheduled.progress_at(fraction).inv_s for fraction in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([20.0, 200.0, 2000.0, 2000.0])


def test_annealing_of_no_length_is_over_at_once() -> None:
    progress = system_of(cos_anneal_end=0.0, levels_end=0.0).progress_at(0.0)
    assert (progress.cos_anneal, progress.active_levels) == (1.0, 12.0)


def test_levels_may_wait() -> None:
    """Neuralangelo's: four of sixteen levels up to 25,000 of 500,000 steps, all of them from 85,000 on."""
    config = NeuSSystemConfig(initial_levels=4.0, levels_start=0.05, levels_end=0.17)
    system = NeuSSystem(config, num_levels=16, has_masks=True)
    expected = {0: 4.0, 20000: 4.0, 25000: 4.0, 30000: 5.0, 60000: 11.0, 85000: 16.0, 500000: 16.0}
    found = {step: system.progress_at(step / 500000).active_levels for step in expected}
    assert found == pytest.approx(expected)


def test_more_initial_levels_than_there_are() -> None:
    system = NeuSSystem(NeuSSystemConfig(initial_levels=99.0), num_levels=3, has_masks=True)
    assert [system.progress_at(k / 4).active_levels for k in range(5)] == [3.0] * 5


def kept_rays(seen: Seen) -> list[int]:
    """Rays that show the surface where there is one."""
    render, batch, *_ = seen
    assert batch.mask is not None
    return [ray for ray in range(240) if render.opacity[ray] > 0.5 and batch.mask[ray] == 1]


def rendered_depth(seen: Seen, ray: int) -> float:
    """Along the optical axis: where the camera's own axes see the surface's mean position."""
    render, batch, *_ = seen
    pose = scene_with_priors().cameras.c2w[batch.rays.camera_indices[ray]].double()
    distance = float((render.depth / render.opacity)[ray].detach())
    surface = batch.rays.origins[ray].double() + distance * batch.rays.directions[ray].double()
    return float((surface - pose[:, 3]) @ pose[:, 2])


def expected_depth(seen: Seen) -> float:
    target = seen[1].depth
    assert target is not None
    rays = [ray for ray in kept_rays(seen) if target[ray] > 0]
    assert len(rays) > 5
    return float(np.mean([abs(rendered_depth(seen, ray) - float(target[ray])) for ray in rays]))


def expected_depth_prior(seen: Seen) -> float:
    target = seen[1].depth
    assert target is not None
    error = spread = 0.0
    for view in (1, 2):
        rays = [r for r in kept_rays(seen) if target[r] > 0 and seen[1].rays.camera_indices[r] == view]
        assert len(rays) >= losses.MIN_RAYS
        given = np.array([float(target[ray]) for ray in rays])
        columns = np.array([[rendered_depth(seen, ray), 1.0] for ray in rays])
        fitted = columns @ np.linalg.lstsq(columns, given, rcond=None)[0]
        error, spread = error + ((fitted - given) ** 2).sum(), spread + ((given - given.mean()) ** 2).sum()
    return error / spread


def expected_normal_prior(seen: Seen) -> float:
    target = seen[1].normal
    assert target is not None
    found = []
    for ray in kept_rays(seen):
        given = target[ray].double().numpy()
        if given.any():
            normal = seen[0].normal[ray].detach().double().numpy()
            normal /= np.linalg.norm(normal)
            found.append(np.abs(normal - given).sum() + abs(1 - normal @ given))
    return float(np.mean(found))


def expected_free_space(seen: Seen) -> float:
    _, batch, _, field = seen
    rays = batch.rays
    draw = torch.Generator().manual_seed(1)
    distance = rays.near + torch.rand(len(rays), generator=draw) * (rays.far - rays.near)
    sdf = field(rays.origins + distance[:, None] * rays.directions)[0].detach().double().tolist()
    empty = [k for k in range(len(rays)) if batch.mask[k] == 0 and rays.near[k] < rays.far[k]]
    return sum(max(-sdf[k], 0.0) for k in empty) / len(empty)


def expected_sparse_points(seen: Seen) -> float:
    assert seen[1].points is not None
    return float(np.mean([abs(float(seen[3](point[None])[0].detach())) for point in seen[1].points]))


def expected_laplacian(seen: Seen) -> float:
    """Of the first 1024 samples, with the positions' six neighbours one after another."""
    render, *_, field = seen
    total = -6 * field(render.positions[:1024])[0].detach()
    for axis in range(3):
        for sign in (1, -1):
            offset = torch.zeros(3).index_fill(0, torch.tensor([axis]), 0.01 * sign)
            total = total + field(render.positions[:1024] + offset)[0].detach()
    return float((total / 0.01**2).abs().mean())


def expected_curvature(seen: Seen) -> float:
    """At 1024 rows at most, of which there are fewer."""
    render, *_, field = seen
    gradient = render.gradient.detach()
    normal = gradient / gradient.norm(dim=1, keepdim=True)
    noise = torch.randn(gradient[:1024].shape, generator=torch.Generator().manual_seed(1))
    tangent = torch.linalg.cross(torch.linalg.cross(normal[:1024], noise), normal[:1024])
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    change = field(render.positions[:1024] + 0.01 * tangent)[1].detach() - gradient[:1024]
    return float(((change * tangent).sum(dim=1) / 0.01).abs().mean())


EXPECTED: dict[str, Callable[[Seen], float]] = {
    "depth": expected_depth,
    "depth_prior": expected_depth_prior,
    "normal_prior": expected_normal_prior,
    "sparse_points": expected_sparse_points,
    "free_space": expected_free_space,
    "curvature": expected_curvature,
    "laplacian": expected_laplacian,
}


@pytest.mark.parametrize("term", FUNCTION_OF)
def test_each_term_alone(term: str, seen: Seen) -> None:
    render, batch, progress, field = seen
    alone = replace(progress, loss_weights={term: 0.5})
    terms = system_of().loss_terms(render, batch, alone, field, torch.Generator().manual_seed(1))
    assert list(terms) == [term]
    if term in EXPECTED:
        # Second differences over a hundredth leave float32 three digits.
        tolerance = 5e-3 if term == "laplacian" else 1e-4
        assert float(terms[term].detach()) == pytest.approx(EXPECTED[term](seen), rel=tolerance)
        return
    assert batch.mask is not None
    expected = {
        "rgb_l1": losses.rgb_l1(render.rgb, batch.rgb),
        "rgb_l2": losses.rgb_l2(render.rgb, batch.rgb),
        "rgb_charbonnier": losses.rgb_charbonnier(render.rgb, batch.rgb),
        "eikonal": losses.eikonal(render.gradient),
        "mask": losses.mask_bce(render.opacity, batch.mask),
        "mask_iou": losses.mask_iou(render.opacity, batch.mask),
        "opacity": losses.opacity_entropy(render.opacity),
        "sparsity": losses.sparsity(render.sdf, 20.0),
    }[term]
    assert torch.equal(terms[term], expected)
    assert torch.equal(weighted_sum(terms, alone.loss_weights), 0.5 * expected)


def test_terms_are_weighted_and_summed() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert float(weighted_sum(terms, {"a": 0.5, "b": 10.0, "c": 7.0})) == 31.0


@pytest.mark.parametrize("term", FUNCTION_OF)
def test_a_term_without_weight_is_not_computed(
    term: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, batch, progress, field = seen
    draw = torch.Generator()
    monkeypatch.setattr(losses, FUNCTION_OF[term], raiser(AssertionError("computed")))
    everything_else = {name: 1.0 for name in FUNCTION_OF if name != term}
    others = replace(progress, loss_weights=everything_else)
    terms = system_of().loss_terms(render, batch, others, field, draw)
    assert set(terms) == set(FUNCTION_OF) - {term}
    with pytest.raises(AssertionError, match="computed"):
        system_of().loss_terms(render, batch, replace(progress, loss_weights={term: 1.0}), field, draw)


@pytest.mark.parametrize("term", ["mask", "mask_iou", "free_space"])
def test_mask_loss_without_masks_names_its_key(term: str) -> None:
    for weight in (0.1, [[0.0, 0.0], [0.5, 0.0], [0.6, 1.0]]):
        config = NeuSSystemConfig(loss=LossConfig(**{term: weight}))
        with pytest.raises(ConfigError, match=rf"system\.loss\.{term}: needs masks.*system\.loss\.{term}=0"):
            NeuSSystem(config, num_levels=4, has_masks=False)
    NeuSSystem(NeuSSystemConfig(loss=LossConfig(mask=[[0.0, 0.0], [1.0, 0.0]])), 4, has_masks=False)


@pytest.mark.parametrize(("name", "color"), [("scene", [1.0, 0.5, 0.0]), ("random", None)])
def test_background_color(name: Any, color: list[float] | None) -> None:
    system = system_of(background=name)
    orange = torch.tensor([1.0, 0.5, 0.0])
    drawn = [system.background_color(orange, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    if color is None:
        assert not torch.equal(drawn[0], drawn[2])
        assert all(0 <= value <= 1 for value in drawn[0].tolist())
    else:
        assert drawn[0].tolist() == drawn[2].tolist() == color


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("system.loss.eikonal=high", "system.loss.eikonal"),
        ("system.loss.rgb_l2=[[0.5,1],[0.2,0]]", "system.loss.rgb_l2"),
        ("system.loss.sparsity=[0.1]", "system.loss.sparsity"),
        ("system.loss.eikonal=-0.1", "system.loss: a weight is negative"),
        ("system.loss.sparsity=[[0,1],[1,-1]]", "system.loss: a weight is negative"),
        ("system.loss={rgb_l1: 0, eikonal: 0, mask: 0}", "system.loss: all weights are 0"),
        ("system.cos_anneal_end=1.5", "system.cos_anneal_end"),
        ("system.inv_s=0", "system.inv_s"),
        ("system.inv_s=[[0,20],[0.5,-3]]", "system.inv_s"),
        ("system.levels_end=-0.1", "system.levels_end"),
        ("system.levels_start=0.5", "system.levels_start: must not be above levels_end 0.3"),
        ("model.sdf.taps=5", "model.sdf.taps: must be 4 or 6, got 5"),
        ("model.sdf.gradient=numeric", "model.sdf.gradient"),
        ("trainer.optimizer.weight_decay=-0.1", "trainer.optimizer.weight_decay"),
        ("system.initial_levels=-1", "system.initial_levels"),
        ("system.background=pink", "system.background"),
        ("system.sparse_points_per_step=0", "system.sparse_points_per_step"),
        ("system.random_points_per_step=0", "system.random_points_per_step"),
        ("system.sparse_max_error=0", "system.sparse_max_error"),
        ("system.curvature_step=0", "system.curvature_step"),
        ("system.patch_size=2", "system.patch_size"),
        ("system.num_patches=0", "system.num_patches"),
        ("system.near_std=0", "system.near_std"),
        ("system.smoothness_step=0", "system.smoothness_step"),
        ("system.surface_points_per_step=0", "system.surface_points_per_step"),
        ("system.consistency_rays=0", "system.consistency_rays"),
        ("system.consistency_patch=8", "system.consistency_patch"),
        ("system.consistency_patch=1", "system.consistency_patch"),
        ("system.loss.eikonl=0.1", "system.loss.eikonl"),
        ("trainer.max_steps=0", "trainer.max_steps"),
        ("trainer.max_minutes=0", "trainer.max_minutes"),
        ("trainer.samples_per_step=0", "trainer.samples_per_step"),
        ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints"),
        ("trainer.val_every=-1", "trainer.val_every"),
        ("trainer.optimizer.grid=-0.1", "trainer.optimizer.grid"),
        ("trainer.optimizer.final_ratio=0", "trainer.optimizer.final_ratio"),
        ("test.video_scale=0", "test.video_scale"),
        ("test.rays_per_chunk=0", "test.rays_per_chunk"),
    ],
)
def test_config_errors_name_their_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(override)
    assert str(caught.value).startswith(key)
    assert "\n" not in str(caught.value)


def test_weights_that_are_zero_for_a_while_are_fine() -> None:
    LossConfig(rgb_l1=[[0.5, 0.0], [1.0, 1.0]], eikonal=0.0)
    with pytest.raises(ValueError, match="all weights are 0"):
        LossConfig(rgb_l1=[[0.0, 0.0], [1.0, 0.0]], eikonal=0.0)


def test_schedules_come_through_the_config() -> None:
    config = tiny_config("system.loss.eikonal=[[0,0],[0.5,0.2]]")
    system = NeuSSystem(config.system, 4, True)
    weights = [system.progress_at(fraction).loss_weights.get("eikonal") for fraction in (0.0, 0.25, 1.0)]
    assert weights == [None, pytest.approx(0.1), pytest.approx(0.2)]


# Numerical gradients


NUMERICAL = ("model.sdf.gradient=numerical", "system.loss.laplacian=1e-4")


@pytest.mark.parametrize("taps", [4, 6])
def test_the_laplacian_of_the_taps_is_taken_where_there_is_one(taps: int, seen: Seen) -> None:
    _, batch, progress, field = seen
    model = tiny_model(tiny_config(*NUMERICAL, f"model.sdf.taps={taps}"))
    render = model.render(batch.rays, progress, torch.ones(3))
    assert render.laplacian is not None
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    alone = replace(progress, loss_weights={"laplacian": 1.0})
    found = system_of().loss_terms(render, batch, alone, field, generator)["laplacian"]
    assert torch.equal(generator.get_state(), state)
    assert float(found.detach()) == pytest.approx(float(render.laplacian.abs().mean().detach()), rel=1e-5)
    half = torch.arange(len(render.sdf)) % 2 == 0
    found = system_of().loss_terms(replace(render, is_sample=half), batch, alone, field, generator)
    expected = float(render.laplacian[half].abs().mean().detach())
    assert float(found["laplacian"].detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("buffers", ["packed", "fixed"])
@pytest.mark.parametrize("taps", [4, 6])
def test_numerical_gradients_learn_the_sphere(tmp_path: Path, taps: int, buffers: str) -> None:
    options = (f"model.sdf.taps={taps}", f"trainer.buffers={buffers}", "trainer.optimizer.weight_decay=0.01")
    training = new_trainer(tmp_path, *NUMERICAL, *options, "system.initial_levels=2")
    assert {group["name"]: group["weight_decay"] for group in training.optimizer.param_groups} == {
        **{"grid": 0.01, "networks": 0.01, "variance": 0.0}
    }
    training.train()
    surface = RADIUS * torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    progress = training.system.progress_at(1.0)
    assert float(training.model.query_sdf(surface, progress).abs().mean()) < 0.04
    normal = torch.nn.functional.normalize(training.model.query_gradient(surface, progress), dim=1)
    assert float((normal * surface).sum(dim=1).mean()) > 0.97 * RADIUS


def test_weight_decay_is_that_of_the_config_of_now(tmp_path: Path) -> None:
    first = new_trainer(tmp_path, "trainer.max_steps=2")
    first.train()
    second = resumed_trainer(first, "trainer.max_steps=4", "trainer.optimizer.weight_decay=0.2")
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.2, 0.2, 0.0]


def test_a_run_with_numerical_gradients(tmp_path: Path) -> None:
    config = Path(__file__).with_name("tiny.yaml")
    where = ("--outputs_dir", str(tmp_path), "--logs_dir", str(tmp_path / "logs"), "--device", "cpu")
    options = (*NUMERICAL, "trainer.max_steps=3", "trainer.optimizer.weight_decay=0.01")
    assert main(["--config", str(config), "--train", *where, *options]) == 0
    (parsed,) = tmp_path.glob("tiny/*/config/parsed.yaml")
    again = load_config(parsed, (), sections())
    assert again.model == tiny_config(*options).model
    assert (again.model.sdf.gradient, again.trainer.optimizer.weight_decay) == ("numerical", 0.01)


# Points and priors


def test_random_points_fill_the_unit_ball(seen: Seen) -> None:
    render, batch, progress, _ = seen
    asked: list[Tensor] = []

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(positions)
        return positions[:, 0], 2.0 * positions

    system, draw = system_of(random_points_per_step=4000), torch.Generator().manual_seed(0)
    progress = replace(progress, loss_weights={"eikonal_random": 1.0})
    first = system.loss_terms(render, batch, progress, field, draw)["eikonal_random"]
    assert asked[0].shape == (4000, 3)
    radii = asked[0].norm(dim=1).double()
    assert radii.max() <= 1.0 + 1e-6
    # In a ball r^3 is uniform, and so is every coordinate's sign.
    assert float(radii.pow(3).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(radii.pow(3).square().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert asked[0].mean(dim=0).abs().max() < 0.04
    assert float(first) == pytest.approx(float(((2 * radii - 1) ** 2).mean()), rel=1e-4)
    system.loss_terms(render, batch, progress, field, draw)
    assert not torch.equal(asked[0], asked[1])


def test_free_space_looks_along_rays_beside_the_mask(seen: Seen) -> None:
    render, batch, progress, _ = seen
    asked: list[torch.Tensor] = []

    def field(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(positions)
        return positions[:, 0], torch.zeros_like(positions)

    progress = replace(progress, loss_weights={"free_space": 1.0})
    system, draw = system_of(free_space_points=200), torch.Generator().manual_seed(0)
    term = float(system.loss_terms(render, batch, progress, field, draw)["free_space"])
    rays, mask = batch.rays[slice(-200, None)], batch.mask[-200:]
    is_empty = (mask == 0) & (rays.near < rays.far)
    assert 20 < int(is_empty.sum()) < 180
    inside = [max(-float(x), 0.0) for x, counts in zip(asked[0][:, 0], is_empty, strict=True) if counts]
    assert term == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    along = ((asked[0] - rays.origins) * rays.directions).sum(dim=1)
    assert torch.allclose(rays.origins + along[:, None] * rays.directions, asked[0], atol=1e-5)
    share = ((along - rays.near) / (rays.far - rays.near))[is_empty]
    assert float((share - 0.5).abs().max()) < 0.5001
    assert 0.4 < share.mean() < 0.6


def test_free_space_shrinks_a_surface_that_hides_outside_of_the_masks(tmp_path: Path) -> None:
    """No ray has samples in closed cells; seen from inside, the field is opaque whatever its level."""
    shrunk, hidden = (
        distance_after(tmp_path / name, f"{{free_space: {weight}}}", "model.sdf.initial_radius=0.65")
        for name, weight in (("with", 1), ("without", 0))
    )
    assert shrunk < 0.7 * hidden


def test_points_near_the_surface_are_jittered_samples_of_the_largest_weights(seen: Seen) -> None:
    render, batch, progress, _ = seen
    asked: list[Tensor] = []

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(positions)
        return positions[:, 0], 3.0 * torch.nn.functional.normalize(positions, dim=1)

    alone = replace(progress, loss_weights={"eikonal_near": 1.0})
    system, count = system_of(random_points_per_step=50, near_std=0.03), len(render.sdf)
    shown = [system.loss_terms(render, batch, alone, field, torch.Generator().manual_seed(k)) for k in (1, 2)]
    assert [float(terms["eikonal_near"]) for terms in shown] == pytest.approx([4.0, 4.0], rel=1e-4)
    best = render.weights.detach().argsort(descending=True)[:50]
    noise = torch.cat([found - render.positions[best] for found in asked])
    assert float(noise.std()) == pytest.approx(0.03, rel=0.15)
    assert not torch.equal(asked[0], asked[1])
    # Padding has no part in it, whatever its weight.
    is_sample = torch.arange(count) < 20
    padded = replace(render, is_sample=is_sample, weights=torch.where(is_sample, render.weights, 9.0))
    asked.clear()

    def broken(positions: Tensor) -> tuple[Tensor, Tensor]:
        sdf, gradient = field(positions)
        return sdf, torch.where((torch.arange(50) < 20)[:, None], gradient, torch.nan)

    system.loss_terms(padded, batch, alone, broken, torch.Generator().manual_seed(1))
    distance = torch.cdist(asked[0], render.positions[:20]).min(dim=1).values
    assert distance[:20].max() < 0.03 * 5
    alone_again = system.loss_terms(padded, batch, alone, broken, torch.Generator().manual_seed(1))
    assert float(alone_again["eikonal_near"]) == pytest.approx(4.0, rel=1e-4)


def test_smoothness_judges_the_surface_by_its_area_alone(seen: Seen) -> None:
    render, batch, progress, _ = seen
    asked = []

    def sphere(positions: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(positions))
        radius = positions.norm(dim=1)
        return 0.8 * (radius - RADIUS), 0.8 * positions / radius[:, None]

    system = system_of(surface_points_per_step=50, smoothness_step=0.05)
    generator = torch.Generator().manual_seed(1)
    alone = replace(progress, loss_weights={"smoothness": 1.0})
    found = float(system.loss_terms(render, batch, alone, sphere, generator)["smoothness"])
    # At x + step t, perpendicular, the normal has turned by step / sqrt(r^2 + step^2) along t.
    assert found == pytest.approx(0.8 / (RADIUS**2 + 0.05**2) ** 0.5, rel=1e-3)
    assert asked == [400, 50, 50, 50]
    asked.clear()
    others = replace(progress, loss_weights={"rgb_l1": 1.0})
    system.loss_terms(render, batch, others, sphere, generator)
    assert asked == []


def test_smoothness_asks_nothing_of_what_lies_beyond_the_sphere(seen: Seen) -> None:
    render, batch, progress, _ = seen

    def table(positions: Tensor) -> tuple[Tensor, Tensor]:
        """A plane through the sphere, with nothing sensible outside."""
        up = torch.tensor([0.0, 0, 1]).expand_as(positions)
        is_outside = positions.norm(dim=1, keepdim=True) > 0.995
        return positions[:, 2], torch.where(is_outside, torch.nan, up)

    alone = replace(progress, loss_weights={"smoothness": 1.0})
    system, draw = system_of(smoothness_step=0.2), torch.Generator().manual_seed(1)
    assert float(system.loss_terms(render, batch, alone, table, draw)["smoothness"]) == 0.0


def test_smoothness_takes_waves_off_the_surface(seen: Seen) -> None:
    render, batch, progress, _ = seen
    height = torch.tensor(0.02, requires_grad=True)

    def wavy(positions: Tensor) -> tuple[Tensor, Tensor]:
        """A plane with waves of length 0.3."""
        x, _, z = positions.unbind(1)
        rise = height * torch.sin(20 * x)
        slope = 20 * height * torch.cos(20 * x)
        return z - rise, torch.stack([-slope, torch.zeros_like(x), torch.ones_like(x)], dim=1)

    generator = torch.Generator().manual_seed(1)
    alone = replace(progress, loss_weights={"smoothness": 1.0})
    before = None
    for _ in range(60):
        term = system_of().loss_terms(render, batch, alone, wavy, generator)["smoothness"]
        (slope,) = torch.autograd.grad(term, height)
        before = before or float(term.detach())
        with torch.no_grad():
            height -= 1e-5 * slope
    assert abs(float(height.detach())) < 0.005
    assert float(term.detach()) < 0.3 * before


def test_terms_without_random_points_draw_nothing(seen: Seen) -> None:
    render, batch, progress, field = seen
    draw = torch.Generator().manual_seed(3)
    before = draw.get_state()
    others = {name: 1.0 for name in FUNCTION_OF if name not in ("curvature", "free_space")}
    system_of().loss_terms(render, batch, replace(progress, loss_weights=others), field, draw)
    assert torch.equal(draw.get_state(), before)


def test_what_the_terms_ask_for() -> None:
    assert system_of().priors == Priors()
    late = system_of(loss=LossConfig(depth_prior=[[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]])).priors
    assert late == Priors(depth="system.loss.depth_prior")
    loss = LossConfig(depth=1.0, normal_prior=0.1, sparse_points=0.1)
    everything = system_of(loss=loss, sparse_points_per_step=7, sparse_max_error=0.5).priors
    keys = ("system.loss.depth", "system.loss.normal_prior", "system.loss.sparse_points")
    assert everything == Priors(*keys, points_per_batch=7, max_error=0.5)
    loss = LossConfig(photo_consistency=[[0.5, 0.0], [0.6, 0.5]])
    windows = system_of(loss=loss, consistency_rays=9, consistency_patch=5).priors
    assert windows == Priors(windows="system.loss.photo_consistency", window_rays=9, window_width=5)


@pytest.mark.parametrize("term", ["depth", "depth_prior", "normal_prior", "sparse_points", "curvature"])
def test_depths_have_a_gradient_only_when_a_term_needs_it(term: str) -> None:
    system = system_of(loss=LossConfig(**{term: [[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]]}))
    learns = [system.progress_at(fraction).learns_from_geometry for fraction in (0.0, 0.5, 0.6)]
    assert learns == [False, False, "depth" in term or "normal" in term]


def test_a_capture_without_the_prior_names_the_key(tmp_path: Path) -> None:
    for term in NEEDS_PRIORS:
        with pytest.raises(ConfigError, match=rf"^system\.loss\.{term}: the capture"):
            new_trainer(tmp_path / term, f"system.loss.{term}=0.1")


FEW_VIEWS = (
    *("dataset.num_images=3", "dataset.holdout=0"),
    *("trainer.initial_rays=200", "trainer.max_rays=200", "trainer.samples_per_step=2048"),
)
"""So that there are enough rays of each view to find out how its depths are scaled."""


def distance_after(folder: Path, terms: str, *options: str) -> float:
    """Mean distance between the known sphere and the field's after 60 steps that colours say little in."""
    views = [option for option in options if option.startswith("dataset.")]
    training = new_trainer(
        *(folder, *options, "system.loss={mask: 0, rgb_l1: 0.01}", f"system.loss={terms}"),
        scene=scene_with_priors(*views, monocular="depth_prior" in terms),
    )
    for _ in range(60):
        assert training.train_step().finite
        training.step += 1
    surface = RADIUS * torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    progress = training.system.progress_at(1.0)
    return float(training.model.query_sdf(surface, progress).abs().mean())


@pytest.fixture(scope="module")
def distance_without(tmp_path_factory: pytest.TempPathFactory) -> float:
    return distance_after(tmp_path_factory.mktemp("without"), "{}")


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ("{depth: 1}", ()),
        ("{depth: 1}", ("trainer.buffers=fixed",)),
        ("{normal_prior: 0.3}", ("trainer.buffers=fixed",)),
        ("{sparse_points: 1}", ()),
        ("{mask_iou: 1}", ()),
    ],
)
def test_priors_bring_the_surface_nearer(
    tmp_path: Path, terms: str, options: tuple[str, ...], distance_without: float
) -> None:
    assert distance_after(tmp_path, terms, *options) < 0.5 * distance_without


def test_depths_of_unknown_scale_bring_the_surface_nearer(tmp_path: Path) -> None:
    without, with_depths = (
        distance_after(tmp_path / name, f"{{depth_prior: {weight}}}", *FEW_VIEWS)
        for name, weight in (("without", 0), ("with", 0.1))
    )
    assert with_depths < 0.7 * without


@pytest.mark.parametrize("term", ["depth", "depth_prior", "normal_prior"])
@pytest.mark.parametrize("hidden", ["mask", "opacity", "is_served"])
def test_only_rays_that_show_the_surface_count(term: str, hidden: str, seen: Seen) -> None:
    render, batch, progress, field = seen
    if hidden == "mask":
        batch = replace(batch, mask=torch.zeros(240))
    else:
        nothing = torch.zeros(240, dtype=torch.bool if hidden == "is_served" else torch.float32)
        render = replace(render, **{hidden: nothing})
    alone = replace(progress, loss_weights={term: 1.0})
    found = system_of().loss_terms(render, batch, alone, field, torch.Generator())[term]
    assert float(found.detach()) == 0.0


def test_depths_measured_outside_the_unit_sphere_do_not_count(seen: Seen) -> None:
    render, batch, progress, field = seen
    assert batch.depth is not None
    alone = replace(progress, loss_weights={"depth": 1.0})
    for factor in (0.3, 3.0):
        moved = replace(batch, depth=factor * batch.depth)
        found = system_of().loss_terms(render, moved, alone, field, torch.Generator())["depth"]
        assert float(found.detach()) == 0.0


PROPOSALS = (*WITHOUT_MASKS, "model.background={sampler: proposal, proposal: {log2_table_size: 8}}")


def test_proposals_without_their_term_are_refused() -> None:
    for weight, is_fine in ((0, False), (1, True)):
        config = tiny_config(*PROPOSALS, f"system.loss.interlevel={weight}")
        model, system = tiny_model(config), NeuSSystem(config.system, 4, has_masks=False)
        if is_fine:
            system.check_training(model)
            continue
        with pytest.raises(ConfigError, match=r"^system\.loss\.interlevel: is 0, but the proposals"):
            system.check_training(model)


def test_histogram_terms_look_at_the_background() -> None:
    config = tiny_config(*PROPOSALS, "system.loss={interlevel: 1, distortion: 0.01}")
    model, system = tiny_model(config), NeuSSystem(config.system, 4, has_masks=False)
    progress = system.progress_at(0.05)
    # Half-way to the end of the proposals' annealing: 10 / 2 / (9 / 2 + 1).
    assert progress.proposal_anneal == pytest.approx(10 / 11)
    batch = RayBatches(tiny_scene(*PROPOSALS), seed=0).draw(40)
    render = model.render(batch.rays, progress, torch.ones(3))
    field = partial(model.query_field, progress=progress)
    terms = system.loss_terms(render, batch, progress, field, torch.Generator())
    *proposals, last = render.histograms
    assert len(proposals) == 2
    missed = torch.stack([interlevel(outer, last) for outer in proposals]).sum()
    torch.testing.assert_close(terms["interlevel"], missed)
    torch.testing.assert_close(terms["distortion"], distortion(last))


@pytest.mark.parametrize("term", ["interlevel", "distortion"])
def test_histogram_terms_of_models_without_proposals_are_refused(term: str) -> None:
    config = tiny_config(*WITHOUT_MASKS, f"system.loss.{term}=1")
    model, system = tiny_model(config), NeuSSystem(config.system, 4, has_masks=False)
    line = rf"^system\.loss\.{term}: this model places no samples by proposals"
    with pytest.raises(ConfigError, match=line):
        system.check_training(model)
