"""Checkpoints: atomic, readable without pickle's powers, and clear about what is wrong with a bad one."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SECTIONS, raiser, tiny_config, tiny_model, tiny_scene
from torch import nn

from systems import checkpoint
from utils.errors import CheckpointError
from utils.schema import keys_of

FULL_DISK = OSError(28, "No space left on device")


def state_of(value: float) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((64,), value)},
        "fraction": 0.5,
        "random": {"python": (3, (1, 2), None)},
    }


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_without_pickle(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "ckpt", 200, state_of(1.5), keep=2)
    assert path == tmp_path / "ckpt" / "ckpt_000200.pth"
    raw = torch.load(path, weights_only=True)
    state = checkpoint.load(path)
    assert (state["step"], state["fraction"], state["random"]) == (200, 0.5, {"python": (3, (1, 2), None)})
    assert torch.equal(state["model"]["weight"], torch.full((64,), 1.5))
    assert raw["format_version"] == state["format_version"] == checkpoint.FORMAT_VERSION


def test_last_points_at_the_newest_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
        last = checkpoint.load(tmp_path / "last.pth")
        assert last["step"] == step
        assert float(last["model"]["weight"][0]) == step
    assert listing(tmp_path) == ["ckpt_000200.pth", "ckpt_000300.pth", "last.pth"]


def test_last_is_a_copy_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", raiser(OSError(95, "Operation not supported")))
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step), keep=1)
    assert listing(tmp_path) == ["ckpt_000002.pth", "last.pth"]
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 2


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_what_it_writes(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, step, state_of(step), keep=3)
    path = checkpoint.save(tmp_path, 150, state_of(150), keep=2)
    assert path.is_file()
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 150


def test_a_million_steps_and_more(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        path = checkpoint.save(tmp_path, step, state_of(0.0), keep=2)
        assert path.is_file()
    assert listing(tmp_path) == ["ckpt_1000000.pth", "ckpt_999999.pth", "last.pth"]


@pytest.mark.parametrize("where", ["save", "fsync"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    checkpoint.save(tmp_path, 1, state_of(1.0), keep=1)

    def half_a_file(state: object, file: Any) -> None:
        file.write(b"half")
        raise FULL_DISK

    with monkeypatch.context() as patch:
        if where == "save":
            patch.setattr(torch, "save", half_a_file)
        else:
            patch.setattr(os, "fsync", raiser(FULL_DISK))
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=r"ckpt_00000.\.pth: cannot be written .*No space left"):
                checkpoint.save(tmp_path, step, state_of(2.0), keep=1)
    assert listing(tmp_path) == ["ckpt_000001.pth", "last.pth"]
    for name in listing(tmp_path):
        assert float(checkpoint.load(tmp_path / name)["model"]["weight"][0]) == 1.0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "ckpt", 1, state_of(1.0), keep=1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pth: no such checkpoint; give a file such as"):
        checkpoint.load(tmp_path / "no.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    whole = checkpoint.save(tmp_path, 1, state_of(1.0), keep=1).read_bytes()
    broken = tmp_path / "broken.pth"
    for length in (0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        broken.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"broken\.pth: is truncated or not a checkpoint"):
            checkpoint.load(broken)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    generator = random.Random(0)
    for _ in range(400):
        # The first bytes steer the reader into the zip format, into pickles of several protocols, or nowhere.
        start = generator.choice([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"}q", b"(lp0\n"])
        broken.write_bytes(start + generator.randbytes(generator.randrange(1, 200)))
        with pytest.raises(CheckpointError, match=r"broken\.pth: "):
            checkpoint.load(broken)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    for content in ({"weight": torch.zeros(2)}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"other\.pth: is not one of this project's checkpoints"):
            checkpoint.load(path)
    # Whole objects would need pickle's full powers, which could run anything.
    torch.save({"format_version": 1, "model": nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match="is truncated or not a checkpoint"):
        checkpoint.load(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    newer = checkpoint.FORMAT_VERSION + 1
    checkpoint.write_file(tmp_path / "new.pth", {"format_version": newer, "step": 1, **state_of(1.0)})
    with pytest.raises(CheckpointError, match=rf"has format version {newer}, .*; update the code"):
        checkpoint.load(tmp_path / "new.pth")


def test_weights_of_another_model_name_the_difference(tmp_path: Path) -> None:
    config = tiny_config()
    model = tiny_model(config)
    path = checkpoint.save(tmp_path, 5, {"model": model.state_dict(), "fraction": 0.25}, keep=1)
    cases = {
        "model.background.enabled=true": r"the checkpoint has no background\.",
        "model.sdf.hash_grid.log2_table_size=9": r"sdf_field\.grid\.table: \(\d+, 2\) against \(\d+, 2\)",
        "model.radiance.hidden_width=8": r"radiance\.network\.0\.bias: \(16,\) against \(8,\)",
        "model.occupancy.resolution=16": r"occupancy\.\w+: \(24, 24, 24\) against \(16, 16, 16\)",
    }
    for override, message in cases.items():
        changed = tiny_config(override)
        other = tiny_model(changed)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"belongs to another model \({message}.*parsed\.yaml"):
            checkpoint.load_model(path, other, changed.tree)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("method", "trained", "now", "what"),
    [
        ("tiny", "", "model.density=volsdf", "model.density=neus, this config has volsdf"),
        ("tiny", "model.density=volsdf", "", "model.density=volsdf, this config has neus"),
        ("tiny", "", "model.sdf.hash_grid.max_resolution=40", "model.sdf.hash_grid.max_resolution=32, this"),
        ("tiny_nerf", "", "model.activation=relu", "model.activation=softplus, this config has relu"),
        ("tiny_mipnerf360", "", "model.encoding.contracted=true", "model.encoding.contracted=false, this"),
        ("tiny_nerf_proposal", "", "model.contraction=l2", "model.contraction=linf, this"),
        ("tiny_nerf_proposal", "", "model.proposal.max_resolutions=[16,33]", r"=\[16, 32\], this config"),
    ],
)
def test_weights_that_would_mean_something_else(
    tmp_path: Path, method: str, trained: str, now: str, what: str
) -> None:
    config, other = (tiny_config(*filter(None, [key]), method=method) for key in (trained, now))
    model = tiny_model(config)
    state = {"model": model.state_dict(), "fraction": 0.25, "meaning": checkpoint.meaning_of(config.tree)}
    path = checkpoint.save(tmp_path, 5, state, keep=1)
    assert checkpoint.load_model(path, model, config.tree) == (5, 0.25)
    fresh = tiny_model(other)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"was trained with .*{what}.*; set .*parsed\.yaml"):
        checkpoint.load_model(path, fresh, other.tree)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_another_method_is_named(tmp_path: Path) -> None:
    config, other = tiny_config(), tiny_config(method="tiny_ngp")
    state = {"model": tiny_model(config).state_dict(), "meaning": checkpoint.meaning_of(config.tree)}
    path = checkpoint.save(tmp_path, 5, state, keep=1)
    with pytest.raises(CheckpointError, match=r"model\.name=neus, this config has nerf-ngp; set model"):
        checkpoint.load_model(path, tiny_model(other), other.tree)


def test_meaning_is_about_keys_that_exist() -> None:
    assert set(checkpoint._MEANING) <= set(keys_of(SECTIONS))


@pytest.mark.parametrize("mode", ["embedding", "exposure"])
def test_what_is_learned_per_image_stays_with_its_images(tmp_path: Path, mode: str) -> None:
    options = (f"model.appearance.mode={mode}",)
    config, scene = tiny_config(*options), tiny_scene()
    trained = tiny_model(config)
    path = checkpoint.save(tmp_path, 5, {"model": trained.state_dict(), "fraction": 0.25}, keep=1)
    others = {
        "was trained on 8 images, this scene has 7 to train on": tuple(range(7)),
        "was trained on other views of this scene": tuple(range(8)),
    }
    for message, views in others.items():
        other = tiny_model(config, replace(scene, train_indices=views, test_indices=(9,)))
        with pytest.raises(CheckpointError, match=rf"{message} \({mode}\..*dataset\.holdout of that run"):
            checkpoint.load_model(path, other, config.tree)


def test_load_model_gives_step_and_fraction(tmp_path: Path) -> None:
    config = tiny_config()
    trained = tiny_model(config)
    with torch.no_grad():
        trained.sdf_field.grid.table.add_(0.5)
    path = checkpoint.save(tmp_path, 5, {"model": trained.state_dict(), "fraction": 0.25}, keep=1)
    fresh = tiny_model(config)
    assert checkpoint.load_model(path, fresh, config.tree) == (5, 0.25)
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
