from dataclasses import replace

import numpy as np
import pytest
import torch

from process_data.batches import Priors, RayBatches, full_image
from process_data.cameras import rays_from_pixels
from utils.errors import ConfigError
from utils.ndc import NDC
from utils.types import Batch, Cameras, ImageStack, Scene, SparsePoints

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
    # Of every four rays in a row one is from the foreground; the others are where they like (3 of 41 pixels).
    assert (batch.mask.view(-1, 4)[:, 3] == 1).all()
    assert batch.mask.view(-1, 4)[:, :3].mean() < 0.15


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


# Priors

EVERYTHING = Priors("key.of.depth", "key.of.normal", "key.of.points", points_per_batch=200, max_error=1.5)
TURN = torch.linalg.qr(torch.tensor([[2.0, 1.0, 0.5], [-1.0, 3.0, 0.2], [0.3, -0.4, 1.0]]))[0]


def scene_with_priors() -> Scene:
    """The coded scene, four times as large in the world; depths, normals and points tell where from."""
    scene = coded_scene()
    counts = scene.images.size.prod(dim=1).tolist()
    total = sum(counts)
    depth = torch.arange(total, dtype=torch.float16)[:, None]
    normal = torch.nn.functional.normalize(torch.arange(3 * total).view(total, 3) % 7 - 3.0, dim=1)
    normal[0] = 0.0
    positions = np.array([[0.1 * k, 0.0, 0.0] for k in range(8)] + [[1.1, 0.0, 0.0]])
    errors = np.array([0.5, 1.5, 1.6, np.nan, 0.1, 0.1, 0.1, 0.1, 0.1])
    # Point 4 is seen by the held-out view alone, point 5 by nobody.
    observations = np.array([[0, 0], [1, 1], [1, 3], [2, 0], [3, 2], [4, 1], [6, 0], [7, 3], [8, 0]])
    world_from_scene = torch.eye(4, dtype=torch.float64)
    world_from_scene[:3, :3] = 4.0 * torch.eye(3, dtype=torch.float64)
    c2w = scene.cameras.c2w.clone()
    c2w[:, :, :3] = TURN * torch.linalg.det(TURN)
    return replace(
        scene,
        cameras=replace(scene.cameras, c2w=c2w),
        world_from_scene=world_from_scene,
        depths=ImageStack(depth, scene.images.size, scene.images.offsets),
        normals=ImageStack(normal.half(), scene.images.size, scene.images.offsets),
        points=SparsePoints(positions, np.zeros((9, 3), np.uint8), errors, observations),
    )


def test_depths_and_normals_belong_to_their_rays() -> None:
    scene = scene_with_priors()
    batch = RayBatches(scene, seed=3, priors=EVERYTHING).draw(300)
    assert scene.depths is not None
    assert scene.normals is not None
    assert batch.depth is not None
    assert batch.axis_cosine is not None
    assert batch.normal is not None
    rotation = scene.cameras.c2w[0, :, :3].double()
    has_no_normal = 0
    for ray, (view, row, column) in enumerate(codes(batch).tolist()):
        assert float(batch.depth[ray]) == float(scene.depths.image(view)[row, column]) / 4.0
        local = scene.normals.image(view)[row, column].double()
        expected = rotation @ (local / local.norm().clamp(min=1e-6))
        torch.testing.assert_close(batch.normal[ray].double(), expected, atol=1e-6, rtol=0)
        has_no_normal += int(not local.any())
        # (u, v, 1) has depth 1 at a distance of its length.
        lens = torch.linalg.inv(scene.cameras.intrinsics[view].double())
        towards = lens @ torch.tensor([column + 0.5, row + 0.5, 1.0], dtype=torch.float64)
        assert float(batch.axis_cosine[ray]) == pytest.approx(1.0 / float(towards.norm()), abs=1e-6)
    assert has_no_normal > 0


def test_points_are_good_inside_and_seen_by_training_views() -> None:
    batch = RayBatches(scene_with_priors(), seed=3, priors=EVERYTHING).draw(1)
    assert batch.points is not None
    assert batch.points.shape == (200, 3)
    # 2 is wrong by too many pixels, 4 and 5 are not seen in training, 8 is outside.
    assert sorted({round(10 * x) for x in batch.points[:, 0].tolist()}) == [0, 1, 3, 6, 7]


def test_points_of_a_capture_that_does_not_tell_who_saw_them() -> None:
    scene = scene_with_priors()
    assert scene.points is not None
    scene = replace(scene, points=replace(scene.points, observations=np.zeros((0, 2), np.int64)))
    batch = RayBatches(scene, seed=3, priors=replace(EVERYTHING, max_error=9.0)).draw(1)
    assert batch.points is not None
    assert sorted({round(10 * x) for x in batch.points[:, 0].tolist()}) == list(range(8))


def test_without_priors_the_draws_are_what_they_were() -> None:
    scene = scene_with_priors()
    plain, same = RayBatches(scene, seed=3), RayBatches(scene, seed=3, priors=Priors())
    with_maps = RayBatches(scene, seed=3, priors=replace(EVERYTHING, points=None))
    with_points = RayBatches(scene, seed=3, priors=EVERYTHING)
    for _ in range(2):
        batches = [batches.draw(9) for batches in (plain, same, with_maps)]
        assert all(torch.equal(codes(batch), codes(batches[0])) for batch in batches)
    first = batches[0]
    assert first.depth is first.axis_cosine is first.normal is first.points is None
    assert batches[2].points is None
    assert torch.equal(plain.generator.get_state(), with_maps.generator.get_state())
    with_points.draw(9)
    state = with_points.state_dict()["generator"].clone()
    ahead = with_points.draw(9)
    with_points.load_state_dict({"generator": state})
    again = with_points.draw(9)
    assert ahead.points is not None
    assert again.points is not None
    assert torch.equal(ahead.points, again.points)


@pytest.mark.parametrize(
    ("lacks", "line"),
    [
        ("depths", "key.of.depth: the capture does not have a depth map for every view; add them (to"),
        ("normals", "key.of.normal: the capture does not have a normal map for every view; add them (to"),
        ("points", "key.of.points: the capture has no structure-from-motion points; set it to 0"),
    ],
)
def test_priors_that_a_capture_does_not_have(lacks: str, line: str) -> None:
    scene = replace(scene_with_priors(), **{lacks: None})
    with pytest.raises(ConfigError) as caught:
        RayBatches(scene, priors=EVERYTHING)
    assert str(caught.value).startswith(line)
    RayBatches(scene)


def test_points_of_which_none_is_good() -> None:
    with pytest.raises(ConfigError, match=r"key\.of\.points: of the capture's 9 points none .* 0\.01 pixels"):
        RayBatches(scene_with_priors(), indices=[3], priors=replace(EVERYTHING, max_error=0.01))


@pytest.mark.parametrize("kind", ["depth", "normal", "points"])
def test_priors_do_not_go_with_a_warped_space(kind: str) -> None:
    scene = scene_with_priors()
    ndc = NDC(torch.eye(3, 4, dtype=torch.float64), tan_x=0.8, tan_y=0.5, near=2.0)
    scene = replace(scene, cameras=replace(scene.cameras, ndc=ndc))
    with pytest.raises(ConfigError, match=rf"key\.of\.{kind}: .* dataset\.ndc warps"):
        RayBatches(scene, priors=Priors(**{kind: f"key.of.{kind}"}))
