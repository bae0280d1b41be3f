"""NeuS's rules: progress is a pure function, terms of weight zero cost nothing, errors name their key."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import raiser, tiny_config, tiny_model, tiny_scene

from process_data.batches import RayBatches
from systems import losses
from systems.neus import LossConfig, NeuSSystem, NeuSSystemConfig
from systems.step import weighted_sum
from utils.errors import ConfigError
from utils.types import Batch, Progress, RenderOutput

FUNCTION_OF = {
    **{"rgb_l1": "rgb_l1", "rgb_l2": "rgb_l2", "rgb_charbonnier": "rgb_charbonnier", "eikonal": "eikonal"},
    **{"mask": "mask_bce", "opacity": "opacity_entropy", "sparsity": "sparsity"},
}


def system_of(**changes: Any) -> NeuSSystem:
    return NeuSSystem(NeuSSystemConfig(**changes), num_levels=12, has_masks=True)


@pytest.fixture(scope="module")
def seen() -> tuple[RenderOutput, Batch, Progress]:
    """A render of an untrained model, and the photographs."""
    model = tiny_model(tiny_config())
    progress = system_of().progress_at(0.5)
    batch = RayBatches(tiny_scene(), seed=0).draw(40)
    return model.render(batch.rays, progress, torch.ones(3)), batch, progress


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


def test_annealing_of_no_length_is_over_at_once() -> None:
    progress = system_of(cos_anneal_end=0.0, levels_end=0.0).progress_at(0.0)
    assert (progress.cos_anneal, progress.active_levels) == (1.0, 12.0)


def test_more_initial_levels_than_there_are() -> None:
    system = NeuSSystem(NeuSSystemConfig(initial_levels=99.0), num_levels=3, has_masks=True)
    assert [system.progress_at(k / 4).active_levels for k in range(5)] == [3.0] * 5


@pytest.mark.parametrize("term", FUNCTION_OF)
def test_each_term_alone(term: str, seen: tuple[RenderOutput, Batch, Progress]) -> None:
    render, batch, progress = seen
    alone = replace(progress, loss_weights={term: 0.5})
    terms = system_of().loss_terms(render, batch, alone)
    assert list(terms) == [term]
    expected = {
        "rgb_l1": losses.rgb_l1(render.rgb, batch.rgb),
        "rgb_l2": losses.rgb_l2(render.rgb, batch.rgb),
        "rgb_charbonnier": losses.rgb_charbonnier(render.rgb, batch.rgb),
        "eikonal": losses.eikonal(render.gradient),
        "mask": losses.mask_bce(render.opacity, batch.mask) if batch.mask is not None else torch.zeros(()),
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
    term: str, seen: tuple[RenderOutput, Batch, Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    render, batch, progress = seen
    monkeypatch.setattr(losses, FUNCTION_OF[term], raiser(AssertionError("computed")))
    everything_else = {name: 1.0 for name in FUNCTION_OF if name != term}
    terms = system_of().loss_terms(render, batch, replace(progress, loss_weights=everything_else))
    assert set(terms) == set(FUNCTION_OF) - {term}
    with pytest.raises(AssertionError, match="computed"):
        system_of().loss_terms(render, batch, replace(progress, loss_weights={term: 1.0}))


def test_mask_loss_without_masks_names_its_key() -> None:
    for weight in (0.1, [[0.0, 0.0], [0.5, 0.0], [0.6, 1.0]]):
        config = NeuSSystemConfig(loss=LossConfig(mask=weight))
        with pytest.raises((ValueError, ConfigError), match=r"system\.loss\.mask: needs masks"):
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
        ("system.levels_end=-0.1", "system.levels_end"),
        ("system.initial_levels=-1", "system.initial_levels"),
        ("system.background=pink", "system.background"),
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
