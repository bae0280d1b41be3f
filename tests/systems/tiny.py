"""A whole training run in small, for the tests of ``systems``: see ``tiny.yaml`` for its sizes."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import Model, build_model
from models.backends import Backends
from process_data import load_scene
from run import sections
from systems import SYSTEMS
from systems.neus import NeuSSystem
from systems.record import Run
from systems.step import weighted_sum
from systems.trainer import Trainer
from utils.backend import seed_everything
from utils.config import Config, load_config
from utils.types import Batch, Budget, RenderOutput, Scene

SECTIONS = sections()
CPU = torch.device("cpu")
WITHOUT_MASKS = ("dataset.apply_mask=false", "system.loss.mask=0", "model.background.enabled=true")


def tiny_config(*overrides: str, method: str = "tiny") -> Config:
    """``tiny.yaml``, or that of another method, with ``key=value`` overrides."""
    return load_config(Path(__file__).with_name(f"{method}.yaml"), overrides, SECTIONS)


@cache
def scene_of(dataset: Any) -> Scene:
    """The scene of a dataset config; nobody changes a scene, so that all tests can share it."""
    return load_scene(dataset)


def tiny_scene(*overrides: str) -> Scene:
    return scene_of(tiny_config(*overrides).dataset)


def tiny_model(config: Config, scene: Scene | None = None) -> Any:
    """An untrained model, the same one for the same seed."""
    seed_everything(config.seed)
    return build_model(config.model, scene or scene_of(config.dataset), CPU)


def bare_model(num_proposals: int = 0, has_coarse_network: bool = False) -> Any:
    """A model that says what it has, and cannot do anything."""
    members = dict.fromkeys(Model.__abstractmethods__) | {
        "num_proposals": num_proposals,
        "has_coarse_network": has_coarse_network,
        "query_field": None,
    }
    return type("BareModel", (Model,), members)(Backends.all("cpu"))


Judged = tuple[RenderOutput, dict[str, Tensor], dict[str, Tensor]]
"""What is rendered, the unweighted loss terms, and the gradients of all parameters that have one."""


def judge(config: Config, batch: Batch, budget: Budget | None) -> Judged:
    """What untrained NeuS and its rules say of a batch halfway through training, with a budget or without."""
    scene = scene_of(config.dataset)
    model = tiny_model(config, scene)
    system = NeuSSystem(config.system, model.num_levels, scene.masks is not None)
    progress = system.progress_at(0.5)
    render = model.render(batch.rays, progress, torch.ones(3), None, budget)
    field = partial(model.query_field, progress=progress)
    terms = system.loss_terms(render, batch, progress, field, torch.Generator())
    weighted_sum(terms, progress.loss_weights).backward()
    return render, terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def new_run(config: Config, outputs: Path) -> Run:
    return Run.start(config, outputs, outputs / "tf-logs", ["--config", "tiny.yaml", "--train"])


def build_trainer(config: Config, run: Run, scene: Scene | None = None) -> Trainer:
    """A trainer with a model, an optimiser and a system of its own, in the given run's folder."""
    scene = scene or scene_of(config.dataset)
    model = tiny_model(config, scene)
    system = SYSTEMS[config.system.name][1](config.system, model.num_levels, scene.masks is not None)
    return Trainer(config, scene, model, system, run, CPU)


def new_trainer(outputs: Path, *overrides: str, scene: Scene | None = None, method: str = "tiny") -> Trainer:
    """A trainer at the start of a run of its own below ``outputs``."""
    config = tiny_config(*overrides, method=method)
    return build_trainer(config, new_run(config, outputs), scene)


def resumed_trainer(
    trainer: Trainer, *overrides: str, checkpoint: str = "last.pth", method: str = "tiny"
) -> Trainer:
    """A new trainer that goes on in the folder of an earlier one, as ``--resume`` does."""
    run = Run.reopen(trainer.run.folder, trainer.run.outputs_dir / "tf-logs")
    resumed = build_trainer(tiny_config(*overrides, method=method), run, trainer.scene)
    resumed.restore(run.checkpoints / checkpoint)
    return resumed


def before_step(trainer: Trainer, step: int, act: Callable[[], object]) -> None:
    """Do something right before the training step number ``step`` (counted from 0)."""
    take_step = trainer.train_step

    def acting_step() -> Any:
        if trainer.step == step:
            act()
        return take_step()

    vars(trainer)["train_step"] = acting_step


def raiser(error: BaseException) -> Callable[..., Any]:
    """A function that raises ``error`` whatever it is called with."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def history(run: Run) -> dict[str, list[str]]:
    """The columns of history.csv as written."""
    head, *rows = (line.split(",") for line in (run.folder / "history.csv").read_text().splitlines())
    return {name: [row[column] for row in rows] for column, name in enumerate(head)}


def parameters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
