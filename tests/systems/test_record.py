"""What a run leaves behind: its folder, the config, the sources, the history, and one line in the table."""

import csv
import datetime
import json
import logging
import re
from pathlib import Path

import pytest
from tiny import SECTIONS, history, new_run, tiny_config, tiny_scene

from systems.record import Run
from utils.config import load_config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def table(outputs: Path) -> list[dict[str, str]]:
    with (outputs / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_folder_of_a_new_run(tmp_path: Path) -> None:
    run = new_run(tiny_config("tag=first"), tmp_path)
    assert run.folder.parent == tmp_path / "tiny"
    assert re.fullmatch(r"first@\d{8}-\d{6}", run.folder.name)
    assert (run.name, run.trial) == ("tiny", run.folder.name)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("ckpt", "code", "command.txt", "config", "log.txt", "save")
    ]
    assert run.save == run.folder / "save"
    assert run.checkpoints == run.folder / "ckpt"
    assert run.tensorboard_dir == tmp_path / "tf-logs" / "tiny" / run.trial


def test_config_comes_back_equal(tmp_path: Path) -> None:
    config = tiny_config("trainer.max_steps=77", "system.loss.eikonal=[[0,0.0],[0.5,0.2]]", "tag=a b")
    run = new_run(config, tmp_path)
    assert load_config(run.folder / "config" / "parsed.yaml", [], SECTIONS) == config


def test_command_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    command = ["--config", "my files/a.yaml", "--train", "tag=it's"]
    run = Run.start(tiny_config(), tmp_path, tmp_path / "logs", command)
    written = (run.folder / "command.txt").read_text()
    assert written.count("\n") == 1
    assert "'my files/a.yaml' --train" in written
    assert """'tag=it'"'"'s'""" in written


def test_code_is_a_copy_of_the_sources(tmp_path: Path) -> None:
    code = new_run(tiny_config(), tmp_path).folder / "code"
    for name in ("run.py", "systems/record.py", "models/neus.py", "confs/neus-dtu.yaml", "utils/types.py"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert not [path for path in code.rglob("*") if path.suffix in (".pyc", ".nbi", ".nbc")]
    assert not list(code.rglob("__pycache__"))


def test_two_runs_in_the_same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return cls(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(datetime, "datetime", Clock)
    trials = [new_run(tiny_config(), tmp_path).trial for _ in range(3)]
    assert trials == ["run@20240506-070809", "run@20240506-070809-2", "run@20240506-070809-3"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_outputs_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: cannot be written \(.*\); choose another --outputs_dir"):
        new_run(tiny_config(), tmp_path / "file" / below)


def test_the_run_says_where_everything_goes(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path / "my outputs")
    logging.getLogger("systems.anything").info("a line of the log")
    text = (run.folder / "log.txt").read_text()
    assert str(run.folder) in text
    assert str(run.folder / "log.txt") in text
    assert f"tensorboard --logdir '{run.tensorboard_dir}'" in text
    assert "a line of the log" in text


def test_the_next_run_has_a_log_of_its_own(tmp_path: Path) -> None:
    first = new_run(tiny_config("tag=a"), tmp_path)
    second = new_run(tiny_config("tag=b"), tmp_path)
    logging.getLogger("systems.anything").info("said later")
    assert "said later" not in (first.folder / "log.txt").read_text()
    assert (second.folder / "log.txt").read_text().count("said later") == 1


def test_history_has_the_columns_of_its_first_row_and_every_digit(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    run.scalars(1, {"loss": 0.1 + 0.2, "rays": 48})
    run.scalars(2, {"rays": 50, "loss": 1e-9, "surprise": 3.0})
    run.scalars(3, {"loss": float("nan")})
    run.close()
    assert (run.folder / "history.csv").read_text().splitlines() == [
        *("step,loss,rays", "1,0.30000000000000004,48", "2,1e-09,50", "3,nan,")
    ]
    assert list(run.tensorboard_dir.glob("events.out.tfevents*"))


def test_a_reopened_run_goes_on_where_it_was(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    for step in (10, 20, 30):
        run.scalars(step, {"loss": float(step)})
    run.close()
    before = sorted(path.name for path in run.folder.rglob("*"))
    again = Run.reopen(run.folder, tmp_path / "tf-logs")
    again.forget_after(20)
    again.scalars(25, {"loss": 2.5})
    again.close()
    assert history(again) == {"step": ["10", "20", "25"], "loss": ["10.0", "20.0", "2.5"]}
    assert (again.folder, again.tensorboard_dir) == (run.folder, run.tensorboard_dir)
    assert again.outputs_dir == tmp_path
    assert sorted(path.name for path in run.folder.rglob("*")) == before
    assert (run.folder / "log.txt").read_text().count("run folder") == 2


def test_the_split_names_the_views_of_both_kinds(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    run.write_split(tiny_scene())
    names = [f"{view:06d}.png" for view in range(10)]
    held_out = ["000000.png", "000005.png"]
    assert json.loads((run.save / "split.json").read_text()) == {
        "train": [name for name in names if name not in held_out],
        "held-out": held_out,
    }


def test_forgetting_without_a_history(tmp_path: Path) -> None:
    run = new_run(tiny_config(), tmp_path)
    run.forget_after(5)
    assert not (run.folder / "history.csv").exists()


def test_one_line_per_run_in_the_table(tmp_path: Path) -> None:
    first, second = (new_run(tiny_config(f"tag={tag}"), tmp_path) for tag in "ab")
    first.list_in_table({"dataset": "synthetic", "steps": 100, "psnr": None, "unknown": 1})
    second.list_in_table({"steps": 5, "losses": "rgb_l1:on, mask:off"})
    first.list_in_table({"psnr": 31.25, "steps": 200})
    rows = table(tmp_path)
    assert [row["trial"] for row in rows] == [first.trial, second.trial]
    assert rows[0]["name"] == "tiny"
    assert rows[0]["folder"] == str(first.folder)
    assert [rows[0][key] for key in ("dataset", "steps", "psnr", "ssim")] == ["synthetic", "200", "31.25", ""]
    assert rows[1]["losses"] == "rgb_l1:on, mask:off"
    assert "unknown" not in rows[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.csv", "tf-logs", "tiny"]
