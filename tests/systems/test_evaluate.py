"""Looking at a model: whole views in chunks, held-out metrics, pictures, video and mesh."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny import SECTIONS, WITHOUT_MASKS, new_run, new_trainer, tiny_config, tiny_model, tiny_scene
from torch import Tensor

from systems import evaluate
from systems.evaluate import measure_views, render_view, save_validation_picture, view_panel
from systems.neus import NeuSSystem
from utils.config import Config
from utils.errors import ExportError
from utils.memory import Chunks
from utils.mesh import read_mesh
from utils.types import ImageStack, Progress, Rays, RenderOutput, Scene


def final(config: Config) -> Progress:
    return NeuSSystem(config.system, 4, has_masks=True).progress_at(1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model after a few steps; the tests only look at it."""
    training = new_trainer(tmp_path_factory.mktemp("trained"), "trainer.max_steps=30")
    training.train()
    return training.model


def rays_at_once(size: int) -> Chunks:
    return Chunks("rays", size, "test.rays_per_chunk")


class Limited:
    """A model on a device on which more than ``limit`` rays do not fit."""

    def __init__(self, model: Any, limit: int) -> None:
        self.model, self.limit, self.device = model, limit, model.device
        self.chunks: list[int] = []

    def render(self, rays: Rays, progress: Progress, background: Tensor) -> RenderOutput:
        if len(rays) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.chunks.append(len(rays))
        return self.model.render(rays, progress, background)


def squared_error(view: Tensor, scene: Scene, index: int) -> np.ndarray:
    """Per pixel, with the photograph over white outside the mask; by plain NumPy."""
    target = scene.images.image(index).numpy() / 255.0
    if scene.masks is not None:
        mask = scene.masks.image(index).numpy() / 255.0
        target = mask * target + (1 - mask)
    return ((view.numpy() - target) ** 2).mean(axis=2)


def decibels(error: np.ndarray) -> float:
    return float(-10 * np.log10(error.mean()))


def test_render_view_shapes_and_ranges(trained: Any) -> None:
    scene, progress = tiny_scene(), final(tiny_config())
    for scale, side in ((1.0, 32), (0.5, 16), (2.0, 64)):
        view = render_view(trained, scene.cameras, 0, progress, scale=scale)
        assert view.rgb.shape == view.normal.shape == (side, side, 3)
        assert view.opacity.shape == view.depth.shape == (side, side)
        assert not view.rgb.requires_grad
        for values in (view.rgb, view.opacity):
            assert -1e-5 <= float(values.min()) <= float(values.max()) <= 1 + 1e-5
    # The sphere fills the middle, at its distance of 2.85 - 0.5; the corners are white.
    assert float(view.opacity[32, 32]) > 0.95
    assert float(view.depth[32, 32] / view.opacity[32, 32]) == pytest.approx(2.35, abs=0.15)
    assert view.rgb[0, 0].tolist() == [1.0, 1.0, 1.0]
    assert float(view.opacity[0, 0]) == 0.0


def test_the_plain_colour_shows_where_the_surface_does_not(trained: Any) -> None:
    scene, progress = tiny_scene(), final(tiny_config())
    white, red = (
        render_view(trained, scene.cameras, 0, progress, background_color=color)
        for color in ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0))
    )
    assert red.rgb[0, 0].tolist() == [1.0, 0.0, 0.0]
    difference = (1.0 - white.opacity)[..., None] * torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(white.rgb - red.rgb, difference, atol=1e-6, rtol=0)


def test_chunks_do_not_show(trained: Any) -> None:
    scene, progress = tiny_scene(), final(tiny_config())
    whole = render_view(trained, scene.cameras, 3, progress)
    parts = render_view(trained, scene.cameras, 3, progress, rays_at_once(100))
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-5)


def test_chunks_shrink_when_memory_runs_out(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    scene, progress = tiny_scene(), final(tiny_config())
    whole = render_view(trained, scene.cameras, 3, progress)
    limited, chunks = Limited(trained, 300), rays_at_once(1024)
    with caplog.at_level(logging.WARNING):
        view = render_view(limited, scene.cameras, 3, progress, chunks)
        render_view(limited, scene.cameras, 4, progress, chunks)
    assert limited.chunks == [256] * 8
    messages = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert messages == [f"out of memory: rays in chunks of {size} from now on" for size in (512, 256)]
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(getattr(view, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_a_test_finds_out_once_how_many_rays_fit(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, scene = tiny_config("test.rays_per_chunk=600"), tiny_scene()
    limited = Limited(copy.copy(trained), 300)
    monkeypatch.setattr(trained, "render", limited.render)
    with caplog.at_level(logging.WARNING):
        evaluate.test(config, scene, trained, final(config), new_run(config, tmp_path), step=30)
    assert "out of memory: rays in chunks of 300 from now on" in caplog.text
    assert caplog.text.count("out of memory") == 1


def test_memory_for_not_even_one_ray(trained: Any) -> None:
    with pytest.raises(ExportError, match=r"^test\.rays_per_chunk: the device's memory does not hold one of"):
        render_view(Limited(trained, 0), tiny_scene().cameras, 3, final(tiny_config()))


def test_measures_of_held_out_views(trained: Any, tmp_path: Path) -> None:
    config, scene = tiny_config(), tiny_scene()
    run = new_run(config, tmp_path)
    measured = measure_views(scene, trained, final(config), run, rays_at_once(4096))
    assert scene.test_indices == (0, 5)
    assert [row["view"] for row in measured] == ["000000.png", "000005.png"]
    for row, index in zip(measured, scene.test_indices, strict=True):
        view = render_view(trained, scene.cameras, index, final(config))
        error = squared_error(view.rgb, scene, index)
        assert scene.masks is not None
        inside = scene.masks.image(index).numpy()[..., 0] > 127
        assert row["psnr"] == pytest.approx(decibels(error), abs=1e-3)
        assert row["psnr_masked"] == pytest.approx(decibels(error[inside]), abs=1e-3)
        assert row["psnr_masked"] < row["psnr"]
        assert 0.3 < row["ssim"] <= 1.0
        picture = iio.imread(row["picture"])
        # Colour, photograph, normal, depth and opacity, with gaps of 4 pixels.
        assert picture.shape == (32, 5 * 32 + 4 * 4, 3)
        shown = picture[:, :32] / 255.0
        np.testing.assert_allclose(shown, view.rgb.clamp(0, 1).numpy(), atol=0.6 / 255)
    assert sorted(path.name for path in (run.save / "test").iterdir()) == ["000000.png", "000005.png"]


def test_without_masks_the_masked_measure_is_absent(tmp_path: Path) -> None:
    config, scene = tiny_config(*WITHOUT_MASKS), tiny_scene(*WITHOUT_MASKS)
    model = tiny_model(config, scene)
    rows = measure_views(scene, model, final(config), new_run(config, tmp_path), rays_at_once(4096))
    view = render_view(model, scene.cameras, 0, final(config))
    assert [row["psnr_masked"] for row in rows] == [None, None]
    assert rows[0]["psnr"] == pytest.approx(decibels(squared_error(view.rgb, scene, 0)), abs=1e-3)


def test_everything_that_test_writes(trained: Any, tmp_path: Path) -> None:
    config, scene = tiny_config(), tiny_scene()
    run = new_run(config, tmp_path)
    returned = evaluate.test(config, scene, trained, final(config), run, step=30)
    written = json.loads((run.save / "metrics.json").read_text())
    assert (written["step"], written["split"]) == (30, "held-out")
    assert [row["view"] for row in written["views"]] == ["000000.png", "000005.png"]
    for name in ("psnr", "psnr_masked", "ssim"):
        by_hand = np.mean([row[name] for row in written["views"]])
        assert written["mean"][name] == pytest.approx(by_hand)
        assert written["mean"][name] == returned["mean"][name]
    assert (written["mean"]["lpips"] is None) == bool(written["lpips_note"])

    video = iio.imread(run.save / "tiny.mp4")
    assert video.shape == (3, 32, 2 * 32 + 4, 3)

    # The mesh is in world coordinates: 2.5 times as large and moved.
    mesh = read_mesh(run.save / "mesh.ply")
    centre = scene.world_from_scene[:3, 3].numpy()
    radii = np.linalg.norm(mesh.vertices - centre, axis=1) / 2.5
    assert 0.35 < radii.mean() < 0.6
    assert written["geometry"]["chamfer"] < 0.2 * 2.5
    assert written["mesh"]["faces"] == len(mesh.faces)

    head, line = (tmp_path / "runs.csv").read_text().splitlines()
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert float(row["psnr"]) == written["mean"]["psnr"]
    assert float(row["psnr_masked"]) == written["mean"]["psnr_masked"]
    assert float(row["chamfer"]) == written["geometry"]["chamfer"]


def test_without_held_out_views_there_are_no_metrics(trained: Any, tmp_path: Path) -> None:
    config = tiny_config("dataset.holdout=0", "test.video=false")
    scene = replace(tiny_scene("dataset.holdout=0"), reference_mesh=None)
    run = new_run(config, tmp_path)
    evaluate.test(config, scene, trained, final(config), run, step=30)
    written = json.loads((run.save / "metrics.json").read_text())
    assert written["split"].startswith("none")
    assert "dataset.holdout" in written["split"]
    assert written["views"] == []
    assert set(written["mean"].values()) == {None}
    assert not (run.save / "test").exists()
    assert not list(run.save.glob("*.mp4"))
    assert "no held-out views" in (run.folder / "log.txt").read_text()


def test_without_a_mesh_nothing_else_is_lost(trained: Any, tmp_path: Path) -> None:
    config = tiny_config("test.video=false", "export.min_faces=1000000")
    run = new_run(config, tmp_path)
    with pytest.raises(ExportError, match=r"export\.min_faces"):
        evaluate.test(config, tiny_scene(), trained, final(config), run, step=30)
    written = json.loads((run.save / "metrics.json").read_text())
    assert written["mesh"] is None
    assert written["mean"]["psnr"] > 5.0
    assert len(list((run.save / "test").glob("*.png"))) == len(written["views"]) > 0


def test_a_view_on_which_nothing_is_to_be_seen(tmp_path: Path) -> None:
    """White on white is infinitely good, which JSON cannot say and a mean must not take in."""
    config = tiny_config("test.video=false")
    scene = replace(tiny_scene(), reference_mesh=None)
    assert scene.masks is not None
    black = ImageStack(torch.zeros_like(scene.masks.pixels), scene.masks.size, scene.masks.offsets)
    model = tiny_model(config, scene)
    model.occupancy.occupied.zero_()
    run = new_run(config, tmp_path)
    evaluate.test(config, replace(scene, masks=black), model, final(config), run, step=0)
    written = json.loads((run.save / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert [row["psnr"] for row in written["views"]] == [None, None]
    assert [row["psnr_masked"] for row in written["views"]] == [None, None]
    assert written["mean"]["psnr"] is None


def test_validation_takes_held_out_views_in_turn(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, scene = tiny_config(), tiny_scene()
    run = new_run(config, tmp_path)
    with caplog.at_level(logging.INFO):
        for turn, step in enumerate((1000, 2000), start=1):
            save_validation_picture(scene, trained, final(config), run, step, turn)
    names = sorted(path.name for path in (run.save / "val").iterdir())
    assert names == ["001000_000005.png", "002000_000000.png"]
    assert "held-out view 000005.png, PSNR " in caplog.text
    training_only = replace(scene, train_indices=tuple(range(10)), test_indices=())
    save_validation_picture(training_only, trained, final(config), run, 3000, 3)
    assert "training view 000003.png, PSNR " in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize("mode", ["embedding", "exposure"])
def test_only_validation_shows_a_training_view_in_its_own_light(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config, scene = tiny_config(f"model.appearance.mode={mode}"), tiny_scene()
    model = tiny_model(config)
    with torch.no_grad():
        (model.embedding or model.exposure).per_image[2] += 2.0
    progress = final(config)

    def shown(**options: Any) -> Tensor:
        return render_view(model, scene.cameras, 3, progress, **options).rgb

    own, plain = shown(as_photographed=True), shown()
    assert float((own - plain).abs().max()) > 0.02
    with torch.no_grad():
        (model.embedding or model.exposure).per_image[:] = 0.0
    if mode == "exposure":
        assert torch.equal(plain, shown(as_photographed=True))
    # Validation of view 3, as all that is shown of a capture without held-out views are training views.
    asked: list[Any] = []
    monkeypatch.setattr(evaluate, "render_view", lambda *a, **k: asked.append(k) or render_view(*a, **k))
    run = new_run(config, tmp_path)
    save_validation_picture(replace(scene, test_indices=()), model, progress, run, 1, 2)
    measure_views(scene, model, progress, run, rays_at_once(1024))
    assert [bool(options.get("as_photographed")) for options in asked] == [True, False, False]


def test_panel_of_a_view(trained: Any) -> None:
    scene = tiny_scene()
    view = render_view(trained, scene.cameras, 2, final(tiny_config()))
    picture = view_panel(view, torch.full((32, 32, 3), 0.2), scene.cameras.c2w[2])
    assert picture.shape == (32, 176, 3)
    assert (picture[:, 36:68] == 51).all()
    np.testing.assert_allclose(picture[:, 144:, 0] / 255.0, view.opacity.numpy(), atol=0.6 / 255)


def test_test_section_has_a_config() -> None:
    assert tiny_config("test.fps=12").test.fps == 12.0
    assert SECTIONS["test"] is evaluate.TestConfig
