import numpy as np
import pytest
import torch

from process_data.batches import RayBatches, full_image
from process_data.cameras import rays_from_pixels
from utils.errors import ConfigError
from utils.types import Batch, Cameras, ImageStack, Scene

SIZES = [(5, 3), (4, 4), (2, 7), (6, 2)]  # width, height


def coded_scene(with_masks: bool = True) -> Scene:
    """Four small images of different sizes in which the colour of each pixel is (view, row, column)."""
    images, masks = [], []
    for view, (width, height) in enumerate(SIZES):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full_like(rows, view), rows, columns], axis=-1).astype(np.uint8))
        masks.append(((rows == 1) & (columns == 1))[..., None].astype(np.uint8) * 255)
    c2w = torch.eye(4)[None, :3].repeat(4, 1, 1)
    c2w[:, 2, 3] = -torch.arange(2.0, 6.0)
    intrinsics = torch.tensor([[[7.0, 0, 2], [0, 7, 2], [0, 0, 1]]]).repeat(4, 1, 1)
    size = torch.tensor(SIZES)
    return Scene(
        name="coded",
        cameras=Cameras(c2w, intrinsics, size),
        images=ImageStack.from_images(images),
        image_names=("a", "b", "c", "d"),
        train_indices=(0, 2, 3),
        test_indices=(1,),
        world_from_scene=torch.eye(4, dtype=torch.float64),
        masks=ImageStack.from_images(masks) if with_masks else None,
    )


def codes(batch: Batch) -> torch.Tensor:
    return (batch.rgb * 255).round().long()


def test_rays_and_colours_belong_together() -> None:
    scene = coded_scene()
    batch = RayBatches(scene, seed=3).draw(400)
    code = codes(batch)
    assert torch.equal(code[:, 0], batch.rays.camera_indices)
    expected = rays_from_pixels(scene.cameras, code[:, 0], code[:, [2, 1]] + 0.5)
    torch.testing.assert_close(batch.rays.directions, expected.directions)
    torch.testing.assert_close(batch.rays.origins, expected.origins)
    assert batch.mask is not None
    assert torch.equal(batch.mask, ((code[:, 1] == 1) & (code[:, 2] == 1)).float())


def test_every_training_pixel_is_equally_likely_and_no_other_is_drawn() -> None:
    draws = 41_000
    code = codes(RayBatches(coded_scene(), seed=0).draw(draws))
    keys, counts = torch.unique(code, dim=0, return_counts=True)
    assert len(keys) == 15 + 14 + 12, "all pixels of views 0, 2 and 3"
    assert set(keys[:, 0].tolist()) == {0, 2, 3}
    mean = draws / 41
    assert (counts - mean).abs().max() < 5 * mean**0.5, "five standard deviations"


def test_chosen_views_only() -> None:
    batches = RayBatches(coded_scene(), indices=[1], seed=0)
    assert batches.num_pixels == 16
    assert set(batches.draw(100).rays.camera_indices.tolist()) == {1}


def test_resume_goes_on_with_the_same_draws() -> None:
    first = RayBatches(coded_scene(), seed=1, foreground_fraction=0.5)
    first.draw(10)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    ahead = [first.draw(n) for n in (7, 12)]
    second = RayBatches(coded_scene(), seed=99, foreground_fraction=0.5)
    second.load_state_dict(state)
    for expected in ahead:
        found = second.draw(len(expected.rays))
        assert torch.equal(found.rgb, expected.rgb)
        assert torch.equal(found.rays.directions, expected.rays.directions)


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draws = [codes(RayBatches(coded_scene(), seed=seed).draw(50)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("margin", "rows"), [(0, {1}), (1, {0, 1, 2})])
def test_foreground_rays_come_from_the_widened_masks(margin: int, rows: set[int]) -> None:
    batches = RayBatches(coded_scene(), foreground_fraction=1.0, foreground_margin=margin)
    code = codes(batches.draw(300))
    assert set(code[:, 1].tolist()) == rows
    distance = (code[:, 1] - 1).abs() + (code[:, 2] - 1).abs()
    assert distance.max() == margin, "an ellipse of radius 1 is a cross"
    assert set(code[:, 0].tolist()) == {0, 2, 3}


def test_foreground_share() -> None:
    batch = RayBatches(coded_scene(), foreground_fraction=0.25, foreground_margin=0).draw(1000)
    assert batch.mask is not None
    assert (batch.mask[:250] == 1).all()
    assert batch.mask[250:].mean() < 0.15, "3 of 41 pixels"


def test_scene_without_masks() -> None:
    scene = coded_scene(with_masks=False)
    assert RayBatches(scene).draw(5).mask is None
    assert full_image(scene, 0).mask is None
    with pytest.raises(ConfigError, match="no masks"):
        RayBatches(scene, foreground_fraction=0.1)
    with pytest.raises(ConfigError, match=r"not in 0\.\.1"):
        RayBatches(scene, foreground_fraction=1.5)


@pytest.mark.parametrize("indices", [[], [4], [-1]])
def test_views_that_do_not_exist(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="indices"):
        RayBatches(coded_scene(), indices=indices)


def test_full_image_is_row_by_row() -> None:
    scene = coded_scene()
    batch = full_image(scene, 2)
    width, height = SIZES[2]
    code = codes(batch).view(height, width, 3)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    assert torch.equal(code[..., 1], rows)
    assert torch.equal(code[..., 2], columns)
    expected = rays_from_pixels(
        scene.cameras, torch.full((14,), 2), torch.stack([columns, rows], dim=-1).reshape(-1, 2) + 0.5
    )
    torch.testing.assert_close(batch.rays.directions, expected.directions)
    assert batch.mask is not None
    assert batch.mask.sum() == 1
