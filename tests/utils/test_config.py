"""Configs: merge order, names, types, interpolations, round trip, and every error line."""

import re
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from utils.config import Config, calc_exp_lr_decay_rate, load_config
from utils.errors import ConfigError


@dataclass(frozen=True)
class HashGrid:
    levels: int = 12
    growth: float = 1.5

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(
                # It stands in several places.
                f"hash_grid.levels: must be at least 1, got {self.levels}; use e.g. 12"
            )


@dataclass(frozen=True)
class Sdf:
    hash_grid: HashGrid = field(default_factory=HashGrid)
    widths: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("model.sdf.widths: must be one number or more")


@dataclass(frozen=True)
class Background:
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    strength: Any = 0.5
    hash_grid: HashGrid = field(default_factory=HashGrid)


@dataclass(frozen=True)
class NeuS:
    name: str = "neus"
    sdf: Sdf = field(default_factory=Sdf)
    backend: Literal["auto", "reference", "cpu"] = "auto"
    clip: float | None = None
    background: Background | None = None


@dataclass(frozen=True)
class NeRF:
    name: str = "nerf"
    width: int = 256


@dataclass(frozen=True)
class Folder:
    root_dir: str
    name: str = "dtu"
    holdout: Any = 8
    apply_mask: bool = False


@dataclass(frozen=True)
class Synthetic:
    name: str = "synthetic"
    views: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True)
class Losses:
    rgb: Any = 1.0
    eikonal: Any = ((0.0, 0.0), (1.0, 0.1))


@dataclass(frozen=True)
class System:
    name: str = "neus"
    loss: Losses = field(default_factory=Losses)


@dataclass(frozen=True)
class Trainer:
    max_steps: int = 1000
    max_minutes: float | None = None
    lr: float = 0.01
    decay: float = 0.5
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("the learning rate must be positive")


@dataclass(frozen=True)
class Export:
    resolution: int = 256


@dataclass(frozen=True)
class Report:
    chunk: int = 4096


SECTIONS: dict[str, Any] = {
    "dataset": {"dtu": Folder, "synthetic": Synthetic},
    "model": {"neus": NeuS, "nerf": NeRF},
    "system": {"neus": System, "nerf": System},
    "trainer": Trainer,
    "export": Export,
    "test": Report,
}
MINIMAL = "dataset: {name: dtu, root_dir: inputs/scan65/}\nmodel: {name: neus}\n"


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> Config:
    (folder / "x.yaml").write_text(text)
    return load_config(folder / "x.yaml", overrides, SECTIONS)


def complaint(folder: Path, text: str = MINIMAL, *overrides: str) -> str:
    """The one line that a bad config is answered with, the folder left out."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert re.match(r".+: .+; .+", line)
    return line.replace(f"{folder}/", "")


# What loads


def test_defaults_and_derived_names(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.name, config.tag, config.seed) == ("neus-dtu-scan65", "run", 42)
    assert config.model == NeuS()
    assert config.dataset == Folder("inputs/scan65/")
    assert config.trainer == Trainer()
    assert config.system == System(loss=Losses(eikonal=[[0.0, 0.0], [1.0, 0.1]]))
    with pytest.raises(FrozenInstanceError):
        config.trainer.max_steps = 3


def test_name_without_a_folder(tmp_path: Path) -> None:
    assert load(tmp_path, "dataset: {name: synthetic}\nmodel: {name: nerf}\n").name == "nerf-synthetic"
    assert (
        load(tmp_path, MINIMAL, "dataset.root_dir=.", "name=${basename:null}-${basename:/a/b/}").name
        == "none-b"
    )


def test_bases_merge_in_order_below_the_file_and_overrides_above(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "deep.yaml").write_text("trainer: {max_steps: 1, lr: 1, max_minutes: 1, decay: 1}\n")
    (base / "one.yaml").write_text("base: deep.yaml\ntrainer: {lr: 2, max_minutes: 2, decay: 2}\n")
    (base / "two.yaml").write_text("base: [deep.yaml]\ntrainer: {max_minutes: 3, decay: 3}\n")
    text = "base: [base/two.yaml, base/one.yaml]\ntrainer: {max_minutes: 4, decay: 4}\n" + MINIMAL
    config = load(tmp_path, text, "trainer.decay=9", "trainer.decay=5")
    assert config.trainer == Trainer(max_steps=1, lr=2.0, max_minutes=4.0, decay=5.0)


def test_override_values_are_typed_yaml(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "model.sdf.widths=[32,16,8]",
        "model.sdf.hash_grid.levels=4",
        "model.background.color=[0,0.5,1]",
        "model.clip=1e-3",
        "trainer.rates={table: 1e-2}",
        "trainer.max_minutes=null",
        "dataset.apply_mask=true",
        "dataset.holdout=[0,8]",
        "system.loss.eikonal=0.2",
        "system.loss.rgb=[[0,1],[0.5,2.5]]",
    )
    assert config.model.sdf == Sdf(HashGrid(levels=4), (32, 16, 8))
    assert config.model.background == Background((0.0, 0.5, 1.0))
    assert config.model.clip == pytest.approx(1e-3)
    assert config.trainer == Trainer(rates={"table": 0.01})
    assert config.dataset == Folder("inputs/scan65/", holdout=[0, 8], apply_mask=True)
    assert config.system.loss == Losses(rgb=[[0, 1], [0.5, 2.5]], eikonal=0.2)


def test_free_value_alone_makes_its_optional_group(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "model.background.strength=[[0,1]]").model.background == Background(
        strength=[[0, 1]]
    )


def test_section_with_everything_commented_out_is_empty(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "trainer:\n#  lr: 3\n").trainer == Trainer()


def test_interpolations_and_resolvers(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "trainer.decay=${calc_exp_lr_decay_rate:0.01,2}",
        "trainer.max_steps=${idiv:${export.resolution},3}",
        "trainer.lr=${div:1,${add:2,2}}",
        "test.chunk=${sub:${mul:2,${trainer.max_steps}},70}",
        "system.loss.rgb=[[0,'${trainer.lr}']]",
    )
    assert config.trainer == Trainer(decay=pytest.approx(0.1), max_steps=85, lr=0.25)
    assert config.test.chunk == 100
    assert config.system.loss.rgb == [[0, 0.25]]
    assert calc_exp_lr_decay_rate(0.1, 20000) ** 20000 == pytest.approx(0.1)


def test_parsed_yaml_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "name=${model.name}-x",
        "tag='1e-5'",
        "trainer.lr=1e-5",
        "trainer.max_minutes=.inf",
        "dataset.holdout=${model.sdf.widths}",
        "model.background.color=[0,0,1e-22]",
        "dataset.root_dir='a b: #c'",
    )
    (tmp_path / "parsed.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "parsed.yaml", [], SECTIONS)
    assert again == config
    assert again.tag == "1e-5"
    assert type(again.model.sdf.widths) is tuple
    assert "${" not in config.to_yaml()
    assert "!!" not in config.to_yaml()


# What is refused


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.max_step=3", "trainer.max_step: unknown key; did you mean trainer.max_steps?"),
        ("max_steps=3", "max_steps: unknown key; did you mean trainer.max_steps?"),
        ("loss.eikonl=3", "loss.eikonl: unknown key; did you mean system.loss.eikonal?"),
        ("system.loss.eikonl=3", "system.loss.eikonl: unknown key; did you mean system.loss.eikonal?"),
        ("trainr.lr=3", "trainr.lr: unknown key; did you mean trainer.lr?"),
        (
            "model.hash_grid.levels=3",
            "model.hash_grid.levels: unknown key; did you mean model.sdf.hash_grid.levels?",
        ),
        ("export.qqq=3", "export.qqq: unknown key; known here: resolution"),
        ("trainer.max_steps=abc", "trainer.max_steps: expected int, got 'abc'; correct the value"),
        ("trainer.max_steps=1.5", "trainer.max_steps: expected int, got 1.5; correct the value"),
        ("trainer.max_steps.now=1", "trainer.max_steps: expected int, got {'now': 1}; correct the value"),
        ("trainer.lr=null", "trainer.lr: expected float, got None; correct the value"),
        (
            "trainer.max_minutes=[1]",
            "trainer.max_minutes: expected float or null, got [1]; correct the value",
        ),
        (
            "trainer.rates.a=x",
            "trainer.rates: expected a mapping of keys to values, got {'a': 'x'}; correct the value",
        ),
        ("modl.name=neus", "modl.name: unknown key; did you mean model.name?"),
        ("trainer=5", "trainer: expected a mapping of keys to values, got 5; correct the value"),
        (
            "model.backend=cpuu",
            "model.backend: expected one of auto, reference, cpu, got 'cpuu'; did you mean cpu?",
        ),
        (
            "model.sdf.widths=[8,x]",
            "model.sdf.widths: expected a list of int, got [8, 'x']; correct the value",
        ),
        (
            "model.background.color=[0,1]",
            (
                "model.background.color: expected a list of 3 (float, float, float), "
                "got [0, 1]; correct the value"
            ),
        ),
        ("model.name=neuss", "model.name: unknown name 'neuss'; did you mean neus? known: nerf, neus"),
        ("model.name=zzz", "model.name: unknown name 'zzz'; choose one of: nerf, neus"),
        ("dataset.name=null", "dataset.name: not set; choose one of: dtu, synthetic"),
        (
            "trainer.lr=${trainer.max_stps}",
            (
                "trainer.lr: ${trainer.max_stps} refers to 'trainer.max_stps', which does not exist; "
                "did you mean ${trainer.max_steps}?"
            ),
        ),
        (
            "trainer.lr=${tag}",
            "trainer.lr: expected float, got '${tag}'; correct the value",
        ),
        (
            "model.sdf.hash_grid.levels=0",
            "model.sdf.hash_grid.levels: must be at least 1, got 0; use e.g. 12",
        ),
        (
            "model.background.hash_grid.levels=0",
            "model.background.hash_grid.levels: must be at least 1, got 0; use e.g. 12",
        ),
        ("model.sdf.widths=[]", "model.sdf.widths: must be one number or more; correct the value"),
        ("trainer.lr=-1", "trainer: the learning rate must be positive; correct the value"),
        ("seed=-1", "seed: must be between 0 and 2^32 - 1, got -1; choose another seed"),
        ("tag=a/b", "tag: 'a/b' cannot be the name of a folder; leave out slashes"),
        ("foo", "override 'foo': not of the form key=value; write e.g. trainer.max_steps=3000"),
        ("=3", "override '=3': not of the form key=value; write e.g. trainer.max_steps=3000"),
        ("a..b=3", "override 'a..b=3': not of the form key=value; write e.g. trainer.max_steps=3000"),
    ],
)
def test_error_lines(tmp_path: Path, override: str, line: str) -> None:
    assert complaint(tmp_path, MINIMAL, override) == line


def test_same_error_from_a_file(tmp_path: Path) -> None:
    assert complaint(tmp_path, MINIMAL + "trainer: {max_step: 3}\n") == (
        "trainer.max_step: unknown key; did you mean trainer.max_steps?"
    )


def test_missing_value_names_its_key(tmp_path: Path) -> None:
    line = complaint(tmp_path, "dataset: {name: dtu}\nmodel: {name: neus}\n")
    assert line == "dataset.root_dir: has no value; set it in the config or with dataset.root_dir=..."


def test_failing_resolver_names_the_key(tmp_path: Path) -> None:
    line = complaint(tmp_path, MINIMAL, "trainer.lr=${div:1,0}")
    assert line.startswith("trainer.lr: ${div:1,0} cannot be computed (ZeroDivisionError")


def test_malformed_override_value_names_the_key(tmp_path: Path) -> None:
    assert complaint(tmp_path, MINIMAL, "trainer.lr=[1").startswith("trainer.lr: value '[1' is malformed")
    assert complaint(tmp_path, MINIMAL, "trainer.lr=${tag").startswith(
        "trainer.lr: value '${tag' is malformed"
    )


def test_malformed_yaml_names_the_line(tmp_path: Path) -> None:
    assert complaint(tmp_path, "tag: a\nmodel: {name: neus\ntrainer:\n").startswith(
        "x.yaml:3: malformed YAML ("
    )
    assert complaint(tmp_path, "tag: a\ntag: b\n") == (
        "x.yaml:2: malformed YAML (found duplicate key tag); correct that line"
    )
    assert complaint(tmp_path, "tag: ${oh\n").startswith("x.yaml: malformed interpolation in tag (")
    assert complaint(tmp_path, "- a\n- b\n") == "x.yaml: holds a list; write a mapping of keys to values"
    assert complaint(tmp_path, "just words\n").startswith("just words: unknown key; known here: name, ")


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "neus-dtu.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"neus-dut\.yaml: no such file; did you mean \S+/neus-dtu\.yaml\?"):
        load_config(tmp_path / "neus-dut.yaml", [], SECTIONS)
    with pytest.raises(ConfigError, match=r"x\.yaml: no such file; check the path"):
        load_config(tmp_path / "nowhere" / "x.yaml", [], SECTIONS)
    with pytest.raises(ConfigError, match="give a readable YAML file"):
        load_config(tmp_path, [], SECTIONS)
    assert (
        complaint(tmp_path, "base: neus-dtu.yml\n")
        == "neus-dtu.yml: no such file; did you mean neus-dtu.yaml?"
    )


def test_what_a_gpu_and_its_memory_change(tmp_path: Path) -> None:
    """Over the file that says it and its bases, below files based on it and below the command line."""
    (tmp_path / "base.yaml").write_text(
        "trainer: {max_steps: 1}\nseed: 2\ntag: base\n"
        "on_cuda: {trainer: {max_steps: 100}, seed: 5, tag: gpu}\n"
        "on_vram: {4: {trainer: {max_steps: 30}}, 8: {}}\n"
    )
    (tmp_path / "x.yaml").write_text(MINIMAL + "base: base.yaml\nseed: 3\non_cuda: {seed: 6}\ntag: mine\n")

    def steps_and_seed(*overrides: str, **where: Any) -> tuple[int, int]:
        config = load_config(tmp_path / "x.yaml", overrides, SECTIONS, **where)
        assert not {"on_cuda", "on_vram"} & config.tree.keys()
        assert config.tag == "mine"
        return config.trainer.max_steps, config.seed

    assert steps_and_seed() == (1, 3)
    assert steps_and_seed(vram=4) == (1, 3)
    assert steps_and_seed(device="cuda") == (100, 6)
    assert steps_and_seed(device="cuda", vram=4) == (30, 6)
    assert steps_and_seed(device="cuda", vram=8) == (100, 6)
    assert steps_and_seed("trainer.max_steps=7", device="cuda", vram=4) == (7, 6)
    (tmp_path / "y.yaml").write_text(MINIMAL + "on_cuda: {trainer: {max_step: 3}}\n")
    with pytest.raises(ConfigError, match=r"max_step: .*max_steps"):
        load_config(tmp_path / "y.yaml", (), SECTIONS, device="cuda")


def test_bases_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: x.yaml\n")
    line = complaint(tmp_path, "base: a.yaml\n")
    assert line == (
        "x.yaml: base files go in a circle (x.yaml -> a.yaml -> x.yaml); remove one of these base: entries"
    )
    assert complaint(tmp_path, "base: {a: 1}\n").startswith("x.yaml: base: must be a path or a list of paths")
