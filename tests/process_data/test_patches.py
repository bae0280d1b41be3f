"""Patches at the head of a batch: adjacent pixels of one picture, every place equally likely."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_batches import EVERYTHING, coded_scene, codes, scene_with_priors

from process_data.batches import Priors, RayBatches
from process_data.cameras import rays_from_pixels
from utils.errors import ConfigError
from utils.types import Batch, ImageStack, Scene

SIZE, COUNT = 2, 3
PATCHES = Priors(patches="key.of.size", patch_size=SIZE, num_patches=COUNT)


def corners(batch: Batch) -> list[tuple[int, int, int]]:
    """View, row and column of each patch's first pixel; the other pixels are checked to be its neighbours."""
    side, found = batch.patch_size, []
    code = codes(batch)
    for patch in range(batch.num_patches):
        view, top, left = code[patch * side**2].tolist()
        for row in range(side):
            for column in range(side):
                pixel = code[patch * side**2 + row * side + column].tolist()
                assert pixel == [view, top + row, left + column]
        found.append((view, top, left))
    return found


def larger_scene() -> Scene:
    """Three views of which the second, wider than high, is not trained on."""
    sizes = [(9, 7), (16, 5), (6, 11)]
    scene, images, masks = coded_scene(), [], []
    for view, (width, height) in enumerate(sizes):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full_like(rows, view), rows, columns], axis=-1).astype(np.uint8))
        masks.append(((rows <= 1) & (columns >= width - 1))[..., None].astype(np.uint8) * 255)
    size = torch.tensor(sizes)
    cameras = replace(scene.cameras[:3], size=size)
    return replace(
        scene,
        cameras=cameras,
        images=ImageStack.from_images(images),
        image_names=("a.png", "b.png", "c.png"),
        masks=ImageStack.from_images(masks),
        train_indices=(0, 2),
    )


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6])
def test_patches_are_neighbouring_pixels_with_their_rays(side: int) -> None:
    scene = larger_scene()
    batches = RayBatches(scene, seed=3, priors=replace(PATCHES, patch_size=side, num_patches=5))
    assert batches.num_patch_rays == 5 * side**2
    for _ in range(5):
        batch = batches.draw(5 * side**2 + 7)
        assert (batch.patch_size, batch.num_patches, len(batch.rays)) == (side, 5, 5 * side**2 + 7)
        for view, top, left in corners(batch):
            width, height = scene.images.size[view].tolist()
            assert view in scene.train_indices
            assert 0 <= top <= height - side
            assert 0 <= left <= width - side
        code = codes(batch)
        expected = rays_from_pixels(scene.cameras, code[:, 0], code[:, [2, 1]] + 0.5)
        assert torch.equal(batch.rays.camera_indices, code[:, 0])
        torch.testing.assert_close(batch.rays.directions, expected.directions)
        torch.testing.assert_close(batch.rays.origins, expected.origins)
        pictures = batch.patches(batch.rgb)
        for patch, (view, top, left) in enumerate(corners(batch)):
            cut = scene.images.image(view)[top : top + side, left : left + side].float() / 255
            assert torch.equal(pictures[patch], cut)


def test_every_place_is_equally_likely() -> None:
    side, draws = 3, 6000
    batches = RayBatches(larger_scene(), seed=0, priors=replace(PATCHES, patch_size=side, num_patches=4))
    found = Counter(corner for _ in range(draws) for corner in corners(batches.draw(36)))
    places = {(0, top, left) for top in range(5) for left in range(7)}
    places |= {(2, top, left) for top in range(9) for left in range(4)}
    assert set(found) == places
    mean = 4 * draws / len(places)
    assert max(abs(count - mean) for count in found.values()) < 5 * mean**0.5, "five standard deviations"


def test_the_rest_is_drawn_one_by_one() -> None:
    draws = 20_000
    batch = RayBatches(coded_scene(), seed=0, priors=PATCHES).draw(COUNT * SIZE**2 + draws)
    keys, counts = torch.unique(codes(batch)[COUNT * SIZE**2 :], dim=0, return_counts=True)
    assert len(keys) == 15 + 14 + 12
    mean = draws / 41
    assert (counts - mean).abs().max() < 5 * mean**0.5


@pytest.mark.parametrize(("side", "margin"), [(3, 0), (4, 0), (3, 1)])
def test_patches_around_the_foreground_stay_in_the_picture(side: int, margin: int) -> None:
    """Masks are two pixels in the top right corner, so that no patch has room around them."""
    batches = RayBatches(
        larger_scene(),
        foreground_fraction=1.0,
        foreground_margin=margin,
        priors=replace(PATCHES, patch_size=side, num_patches=50),
    )
    batch = batches.draw(50 * side**2)
    for view, top, left in corners(batch):
        width = {0: 9, 2: 6}[view]
        assert top in range(max(margin + 1 - side // 2, 0) + 1)
        assert left in range(width - side - margin, width - side + 1)
    assert batch.mask is not None
    assert (batch.mask.view(50, -1).sum(dim=1) > 0).all() or margin > 0


def test_a_share_of_the_patches_is_around_the_foreground() -> None:
    batches = RayBatches(
        larger_scene(), foreground_fraction=0.25, foreground_margin=0, priors=replace(PATCHES, num_patches=4)
    )
    # Of 40 places in view 0 and 50 in view 2, one each is next to the mask's corner: top 0 or 1, last column.
    near = [
        top == 0 and left == {0: 7, 2: 4}[view]
        for _ in range(1000)
        for view, top, left in corners(batches.draw(16))
    ]
    assert np.mean(near) == pytest.approx(0.25 + 0.75 * 2 / (8 * 6 + 5 * 10), abs=0.03)


def test_priors_belong_to_the_patches_rays() -> None:
    scene = scene_with_priors()
    asked = replace(EVERYTHING, patches="key.of.size", patch_size=SIZE, num_patches=COUNT)
    batch = RayBatches(scene, seed=3, priors=asked).draw(40)
    assert scene.depths is not None
    assert batch.depth is not None
    for ray, (view, row, column) in enumerate(codes(batch).tolist()):
        assert float(batch.depth[ray]) == float(scene.depths.image(view)[row, column]) / 4.0


def test_resume_goes_on_with_the_same_patches() -> None:
    first, second = (
        RayBatches(coded_scene(), seed=seed, foreground_fraction=0.5, priors=PATCHES) for seed in (1, 9)
    )
    first.draw(20)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for _ in range(3):
        assert torch.equal(codes(first.draw(20)), codes(second.draw(20)))


def test_without_patches_a_batch_has_none() -> None:
    batches = RayBatches(coded_scene(), seed=3, priors=replace(PATCHES, patches=None))
    batch = batches.draw(9)
    assert (batches.num_patch_rays, batch.patch_size, batch.num_patches) == (0, 0, 0)
    assert torch.equal(codes(batch), codes(RayBatches(coded_scene(), seed=3).draw(9)))


def test_pictures_smaller_than_a_patch_are_named() -> None:
    # Of the training views 2 x 7 pixels are the narrowest and 6 x 2 the lowest.
    line = r"key\.of\.size: picture c has 2 x 7 pixels, less than a patch of 3; set it to at most 2"
    with pytest.raises(ConfigError, match=line):
        RayBatches(coded_scene(), priors=replace(PATCHES, patch_size=3))
    with pytest.raises(ConfigError, match="picture d has 6 x 2 pixels"):
        RayBatches(coded_scene(), indices=[0, 1, 3], priors=replace(PATCHES, patch_size=3))
    RayBatches(coded_scene(), indices=[0, 1], priors=replace(PATCHES, patch_size=3))


def test_fewer_rays_than_the_patches_have() -> None:
    batches = RayBatches(coded_scene(), priors=PATCHES)
    with pytest.raises(ValueError, match="num_rays must be at least 12 for the patches, got 11"):
        batches.draw(11)
    assert len(batches.draw(12).rays) == 12


def test_a_patch_counts_when_all_its_rays_are_served() -> None:
    batch = RayBatches(coded_scene(), priors=PATCHES).draw(15)
    for served in range(16):
        is_served = torch.arange(15) < served
        assert batch.whole_patches(is_served).tolist() == [served >= end for end in (4, 8, 12)]
