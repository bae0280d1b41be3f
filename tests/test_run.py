"""The command line: what it refuses, what it calls in which order, and its exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import run
from utils.command_line import parse
from utils.errors import ConfigError, TrainingError

ROOT = Path(__file__).resolve().parents[1]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr that a senseless command line is answered with."""
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# The command line


def test_options_and_overrides_in_any_order() -> None:
    args = parse(
        ["a.b=1", "--config", "c.yaml", "--train", "x=2", "--device", "cpu", "y=-3", "--outputs_dir", "o"]
    )
    assert (args.config, args.overrides) == (Path("c.yaml"), ["a.b=1", "x=2", "y=-3"])
    assert args.outputs_dir == Path("o").resolve()
    assert args.logs_dir == Path("o").resolve() / "tf-logs"
    assert (args.train, args.test, args.mesh, args.device) == (True, False, False, "cpu")


def test_defaults() -> None:
    args = parse(["--resume", "x.pth", "--mesh"])
    assert args.outputs_dir == Path("outputs").resolve()
    assert args.logs_dir == Path("outputs/tf-logs").resolve()
    assert (args.device, args.config, args.overrides) == ("auto", None, [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "nothing to do"),
        ("--config c.yaml", "nothing to do"),
        ("--train", "no config"),
        ("--train --resume latest", "no config"),
        ("--config c.yaml --test", "no trained model"),
        ("--config c.yaml --mesh", "no trained model"),
        ("--eval a.ply", "belong together"),
        ("--train --config c.yaml --gt a.ply", "belong together"),
        ("--train --config c.yaml --tain", "unrecognized arguments: --tain"),
        ("--train --config c.yaml --device gpu", "invalid choice: 'gpu'"),
        ("--prepare photos", "no folder to write to: add --out"),
        ("--config c.yaml --convert neus", "no folder to write to: add --out"),
        ("--config c.yaml --convert obj --out x", "invalid choice: 'obj'"),
        ("--inspect", "no config"),
        ("--train --config c.yaml --inspect", "--inspect does one thing alone"),
        ("--doctor --eval a.ply --gt b.ply", "--eval does one thing alone"),
        ("--eval a.ply --dtu DTU", "--dtu DIR and --scan N belong together"),
        ("--eval a.ply --gt b.ply --scan 3", "--dtu DIR and --scan N belong together"),
        ("--dtu DTU --scan 3", "belong together"),
        ("--sweep a.yaml --config c.yaml", "--sweep names its config in its file"),
        ("--sweep a.yaml --train", "--sweep does one thing alone"),
        ("--train --config c.yaml --vram 5", "invalid choice: 5 (choose from 4, 8, 12, 24)"),
        ("--train --config c.yaml --out x", "--out belongs to --prepare, --convert and --inspect"),
    ],
)
def test_senseless_command_lines(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    line = refusal(capsys, *argv.split())
    assert line.startswith("run.py: ")
    assert message in line


def test_help_and_refusals_import_nothing_heavy() -> None:
    program = (
        "import sys, run\n"
        "try: run.main(sys.argv[1:])\n"
        "except SystemExit as leave: print(leave.code, 'torch' in sys.modules, 'omegaconf' in sys.modules)\n"
    )
    for argument, code in (("--help", 0), ("--nonsense", 2)):
        command = [sys.executable, "-c", program, argument]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == f"{code} False False", done.stderr


def test_as_a_program() -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("run.py: no config: give --config confs/NAME.yaml")
    assert "Traceback" not in done.stderr


def test_waiting_threads_sleep() -> None:
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    program = "import os, run, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for given, kept in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        others = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, cwd=ROOT, env=others | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [kept, "False"]


# Dispatch, with rooms that only write down what they are asked


@dataclass(frozen=True)
class Named:
    name: str = "x"
    root_dir: str | None = None


@dataclass(frozen=True)
class Plain:
    max_steps: int = 10
    max_rays: int = 96
    poses: None = None


SCENE = SimpleNamespace(masks=None)
MODEL = SimpleNamespace(num_levels=4)


def make_system(config: Any, num_levels: int, has_masks: bool) -> SimpleNamespace:
    assert (num_levels, has_masks) == (4, False)
    return SimpleNamespace(
        progress_at=lambda fraction: f"progress {fraction}",
        priors=None,
        check_training=lambda model: None,
    )


class Rooms:
    """Stand-ins for the other rooms; ``calls`` is what was asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.config: Any = None
        self.training_error: BaseException | None = None
        self.refusal: BaseException | None = None

    def note(self, call: str, value: Any = None) -> Any:
        self.calls.append(call)
        return value

    def start(self, config: Any, outputs_dir: Path, logs_dir: Path, argv: list[str]) -> SimpleNamespace:
        assert logs_dir == outputs_dir / "tf-logs"
        assert "--config" in argv
        self.config = config
        folder = outputs_dir / config.name / "run@new"
        write_run(folder, config.to_yaml())
        return self.note("start", SimpleNamespace(folder=folder))

    def reopen(self, folder: Path, logs_dir: Path) -> SimpleNamespace:
        return self.note(f"reopen {folder.name}", SimpleNamespace(folder=folder))

    def trainer(
        self, config: Any, scene: Any, model: Any, system: Any, run: Any, device: Any
    ) -> SimpleNamespace:
        assert (scene, model, device.type) == (SCENE, MODEL, "cpu")
        assert system.progress_at(0.5) == "progress 0.5"
        self.config = config
        return SimpleNamespace(
            restore=lambda path: self.note(f"restore {path.parents[1].name}"), train=self.train
        )

    def check_overrides(self, tree: Any, overrides: list[str]) -> None:
        assert tree["dataset"]["name"] == "x"
        if "seed=13" in overrides:
            raise ConfigError("seed", "brings bad luck", "take another")

    def check_priors(self, scene: Any, priors: Any, max_rays: int) -> None:
        assert (scene, priors, max_rays) == (SCENE, None, 96)
        if self.refusal is not None:
            raise self.refusal

    def train(self) -> None:
        self.calls.append("train")
        if self.training_error is not None:
            raise self.training_error

    def load_model(self, path: Path, model: Any, tree: dict[str, Any]) -> tuple[int, float]:
        assert path.is_file()
        assert tree["name"] == "a"
        return self.note(f"load {path.parents[1].name}", (7, 0.5))

    def test(self, config: Any, scene: Any, model: Any, progress: str, run: Any, step: int) -> None:
        assert (scene, model, progress) == (SCENE, MODEL, "progress 0.5")
        self.calls.append(f"test {run.folder.name} {step}")

    def mesh(self, config: Any, scene: Any, model: Any, progress: str, run: Any, step: int) -> None:
        assert (scene, model, progress) == (SCENE, MODEL, "progress 0.5")
        self.calls.append(f"mesh {run.folder.name} {step}")


def write_run(folder: Path, parsed: str) -> Path:
    """A run's folder with its config and one checkpoint."""
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "parsed.yaml").write_text(parsed)
    (folder / "ckpt").mkdir()
    (folder / "ckpt" / "last.pth").touch()
    return folder / "ckpt" / "last.pth"


CONFIG = "name: a\ndataset: {name: x}\nmodel: {name: x}\n"


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rooms]:
    """Fakes for models, process_data and systems; the working directory holds c.yaml."""
    fake = Rooms()
    modules = {
        "process_data": {"DATASETS": {"x": (Named, None)}, "load_scene": lambda config: SCENE},
        "models": {"MODELS": {"x": (Named, None)}, "build_model": lambda config, scene, device: MODEL},
        "systems": {
            "SYSTEMS": {"x": (Named, make_system)},
            "checkpoint": SimpleNamespace(load_model=fake.load_model),
            "evaluate": SimpleNamespace(TestConfig=Plain, test=fake.test, export_and_compare=fake.mesh),
            "export": SimpleNamespace(ExportConfig=Plain),
            "preflight": SimpleNamespace(
                check_overrides=fake.check_overrides,
                dataset_to_load=lambda settings, trains: settings.dataset,
                check_priors=fake.check_priors,
                check_refinement=lambda poses, scene, system: None,
                check_model_keys=lambda model, overrides: None,
                check_video=lambda scene, config: None,
                check_extent=lambda model, config: None,
            ),
            "record": SimpleNamespace(
                Run=SimpleNamespace(start=fake.start, reopen=fake.reopen),
                EarlyLog=lambda: SimpleNamespace(pour=lambda: None),
            ),
            "trainer": SimpleNamespace(Trainer=fake.trainer),
            "trainer_config": SimpleNamespace(TrainerConfig=Plain),
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return fake


def main(command: str) -> int:
    return run.main([*command.split(), "--device", "cpu"])


def test_train_then_test(rooms: Rooms) -> None:
    assert main("--config c.yaml --train --test trainer.max_steps=3 seed=5") == 0
    assert rooms.calls == ["start", "train", "load run@new", "test run@new 7"]
    assert (rooms.config.trainer, rooms.config.seed) == (Plain(3), 5)


def test_resume_finds_the_config_of_the_run(rooms: Rooms, tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "old", CONFIG + "trainer: {max_steps: 77}\n")
    assert main("--train --resume elsewhere/old/ckpt/last.pth") == 0
    assert rooms.calls == ["load old", "reopen old", "restore old", "train"]
    assert rooms.config.trainer == Plain(77)
    os.chdir(tmp_path / "elsewhere" / "old" / "ckpt")
    assert main("--mesh --resume last.pth") == 0
    assert rooms.calls[4:] == ["load old", "reopen old", "load old", "mesh old 7"]


def test_resume_latest_takes_the_run_saved_last(rooms: Rooms, tmp_path: Path) -> None:
    for age, trial in enumerate(["z@1", "a@2", "m@3"]):
        checkpoint = write_run(tmp_path / "outputs" / "a" / trial, CONFIG)
        os.utime(checkpoint, (1000 - age, 1000 - age + 500 * (trial == "a@2")))
    (tmp_path / "outputs" / "a" / "zz@9" / "ckpt").mkdir(parents=True)
    assert main("--config c.yaml --mesh --resume latest") == 0
    assert rooms.calls == ["load a@2", "reopen a@2", "load a@2", "mesh a@2 7"]


def test_checkpoint_outside_a_run_starts_one(rooms: Rooms, tmp_path: Path) -> None:
    (tmp_path / "copied.pth").touch()
    assert main("--config c.yaml --test --resume copied.pth") == 0
    assert rooms.calls[1] == "start"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("--config d.yaml --train", "run.py: d.yaml: no such file; did you mean c.yaml?"),
        (
            "--config c.yaml --train max_step=3",
            "run.py: max_step: unknown key; did you mean trainer.max_steps?",
        ),
        ("--config c.yaml --train 3", "run.py: override '3': not of the form key=value; "),
        ("--train --resume no.pth", "run.py: no.pth: no such checkpoint; "),
        ("--config c.yaml --train --resume latest", "outputs/a: nothing to resume; run with --train first"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    rooms: Rooms, capsys: pytest.CaptureFixture[str], command: str, line: str
) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert rooms.calls == []


def test_what_cannot_be_is_refused_before_there_is_a_folder(
    rooms: Rooms, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--config c.yaml --train seed=13") == 2
    rooms.refusal = ConfigError("system.loss.depth", "there are no depth maps", "add them")
    assert main("--config c.yaml --train") == 2
    assert rooms.calls == []
    assert not Path("outputs").exists()
    assert capsys.readouterr().err.splitlines() == [
        "run.py: seed: brings bad luck; take another",
        "run.py: system.loss.depth: there are no depth maps; add them",
    ]


def test_exit_codes_of_training(rooms: Rooms, capsys: pytest.CaptureFixture[str]) -> None:
    rooms.training_error = TrainingError("step 5", "loss is not finite", "lower trainer.lr")
    assert main("--config c.yaml --train") == 2
    rooms.training_error = KeyboardInterrupt()
    (Path("outputs") / "a").rename("outputs/b")
    assert main("--config c.yaml --train") == 130
    assert capsys.readouterr().err.splitlines() == [
        "run.py: step 5: loss is not finite; lower trainer.lr",
        "run.py: interrupted; go on with --resume latest",
    ]
    rooms.training_error = RuntimeError("a bug")
    (Path("outputs") / "a").rename("outputs/c")
    with pytest.raises(RuntimeError, match="a bug"):
        main("--config c.yaml --train")


def test_eval_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ModuleType("utils.metrics")
    vars(metrics)["evaluate_meshes"] = lambda mesh, gt: {"mesh": str(mesh), "gt": str(gt), "chamfer": 0.5}
    monkeypatch.setitem(sys.modules, "utils.metrics", metrics)
    assert run.main(["--eval", "a.ply", "--gt", "b.ply"]) == 0
    assert json.loads(capsys.readouterr().out) == {"mesh": "a.ply", "gt": "b.ply", "chamfer": 0.5}
