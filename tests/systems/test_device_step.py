"""Steps over buffers of fixed size: the same numbers as packed ones, and nothing that a host waits for."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from helpers_waiting import NoWaiting
from sphere_priors import rows_of, scene_with_priors
from test_bad_steps import poison
from test_resume import differences
from tiny import (
    WITHOUT_MASKS,
    Judged,
    before_step,
    history,
    judge,
    new_trainer,
    parameters_of,
    raiser,
    resumed_trainer,
    same_tensors,
    tiny_config,
)
from torch import Tensor

from process_data.batches import RayBatches
from systems import checkpoint, device_step
from systems.device_step import DeviceStep, StepGraphs
from systems.neus import NeuSSystem
from systems.trainer import Trainer
from utils.errors import TrainingError
from utils.types import Batch, Budget, RenderOutput

FIXED = "trainer.buffers=fixed"
NUMERICAL = (
    *("model.sdf.gradient=numerical", "system.loss.laplacian=1e-3", "trainer.optimizer.weight_decay=0.01"),
    "system.initial_levels=2",
)
"""Neuralangelo's settings."""
SMALL = ("model.occupancy.resolution=6", "model.background.num_samples=4", "trainer.max_rays=16")
"""For Triton's interpreter, which takes a while."""
REFLECTION = ("model.radiance.head=reflection",)
IMPORTANCE = ("model.importance=12",)
EMBEDDING = ("model.appearance.mode=embedding", "model.appearance.width=4")
EXPOSURE = ("model.appearance.mode=exposure",)
POSES = ("trainer.poses.refine=true",)
ON_GPU_CODE = pytest.param("cuda", marks=needs_triton)


def device_step_of(training: Trainer) -> DeviceStep:
    assert training.device_step is not None
    return training.device_step


# Against packed buffers


PROPOSALS = (
    *WITHOUT_MASKS,
    "model.background={sampler: proposal, proposal: {num_samples: [6, 5], max_resolutions: [8, 16]}}",
    "model.background.proposal={num_levels: 2, log2_table_size: 8, base_resolution: 4, hidden_width: 8}",
    "system.loss={interlevel: 1, distortion: 0.01}",
)
EVERY_TERM = (
    "system.loss={opacity: 0.1, sparsity: 0.1, rgb_l2: 1, rgb_charbonnier: 1, sparse_points: 1, depth: 1}",
    "system.loss={depth_prior: 1, normal_prior: 0.1, eikonal_random: 0.1, curvature: 1e-3}",
    "system.loss={photo_consistency: 0.5, laplacian: 1e-4, eikonal_near: 0.1, smoothness: 1e-3}",
    *("system.consistency_rays=6000", "system.consistency_patch=3", "system.inv_s=[[0,19],[1,21]]"),
    # Of two batches with fewer samples the random numbers would differ.
    *("system.random_points_per_step=16", "system.sparse_points_per_step=16"),
    "system.surface_points_per_step=16",
)
"""All but the masks', which are on where there are masks."""


def batch_with_priors(*overrides: str) -> Batch:
    """24 rays of one view, most of them of the sphere: enough to find out how its depths are scaled."""
    config = tiny_config(*overrides, *EVERY_TERM)
    scene = scene_with_priors(*overrides)
    system = NeuSSystem(config.system, 4, scene.masks is not None)
    batch = RayBatches(scene, seed=0, priors=system.priors).draw(6000)
    batch = rows_of(batch, torch.where(batch.rays.camera_indices == 1)[0])
    # Mixed, so that of every stretch some rays hit it.
    is_hit = (given(batch.depth) > 0).long()
    order = torch.cat([is_hit.argsort(descending=True)[:18], is_hit.argsort()[:6]])
    return rows_of(batch, order.view(3, 8).t().flatten())


def given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def render_and_differentiate(
    overrides: tuple[str, ...], batch: Batch, budget: Budget | None, backend: str
) -> Judged:
    return judge(tiny_config(*overrides, f"model.backend={backend}", *EVERY_TERM), batch, budget)


@pytest.mark.parametrize("backend", ["cpu", "reference", ON_GPU_CODE])
@pytest.mark.parametrize(
    "overrides",
    [(), WITHOUT_MASKS, ("model.density=volsdf",), REFLECTION, NUMERICAL, IMPORTANCE, EMBEDDING, PROPOSALS],
    ids=["masks", "background", "volsdf", "reflection", "numerical", "importance", "embedding", "proposals"],
)
@pytest.mark.parametrize("prunes", [True, False], ids=["pruned", "all"])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compares backends of the CPU")
def test_same_numbers_as_packed(overrides: tuple[str, ...], backend: str, prunes: bool) -> None:
    if not prunes:
        overrides = (*overrides, "model.min_transmittance=0")
    batch = batch_with_priors(*overrides)
    packed, terms, gradients = render_and_differentiate(overrides, batch, None, "cpu")
    assert all(float(term.detach()) > 0.0 for term in terms.values())
    budget = Budget(torch.tensor(24), marched=1500, rendered=1100)
    padded, fixed_terms, fixed_gradients = render_and_differentiate(overrides, batch, budget, backend)
    assert padded.is_served is not None
    assert padded.is_served.all()
    assert (int(padded.num_rays), int(padded.num_samples)) == (24, packed.num_samples)
    assert int(padded.num_marched) == packed.num_marched
    assert len(padded.sdf) == 1100
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(getattr(padded, name), getattr(packed, name), rtol=1e-4, atol=1e-5)
    assert fixed_terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(fixed_terms[name], term, rtol=1e-4, atol=1e-6)
    assert fixed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            fixed_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("num_rays", "marched", "rendered"),
    [(24, 150, 100), (24, 80, 400), (7, 1500, 1100), (0, 1500, 1100), (24, 3, 2)],
    ids=["few rendered", "few marched", "few rays", "no rays", "no room"],
)
@pytest.mark.parametrize(
    "overrides", [(), WITHOUT_MASKS, PROPOSALS], ids=["masks", "background", "proposals"]
)
def test_rays_without_room_have_no_part(
    overrides: tuple[str, ...], num_rays: int, marched: int, rendered: int
) -> None:
    batch = batch_with_priors(*overrides)
    budget = Budget(torch.tensor(num_rays), marched, rendered)
    render, terms, gradients = render_and_differentiate(overrides, batch, budget, "cpu")
    assert render.is_served is not None
    served = int(render.is_served.sum())
    assert served <= num_rays
    if num_rays == 24:
        assert served < 24
    assert int(render.num_marched) <= marched
    assert int(render.num_samples) <= rendered
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    if served == 0:
        on_rays = terms.keys() - {"sparse_points", "eikonal_random", "smoothness"}
        assert all(float(terms[name].detach()) == 0.0 for name in on_rays)
        return
    chosen = render.is_served.nonzero().squeeze(1)
    some = rows_of(batch, chosen)
    _, expected, expected_gradients = render_and_differentiate(overrides, some, None, "cpu")
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term, rtol=1e-4, atol=1e-6)
    for name, gradient in expected_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9)


# Training


@pytest.mark.parametrize(
    "overrides",
    [(), ("trainer.foreground_share=0.5", "trainer.optimizer.clip_norm=0.1"), WITHOUT_MASKS, NUMERICAL],
    ids=["masks", "clipped", "background", "numerical"],
)
def test_resume_is_exact(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    overrides = (*overrides, FIXED, "trainer.max_steps=40")
    straight = new_trainer(tmp_path / "straight", *overrides)
    straight.train()
    first = new_trainer(tmp_path / "broken", *overrides)
    before_step(first, 20, raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = resumed_trainer(first, *overrides)
    second.train()
    states = [checkpoint.load(run.run.checkpoints / "last.pth") for run in (straight, second)]
    for state in states:
        del state["train_seconds"], state["random"]
    assert differences(*states) == []


def test_a_run_moves_between_packed_and_fixed_buffers(tmp_path: Path) -> None:
    first = new_trainer(tmp_path, "trainer.max_steps=10")
    first.train()
    second = resumed_trainer(first, "trainer.max_steps=20", FIXED)
    assert same_tensors(parameters_of(first), parameters_of(second))
    moments = second.optimizer.state_dict()["state"][0]
    assert torch.equal(moments["exp_avg"], first.optimizer.state_dict()["state"][0]["exp_avg"])
    second.train()
    third = resumed_trainer(second, "trainer.max_steps=30")
    third.train()
    assert third.step == 30
    assert int(third.optimizer.state_dict()["state"][0]["step"]) == 30
    assert history(third.run)["step"] == [str(step) for step in range(1, 31)]


def test_rays_follow_the_budget(tmp_path: Path) -> None:
    options = (FIXED, "trainer.samples_per_step=900", "trainer.max_rays=400", "trainer.lookahead=3")
    training = new_trainer(tmp_path, *options)
    records = []
    for _ in range(80):
        records.append(training.train_step())
        training.step += 1
    assert all(record.num_samples <= 900 and record.num_marched <= 2700 for record in records)
    fill = [max(record.num_samples / 900, record.num_marched / 2700) for record in records[-30:]]
    assert 0.85 < sum(fill) / len(fill) <= 1.0
    assert training.config.initial_rays < records[-1].num_rays <= 400


def test_training_learns_and_terms_come_and_go(tmp_path: Path) -> None:
    options = ("trainer.max_steps=120", "trainer.samples_per_step=1024")
    training = new_trainer(tmp_path, FIXED, *options, "system.loss.sparsity=[[0,0],[0.5,0],[0.6,0.01]]")
    surface = 0.5 * torch.nn.functional.normalize(torch.randn(500, 3), dim=1)

    def distance() -> float:
        progress = training.system.progress_at(training.fraction_done())
        return float(training.model.query_sdf(surface, progress).abs().mean())

    before = distance()
    training.train()
    # The sphere starts with radius 0.4 and is 0.5 in the photographs.
    assert before == pytest.approx(0.1, abs=0.02)
    assert distance() < 0.03
    sparsity = [float(value) for value in history(training.run)["sparsity"]]
    assert sparsity[50] == 0.0
    assert sparsity[-1] > 0.0


# Bad steps


@pytest.mark.parametrize("kind", ["eikonal", "rgb_l1", "gradient"])
def test_a_bad_step_changes_nothing(tmp_path: Path, kind: str) -> None:
    training = new_trainer(tmp_path, FIXED)
    poison(training, range(3, 5).__contains__, kind)
    for step in range(6):
        before = parameters_of(training)
        record = training.train_step()
        training.step += 1
        assert record.finite == (step not in (3, 4))
        assert same_tensors(before, parameters_of(training)) != record.finite
        assert int(device_step_of(training).bad_steps) == {3: 1, 4: 2}.get(step, 0)


def test_many_bad_steps_roll_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("trainer.max_steps=20", "trainer.checkpoint_every=10", "trainer.max_bad_steps=3")
    training = new_trainer(tmp_path, FIXED, *options)
    poison(training, range(14, 17).__contains__, "eikonal")
    with caplog.at_level(logging.WARNING):
        training.train()
    assert (training.step, training.bad_steps.rollbacks, training.bad_steps.in_a_row) == (20, 1, 0)
    assert "step 14 skipped: eikonal is not finite (1 in a row)" in caplog.text
    assert "ckpt_000010.pth (1 of 3)" in caplog.text


def test_no_checkpoint_amid_bad_steps(tmp_path: Path) -> None:
    """Even where the host has not looked for a while."""
    options = ("trainer.max_steps=22", "trainer.checkpoint_every=8", "trainer.log_every=20")
    training = new_trainer(tmp_path, FIXED, *options)
    poison(training, range(9, 18).__contains__, "eikonal")
    training.train()
    # At step 16 the run was amid bad steps; the last one is written at the end.
    names = sorted(path.name for path in training.run.checkpoints.glob("ckpt_*.pth"))
    assert names == ["ckpt_000008.pth", "ckpt_000022.pth"]


def test_roll_backs_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    options = ("trainer.max_steps=50", "trainer.checkpoint_every=5", "trainer.max_bad_steps=2")
    training = new_trainer(tmp_path, FIXED, *options)
    poison(training, range(7, 1000).__contains__, "gradient")
    with pytest.raises(TrainingError, match="a gradient is not finite in 2 steps in a row"):
        training.train()
    assert training.bad_steps.rollbacks == 3


# Out of memory


def test_out_of_memory_halves_the_budget_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = new_trainer(tmp_path, FIXED, "trainer.max_steps=12")
    before_step(training, 5, lambda: starve(training, above=200))
    with caplog.at_level(logging.WARNING):
        training.train()
    assert training.step == 12
    assert device_step_of(training).budget.rendered == 128
    lines = [entry.getMessage() for entry in caplog.records if "out of memory" in entry.getMessage()]
    assert lines == ["step 5: out of memory; going on with 128 samples a step instead of twice as many"]
    assert all(int(samples) <= 128 for samples in history(training.run)["samples"][5:])


def test_what_filled_the_memory_is_gone_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_trainer(tmp_path, FIXED, "trainer.max_steps=7")
    alive: list[weakref.ref[Tensor]] = []

    def starving(*arguments: Any) -> RenderOutput:
        activations = torch.zeros(10)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    render = training.model.render
    before_step(training, 5, lambda: vars(training.model).update(render=render if alive else starving))
    shrink = training.shrink_budget

    def shrinking() -> None:
        assert alive
        assert all(reference() is None for reference in alive)
        shrink()

    monkeypatch.setattr(training, "shrink_budget", shrinking)
    training.train()
    assert training.step == 7


def test_out_of_memory_twice_ends_the_run(tmp_path: Path) -> None:
    training = new_trainer(tmp_path, FIXED, "trainer.max_steps=12")
    before_step(training, 5, lambda: starve(training, above=100))
    with pytest.raises(TrainingError, match=r"step 5: out of memory; set trainer\.samples_per_step"):
        training.train()


def test_out_of_memory_with_packed_buffers_says_what_to_lower(tmp_path: Path) -> None:
    training = new_trainer(tmp_path)
    before_step(training, 2, raiser(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(TrainingError, match=r"trainer\.samples_per_step"):
        training.train()


def starve(training: Trainer, above: int) -> None:
    """From now on rendering into buffers above some size runs out of memory."""
    render = training.model.render

    def starving(*arguments: Any) -> RenderOutput:
        if arguments[-1].rendered > above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return render(*arguments)

    vars(training.model)["render"] = starving


# Nothing waits


@needs_triton
@pytest.mark.parametrize(
    "overrides",
    [
        *[(), WITHOUT_MASKS, EVERY_TERM, ("model.density=volsdf",), REFLECTION, NUMERICAL, IMPORTANCE],
        *[EMBEDDING, EXPOSURE, POSES],
    ],
    ids=[
        *["masks", "background", "terms", "volsdf", "reflection", "numerical", "importance"],
        *["embedding", "exposure", "poses"],
    ],
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks this itself, see benchmarks/engine.py")
def test_a_step_waits_for_nothing(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    training = new_trainer(
        *(tmp_path, FIXED, "model.backend=cuda", *overrides),
        *(*SMALL, "trainer.samples_per_step=40", "trainer.optimizer.clip_norm=1.0"),
        scene=scene_with_priors() if overrides == EVERY_TERM else None,
    )
    training.train_step()
    step = device_step_of(training)
    progress = training.system.progress_at(0.5)
    live = step._upload(progress, training.learning_rates())
    with NoWaiting():
        step._step(live)
    # What it would find.
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(torch.ones(()))
    with pytest.raises(AssertionError, match="index"), NoWaiting():
        torch.ones(3)[torch.ones(3) > 0]


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compares the interpreter with the CPU's kernels")
@pytest.mark.parametrize("overrides", [(), WITHOUT_MASKS], ids=["masks", "background"])
def test_the_kernels_of_a_gpu_train_alike(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Some steps with the Triton kernels end where the same steps with the CPU's end."""
    losses, parameters = [], []
    for backend in ("cpu", "cuda"):
        training = new_trainer(
            *(tmp_path / backend, FIXED, f"model.backend={backend}", *overrides),
            *(*SMALL, "trainer.samples_per_step=40", "trainer.optimizer.warmup_steps=0"),
        )
        found = []
        for _ in range(3):
            found.append(float(training.train_step().loss))
            training.step += 1
        losses.append(found)
        parameters.append(parameters_of(training))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # Adam's first steps hang on the gradients' signs alone, and near zero these are chance.
    for name, parameter in parameters[0].items():
        assert (parameters[1][name] - parameter).abs().mean() < 1e-3, name


# Recording


class FakeCuda:
    """Stands in for CUDA's streams and graphs: recording runs a function, replaying runs it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.recording: Any = None
        outer = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                outer.log.append("wait")

        class Graph:
            def __init__(self) -> None:
                self.generators: list[Any] = []

            def register_generator_state(self, generator: Any) -> None:
                self.generators.append(generator)

            def pool(self) -> str:
                return "pool"

            def replay(self) -> None:
                outer.log.append("replay")

        @contextmanager
        def aside(stream: Any) -> Iterator[None]:
            outer.log.append("aside")
            yield

        @contextmanager
        def capture(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
            outer.log.append(f"record({pool}, {len(graph.generators)} generators)")
            yield

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
        monkeypatch.setattr(torch.cuda, "stream", aside)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def test_a_step_is_recorded_once_per_kind_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    graphs = StepGraphs(torch.device("cuda"), [torch.Generator(), torch.Generator()])
    result = torch.zeros(2)
    calls = []

    def step() -> Tensor:
        calls.append(1)
        return result

    for _ in range(device_step._WARMUP + 3):
        graphs.run("a", step)
    # Three steps for real, one that is only recorded, and no call after that.
    assert len(calls) == device_step._WARMUP + 1
    assert [entry for entry in fake.log if entry != "wait"] == [
        *["aside"] * device_step._WARMUP,
        *("record(None, 2 generators)", "replay", "replay", "replay"),
    ]
    replayed = graphs.run("a", step)
    result += 1
    assert torch.equal(replayed, torch.zeros(2)), "a replay's result must outlive the next one"
    fake.log.clear()
    for _ in range(device_step._WARMUP + 1):
        graphs.run("b", step)
    assert [entry for entry in fake.log if entry != "wait"] == [
        *["aside"] * device_step._WARMUP,
        *("record(pool, 2 generators)", "replay"),
    ]


def test_without_recording_every_call_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    for device, records in (("cuda", False), ("cpu", True)):
        graphs = StepGraphs(torch.device(device), [], records)
        calls: list[int] = []

        def step(calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return torch.zeros(1)

        for _ in range(7):
            graphs.run("a", step)
        assert len(calls) == 7


def test_a_step_of_another_kind_is_recorded_anew(tmp_path: Path) -> None:
    """Terms that start or stop, and a background that begins to learn, change what a step does."""
    training = new_trainer(
        *(tmp_path, FIXED, *WITHOUT_MASKS, "model.background.wait=0.3"),
        "system.loss.sparsity=[[0,0],[0.5,0],[0.6,0.01]]",
    )
    keys: list[Any] = []
    step = device_step_of(training)
    run = step._graphs.run

    def remember(key: Any, function: Any) -> Tensor:
        keys.append(key)
        return run(key, function)

    vars(step._graphs)["run"] = remember
    for fraction in (0.0, 0.2, 0.4, 0.55, 0.9):
        step(training.system.progress_at(fraction), training.learning_rates())
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 3]
