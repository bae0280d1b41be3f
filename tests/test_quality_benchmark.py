"""Stored results: what they say, what counts as a difference, and (`make nightly`) a repetition."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import COMMANDS, ROOT, TOLERANCE, differences, measure

RESULTS = ROOT / "benchmarks" / "results"


def test_differences_beyond_the_stored_tolerance() -> None:
    stored = {"metrics": {"psnr": 30.0, "chamfer_percent": 0.4}, "tolerance": {**TOLERANCE, "psnr": 0.5}}
    assert differences(stored, {"metrics": {"psnr": 30.4, "chamfer_percent": 0.4}}) == []
    assert differences(stored, {"metrics": {"psnr": 29.4, "chamfer_percent": 0.41}}) == [
        "psnr is 29.4, was 30.0 +- 0.5"
    ]
    # Better than before is a change as well, which somebody has to look at and store.
    assert len(differences(stored, {"metrics": {"psnr": 31.0}})) == 2


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_complete(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert path.stem in COMMANDS
    assert {"command", "seed", "commit", "machine", "wall_minutes", "steps", "metrics"} <= set(stored)
    assert set(COMMANDS[path.stem]) <= set(stored["command"].split())
    assert differences(stored, stored) == []


def test_every_config_has_a_run() -> None:
    measured = {words[words.index("--config") + 1] for words in COMMANDS.values()}
    shipped = {f"confs/{path.name}" for path in (ROOT / "confs").glob("*.yaml")}
    # No capture at hand is forward-facing, or a room from within.
    without = {name for name in shipped if "-llff" in name or name.endswith("colmap-room.yaml")}
    assert shipped - without == measured


@pytest.mark.nightly
def test_the_smallest_config_still_gives_what_is_stored(tmp_path: Path) -> None:
    stored = json.loads((RESULTS / "nightly.json").read_text())
    found = measure("nightly", None, tmp_path, [])
    assert (found["seed"], found["steps"]) == (stored["seed"], stored["steps"])
    assert differences(stored, found) == []
