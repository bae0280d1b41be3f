"""Commands about captures, as a user runs them: inspect, convert, train on what was converted, doctor."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "systems" / "tiny.yaml"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_doctor_lists_what_there_is() -> None:
    done = command("--doctor")
    assert done.returncode == 0, done.stderr
    for name in ("Python", "PyTorch", "pycolmap", "ffmpeg", "rembg"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("neus", "neus-dtu-wmask"),
        ("colmap", "neus-colmap-wmask"),
        ("transforms", "neus-transforms"),
        ("blender", "neus-blender"),
    ],
)
def test_convert_then_inspect_and_train(tmp_path: Path, kind: str, config: str) -> None:
    capture = tmp_path / "a folder of Zoë"
    done = command("--config", TINY, "--convert", kind, "--out", capture)
    assert done.returncode == 0, done.stderr
    use = ["--config", ROOT / "confs" / f"{config}.yaml", f"dataset.root_dir={capture}"]
    if kind == "colmap":
        done = command(*use, "--inspect", "--out", tmp_path / "look")
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "look" / "inspect.png") as picture:
            assert picture.width >= 1200
        page = (tmp_path / "look" / "inspect.html").read_text(encoding="utf-8")
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert "https://" not in page
        return
    short = ["--train", "trainer.max_steps=3", "--device", "cpu", "--outputs_dir", tmp_path / "out"]
    done = command(*use, *short)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*/*/ckpt/last.pth"))


def test_one_line_for_a_capture_that_is_not_there(tmp_path: Path) -> None:
    for what in (["--inspect"], ["--convert", "neus", "--out", tmp_path / "x"]):
        done = command("--config", ROOT / "confs/neus-colmap.yaml", *what, "dataset.root_dir=/no/such/folder")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "/no/such/folder: no such folder; check dataset.root_dir" in done.stderr
    done = command("--prepare", tmp_path / "nothing", "--out", tmp_path / "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
