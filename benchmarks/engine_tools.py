"""What the engine's benchmark is made of: sizes, clocks, tables that grow line by line, and trainers."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.machine import describe_machine, peak_memory
from models import build_model
from process_data import load_scene
from run import sections
from systems import SYSTEMS
from systems.preflight import dataset_to_load
from systems.record import Run
from systems.trainer import Trainer
from utils.backend import seed_everything
from utils.config import Config, load_config
from utils.types import Scene

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = "confs/neus-synthetic.yaml"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: tuple[int, ...]
    """Samples of the checks; the last is the benchmark's."""
    odd_samples: int
    """Samples of the checks of what is special: half tables, closed levels, padding."""
    rays: int
    slow_samples: int
    """For references that walk over samples in Python."""
    grid: dict[str, int]
    """Of the hash grid in checks and comparisons."""
    resolution: int
    """Of the occupancy grid in checks and comparisons."""
    overrides: tuple[str, ...]
    """Config keys that make the embedded scene and its model small."""
    training_steps: int
    """Before phases are measured."""
    graph_steps: int
    """Compared one by one, eager against recorded."""
    repeats: int
    """Measurements of which the median is taken."""
    rounds: int
    """Likewise, where implementations take turns."""
    copy_bytes: int
    matmul_side: int
    optimizer_elements: int


_GRID = {"num_levels": 16, "log2_table_size": 19, "base_resolution": 32, "max_resolution": 2048}
_ALWAYS = ("trainer.buffers=fixed", "trainer.max_minutes=null", "test.video=false")
"""Config keys of every training here: the steps of a GPU, bounded by their number."""
FULL = Sizes(
    samples=(2**15, 2**18),
    odd_samples=2**16,
    rays=2**13,
    slow_samples=2**13,
    grid=_GRID,
    resolution=128,
    overrides=(),
    training_steps=500,
    graph_steps=50,
    repeats=30,
    rounds=9,
    copy_bytes=2**30,
    matmul_side=8192,
    optimizer_elements=2**24,
)
TINY = Sizes(
    samples=(48,),
    odd_samples=40,
    rays=12,
    slow_samples=64,
    grid={"num_levels": 3, "log2_table_size": 8, "base_resolution": 4, "max_resolution": 16},
    resolution=32,
    overrides=(
        *("dataset.scene=sphere", "dataset.num_images=10", "dataset.image_size=32", "dataset.holdout=5"),
        *("model.sdf.hash_grid.num_levels=3", "model.sdf.hash_grid.log2_table_size=10"),
        *("model.sdf.hash_grid.base_resolution=4", "model.sdf.hash_grid.max_resolution=32"),
        *("model.sdf.hidden_width=16", "model.sdf.feature_width=7", "model.radiance.hidden_width=16"),
        *("model.occupancy.resolution=24", "model.min_step=0.02", "model.max_step=0.05"),
        *("trainer.samples_per_step=256", "trainer.initial_rays=48", "trainer.max_rays=96"),
        *("trainer.log_every=10", "trainer.max_steps=60", "export.resolution=32"),
    ),
    training_steps=20,
    graph_steps=6,
    repeats=2,
    rounds=2,
    copy_bytes=2**20,
    matmul_side=64,
    optimizer_elements=1000,
)


def describe(device: torch.device) -> str:
    """Processor, versions and GPU in one line."""
    if device.type != "cuda":
        return describe_machine()
    import triton

    found = torch.cuda.get_device_properties(device)
    gpu = f"{found.name} ({found.total_memory / 2**30:.0f} GiB, compute {found.major}.{found.minor})"
    return f"{gpu}, CUDA {torch.version.cuda}, Triton {triton.__version__}; {describe_machine()}"


def memory_gib(device: torch.device) -> float:
    """Largest memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory()


def first_line(error: BaseException) -> str:
    """An exception as a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")


# ---- clocks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Milliseconds on a device."""

    device: torch.device

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, function: Callable[[], Any], repeats: int, warmup: int = 3) -> list[float]:
        """Milliseconds of each call.

        On a GPU between two events. The device is kept asleep while the host queues a call, so that what is
        measured is the device's work, not the host's time to launch it.
        """
        for _ in range(warmup):
            function()
        self.wait()
        one = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        return [one(function) for _ in range(repeats)]

    def median(self, function: Callable[[], Any], repeats: int, warmup: int = 3) -> float:
        """The median of :meth:`times`."""
        return statistics.median(self.times(function, repeats, warmup))

    def wall(self, function: Callable[[], Any], repeats: int) -> float:
        """Milliseconds by the host's clock until the device has done a call; a median, without warm-up."""
        times = []
        for _ in range(repeats):
            self.wait()
            times.append(self._on_cpu(lambda: (function(), self.wait())))
        return statistics.median(times)

    def _on_gpu(self, function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles: about 11 ms, in which the host gets ahead
        start.record()
        function()
        end.record()
        self.wait()
        return start.elapsed_time(end)

    def _on_cpu(self, function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)


# ---- tables ------------------------------------------------------------------------------------------------

Cell = str | int | float | None


def shown(cell: Cell) -> str:
    """A cell as text: four digits of a number, nothing for what there is none of."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass
class Table:
    """Rows that are printed as they come."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"\n{self.title}\n{' | '.join(self.columns)}", flush=True)

    def add(self, *cells: Cell) -> None:
        """Print and keep a row."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(cells)
        print(" | ".join(map(shown, cells)), flush=True)

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *(tuple(map(shown, row)) for row in self.rows)]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


class Report:
    """What one command measures: printed at once, and written to ``engine-COMMAND.md`` and ``.json``."""

    def __init__(self, command: str, device: torch.device, out: Path) -> None:
        self.out = out
        self.tables: list[Table] = []
        self._command = command
        self._machine = describe(device)
        out.mkdir(parents=True, exist_ok=True)
        print(f"engine {command}: {self._machine}", flush=True)

    def table(self, title: str, *columns: str) -> Table:
        """Start a table."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def write(self) -> None:
        """Write what there is so far."""
        head = f"## engine.py {self._command}\n\n{self._machine}\n\n"
        path = self.out / f"engine-{self._command}"
        path.with_suffix(".md").write_text(head + "\n".join(table.markdown() for table in self.tables))
        content = {
            "command": self._command,
            "machine": self._machine,
            "tables": {
                table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
                for table in self.tables
            },
        }
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"\nwrote {path}.md and .json", flush=True)


# ---- training ----------------------------------------------------------------------------------------------


def new_trainer(
    folder: Path,
    device: torch.device,
    *overrides: str,
    path: str | Path = SYNTHETIC,
    sizes_for: str | None = None,
) -> Trainer:
    """A trainer at the start of a run of its own.

    Args:
        folder: of the run's outputs.
        device: where it trains.
        overrides: config keys.
        path: of the config, from the project's root.
        sizes_for: ``cuda`` takes a GPU's sizes wherever it trains; those of ``device`` unless given.
    """
    config = load_config(ROOT / path, (*_ALWAYS, *overrides), sections(), sizes_for or device.type)
    seed_everything(config.seed)
    scene = _scene_of(config)
    model = build_model(config.model, scene, device)
    system = SYSTEMS[config.system.name][1](config.system, model.num_levels, scene.masks is not None)
    run = Run.start(config, folder, folder / "tf-logs", ["benchmarks/engine.py"])
    return Trainer(config, scene, model, system, run, device)


_scenes: dict[str, Scene] = {}


def _scene_of(config: Config) -> Scene:
    """The config's capture; loaded once, nobody changes it."""
    dataset = dataset_to_load(config, trains=True)
    key = repr(dataset)
    if key not in _scenes:
        _scenes[key] = load_scene(dataset)
    return _scenes[key]


def take_steps(trainer: Trainer, count: int) -> list[Any]:
    """Some training steps; their records, whose values stay on the device."""
    records = []
    for _ in range(count):
        records.append(trainer.train_step())
        trainer.step += 1
    return records


def active_implementations(
    package: ModuleType, device: torch.device, with_optional: bool = False
) -> dict[str, str | None]:
    """Every implementation of an operation but the reference: ``None``, or why it cannot run here."""
    checks = package.IMPLEMENTATIONS | (getattr(package, "OPTIONAL", {}) if with_optional else {})
    return {name: check(device) for name, check in checks.items() if name != "reference"}


def mean_column(records: Sequence[Any], column: int) -> float:
    """Mean of one of the step records' numbers."""
    return float(torch.stack([record.values[column] for record in records]).mean())


@functools.cache
def matmul_rate(device: torch.device, precision: str, side: int, repeats: int) -> float:
    """Measured TFLOP/s of a square matrix product: ``float32``, ``tf32`` or ``bfloat16``."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        milliseconds = Clock(device).median(lambda: a @ b, repeats)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2.0 * side**3 / milliseconds / 1e9


@functools.cache
def copy_rate(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Measured GB/s of a copy on the device, what is read and what is written counted both."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = Clock(device).median(lambda: target.copy_(source), repeats)
    return 2.0 * num_bytes / milliseconds / 1e6
