"""Occupancy grid: which cells photographs can say something about, and how values rise and fade."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models import occupancy
from models.occupancy import OccupancyConfig, OccupancyGrid, cell_centers, observable_cells
from utils.types import Cameras, ImageStack, Scene


def scene_of(
    c2w: Tensor, size: int, focal: float, masks: list[np.ndarray] | None, test: tuple[int, ...] = ()
) -> Scene:
    """Square images of nothing, taken by pinholes with the principal point in the middle."""
    count = len(c2w)
    intrinsics = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]).repeat(count, 1, 1)
    sizes = torch.full((count, 2), size)
    return Scene(
        name="hand-made",
        cameras=Cameras(c2w, intrinsics, sizes),
        images=ImageStack.from_images([np.zeros((size, size, 3), np.uint8) for _ in range(count)]),
        image_names=tuple(str(view) for view in range(count)),
        train_indices=tuple(view for view in range(count) if view not in test),
        test_indices=test,
        world_from_scene=torch.eye(4, dtype=torch.float64),
        masks=None if masks is None else ImageStack.from_images(masks),
    )


def looking_at_centre(positions: Tensor) -> Tensor:
    """OpenCV poses at the given positions, looking at the origin."""
    forward = -torch.nn.functional.normalize(positions, dim=1)
    up = torch.tensor([0.1, 0.2, 0.97]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward, positions], dim=2)


def spread_over_sphere(count: int) -> Tensor:
    """Fibonacci's spiral: evenly spread directions."""
    k = torch.arange(count) + 0.5
    z = 1 - 2 * k / count
    angle = k * math.pi * (3 - math.sqrt(5))
    radius = (1 - z**2).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1)


def ball_scene(radius: float, count: int = 20) -> Scene:
    """A ball at the origin, photographed with masks from all around, distance 3."""
    size, focal = 64, 64.0
    c2w = looking_at_centre(3.0 * spread_over_sphere(count))
    axis = (np.arange(size) + 0.5 - size / 2) / focal
    # From distance 3 the ball fills a cone of half angle asin(radius / 3).
    tangent = np.hypot(axis[None, :], axis[:, None])
    mask = np.where(np.arctan(tangent) < np.arcsin(radius / 3), 255, 0).astype(np.uint8)[:, :, None]
    return scene_of(c2w, size, focal, [mask.copy() for _ in range(count)])


def test_cell_centres_by_hand() -> None:
    centers = cell_centers(2)
    assert centers[0].tolist() == [-0.5, -0.5, -0.5]
    assert centers[1].tolist() == [0.5, -0.5, -0.5]
    assert centers[2].tolist() == [-0.5, 0.5, -0.5]
    assert centers[4].tolist() == [-0.5, -0.5, 0.5]
    assert cell_centers(4).view(4, 4, 4, 3)[3, 1, 0].tolist() == [-0.75, -0.25, 0.75]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_visual_hull_holds_the_ball_and_little_more(tolerance: float) -> None:
    config = OccupancyConfig(resolution=32, hull_tolerance=tolerance)
    observable = observable_cells(ball_scene(0.4), config).view(-1)
    distance = cell_centers(32).norm(dim=1)
    half_diagonal = math.sqrt(3) / 32
    # Every cell that the ball touches has its centre within half a diagonal of it.
    assert observable[distance < 0.4 + half_diagonal].all()
    # The mask is widened by half a diagonal and two pixels of 3 / 64, and the hull of 20 views has corners.
    assert not observable[distance > 0.4 + half_diagonal + 3 * 3 / 64 + 0.1].any()
    assert observable.sum() < 3 * (distance < 0.4 + half_diagonal).sum()


def test_one_wrong_mask_is_forgiven() -> None:
    scene = ball_scene(0.4)
    assert scene.masks is not None
    scene.masks.image(7).zero_()
    centre = cell_centers(32).norm(dim=1) < 0.3
    forgiving = observable_cells(scene, OccupancyConfig(resolution=32, hull_tolerance=0.05)).view(-1)
    strict = observable_cells(scene, OccupancyConfig(resolution=32, hull_tolerance=0.0)).view(-1)
    assert forgiving[centre].all()
    assert not strict[centre].any()


def test_mask_off_centre_lands_in_the_right_cells() -> None:
    # Three cameras along the axes see one small square each; their pyramids meet around (0.5, -0.25, 0.25).
    axes = torch.eye(3)
    target = torch.tensor([0.5, -0.25, 0.25])
    poses, masks = [], []
    for axis in range(3):
        # Columns: the next axis (right), the one after (down), the axis itself (forward).
        rotation = axes[:, [(axis + 1) % 3, (axis + 2) % 3, axis]]
        position = -3.0 * axes[axis]
        poses.append(torch.cat([rotation, position[:, None]], dim=1))
        x, y, z = ((target - position) @ rotation).tolist()
        column, row = math.floor(100 * x / z + 64), math.floor(100 * y / z + 64)
        mask = np.zeros((128, 128, 1), np.uint8)
        mask[row - 1 : row + 2, column - 1 : column + 2] = 255
        masks.append(mask)
    observable = observable_cells(
        scene_of(torch.stack(poses), 128, 100.0, masks), OccupancyConfig(resolution=32)
    )
    found = cell_centers(32)[observable.view(-1)]
    assert 1 <= len(found) < 600
    torch.testing.assert_close(found.mean(dim=0), target, atol=0.05, rtol=0)
    assert (found - target).norm(dim=1).max() < 0.4


def in_blocks_of_two(cells: torch.Tensor) -> torch.Tensor:
    size = round(len(cells) ** (1 / 3))
    blocks = cells.view(size, size, size)
    for axis in range(3):
        blocks = blocks.repeat_interleave(2, dim=axis)
    return blocks


def test_without_masks_the_frusta_decide() -> None:
    # Two cameras at (0, 0, -3) and (-3, 0, 0) with pyramids |x|, |y| < (z + 3) / 6 and alike.
    forward_z = torch.eye(3)
    forward_x = torch.eye(3)[:, [1, 2, 0]]
    c2w = torch.stack(
        [
            torch.cat([forward_z, torch.tensor([[0.0], [0.0], [-3.0]])], dim=1),
            torch.cat([forward_x, torch.tensor([[-3.0], [0.0], [0.0]])], dim=1),
        ]
    )
    scene = scene_of(c2w, 32, 96.0, None)
    # Cells are asked for in blocks of 2x2x2: 16 per axis decide over 32.
    x, y, z = cell_centers(16).unbind(1)
    inside = cell_centers(16).norm(dim=1) < 1 + math.sqrt(3) / 16
    first = (x.abs() < (z + 3) / 6) & (y.abs() < (z + 3) / 6)
    second = (z.abs() < (x + 3) / 6) & (y.abs() < (x + 3) / 6)
    both = observable_cells(scene, OccupancyConfig(resolution=32))
    assert torch.equal(both, in_blocks_of_two(first & second & inside))
    either = observable_cells(scene, OccupancyConfig(resolution=32, min_views=1))
    assert torch.equal(either, in_blocks_of_two((first | second) & inside))
    # One training view cannot ask for two.
    alone = scene_of(c2w, 32, 96.0, None, test=(1,))
    found = observable_cells(alone, OccupancyConfig(resolution=32))
    assert torch.equal(found, in_blocks_of_two(first & inside))


def test_cells_behind_a_camera_are_not_seen() -> None:
    c2w = torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1)[None]
    observable = observable_cells(scene_of(c2w, 32, 8.0, None), OccupancyConfig(resolution=15)).view(-1)
    # An odd number puts cells exactly behind the camera, where x / z = 0 whatever the sign of z.
    z = cell_centers(15)[:, 2]
    assert observable.any()
    assert not observable[z < -1 / 15].any()


def test_corners_of_the_cube_are_closed() -> None:
    scene = scene_of(looking_at_centre(3.0 * spread_over_sphere(4)), 32, 16.0, None)
    observable = observable_cells(scene, OccupancyConfig(resolution=16))
    distance = cell_centers(8).norm(dim=1)
    assert torch.equal(observable, in_blocks_of_two(distance < 1 + math.sqrt(3) / 8))


class Presence:
    """Answers with one number, or one per octant, and remembers where it was asked."""

    def __init__(self, value: float | Tensor) -> None:
        self.value = torch.as_tensor(value)
        self.asked = torch.zeros(0, 3)

    def __call__(self, positions: Tensor) -> Tensor:
        self.asked = positions
        if self.value.dim() == 0:
            return self.value.expand(len(positions))
        x, y, z = (positions > 0).long().unbind(1)
        return self.value[z, y, x]


def grid_of(observable: Tensor, **changes: float) -> OccupancyGrid:
    config = OccupancyConfig(**({"resolution": len(observable), "decay": 0.5, "threshold": 0.1} | changes))  # type: ignore[arg-type]
    return OccupancyGrid(config, observable)


def everything(resolution: int = 2) -> Tensor:
    return torch.ones(resolution, resolution, resolution, dtype=torch.bool)


def test_values_rise_at_once_and_fade_slowly() -> None:
    grid = grid_of(everything(), warmup_updates=100)
    draw = torch.Generator().manual_seed(0)
    history = []
    for value in (0.8, 0.0, 0.3, 0.0, 0.0, 0.2):
        grid.update(Presence(value), draw)
        history.append((grid.values.unique().tolist(), grid.share))
    # 0.8; half of it; half of it again against 0.3; then 0.15; 0.075, which is below the threshold; back up.
    values = [value for (value,), _ in history]
    assert values == pytest.approx([0.8, 0.4, 0.3, 0.15, 0.075, 0.2])
    assert [share for _, share in history] == [1, 1, 1, 1, 0, 1]
    assert int(grid.num_updates) == 6


def test_a_value_at_the_threshold_is_empty() -> None:
    grid = grid_of(everything(), threshold=0.25)
    grid.update(Presence(0.25), torch.Generator())
    assert grid.share == 0
    grid.update(Presence(0.26), torch.Generator())
    assert grid.share == 1


def test_each_cell_is_asked_at_a_point_inside_it() -> None:
    grid = grid_of(everything(8))
    presence = Presence(0.5)
    grid.update(presence, torch.Generator().manual_seed(0))
    assert presence.asked.shape == (512, 3)
    offset = (presence.asked - cell_centers(8)).abs()
    assert (offset <= 1 / 8 + 1e-6).all()
    # Anywhere in it, not at its centre.
    assert offset.max() > 0.95 / 8
    assert offset.mean().item() == pytest.approx(0.5 / 8, rel=0.1)


def test_values_land_in_the_cells_asked_about() -> None:
    octants = torch.arange(8.0).view(2, 2, 2) / 10
    grid = grid_of(everything(4), threshold=0.45)
    grid.update(Presence(octants), torch.Generator().manual_seed(0))
    expected = octants.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(grid.values, expected)
    assert torch.equal(grid.occupied, expected > 0.45)


def test_after_the_warm_up_only_occupied_cells_are_asked() -> None:
    octants = torch.zeros(2, 2, 2)
    octants[1, 0, 1] = 1.0
    grid = grid_of(everything(), warmup_updates=2, empty_share=0.0, occupied_share=1.0)
    draw = torch.Generator().manual_seed(0)
    asked = []
    for _ in range(4):
        presence = Presence(octants)
        grid.update(presence, draw)
        asked.append(len(presence.asked))
    assert asked == [8, 8, 1, 1]
    assert (presence.asked[0] > 0).tolist() == [True, False, True]


def test_after_the_warm_up_some_empty_cells_are_asked() -> None:
    grid = grid_of(everything(16), warmup_updates=0, empty_share=0.25)
    grid.occupied.zero_()
    presence = Presence(0.0)
    grid.update(presence, torch.Generator().manual_seed(0))
    assert len(presence.asked) == pytest.approx(0.25 * 16**3, rel=0.1)
    # Cells that were not asked keep their values.
    grid.values.fill_(0.8)
    grid.update(presence, torch.Generator().manual_seed(1))
    assert set(grid.values.unique().tolist()) == {torch.tensor(0.4).item(), torch.tensor(0.8).item()}


@pytest.mark.parametrize("warmup", [0, 5])
def test_cells_that_cannot_be_observed_stay_closed(warmup: int) -> None:
    observable = torch.rand(8, 8, 8) < 0.5
    grid = grid_of(observable, warmup_updates=warmup, empty_share=1.0, occupied_share=1.0)
    assert torch.equal(grid.occupied, observable)
    for seed in range(3):
        presence = Presence(1.0)
        grid.update(presence, torch.Generator().manual_seed(seed))
        assert len(presence.asked) == int(observable.sum())
    assert torch.equal(grid.occupied, observable)
    assert not grid.values[~observable].any()


def test_nothing_to_ask() -> None:
    grid = grid_of(~everything())
    grid.update(Presence(1.0), torch.Generator())
    assert grid.share == 0


def test_checkpoint_holds_all_state() -> None:
    octants = torch.rand(2, 2, 2)
    first = grid_of(everything(4), warmup_updates=1)
    first.update(Presence(octants), torch.Generator().manual_seed(0))
    second = grid_of(~everything(4), warmup_updates=1)
    second.load_state_dict(first.state_dict())
    for grid in (first, second):
        grid.update(Presence(1 - octants), torch.Generator().manual_seed(1))
    for name, buffer in first.state_dict().items():
        assert torch.equal(buffer, second.state_dict()[name]), name
    assert int(second.num_updates) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 1}, r"model\.occupancy\.resolution: must lie in 2\.\.1024, got 1"),
        ({"decay": 1.1}, r"model\.occupancy\.decay"),
        ({"threshold": -0.1}, r"model\.occupancy\.threshold"),
        ({"empty_share": 2.0}, r"model\.occupancy\.empty_share"),
        ({"hull_tolerance": -1.0}, r"model\.occupancy\.hull_tolerance"),
    ],
)
def test_config_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OccupancyConfig(**change)  # type: ignore[arg-type]


# Without waiting for the device


@pytest.mark.parametrize("count", [0, 1, 37, 100])
@pytest.mark.parametrize("capacity", [1, 20, 100, 130])
def test_padded_indices(count: int, capacity: int) -> None:
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[torch.randperm(100)[:count]] = True
    found = occupancy._padded_indices(chosen, capacity).tolist()
    assert len(found) == capacity
    fitting = chosen.nonzero().squeeze(1).tolist()[:capacity]
    assert found == fitting + [100] * (capacity - len(fitting))


@pytest.mark.parametrize("done", [0, 50], ids=["all cells", "some cells"])
def test_padding_changes_no_cell(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """With padded indices, as on a GPU, the same cells get the same values."""
    observable = torch.rand(12, 12, 12) < 0.7
    grids = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(occupancy, "_indices", occupancy._padded_indices)
        grid = OccupancyGrid(OccupancyConfig(resolution=12, threshold=0.5), observable)
        grid.values.copy_(torch.linspace(0, 1, 12**3).view(12, 12, 12))
        grid.num_updates.fill_(done)
        # A value that depends on the cell alone, because the points in the cells are drawn in other order.
        grid.update(
            lambda positions: (positions * 6).floor().sum(dim=1).abs() / 20, torch.Generator().manual_seed(3)
        )
        grids.append(grid)
    assert torch.equal(grids[0].values, grids[1].values)
    assert torch.equal(grids[0].occupied, grids[1].occupied)


def test_what_is_known_on_the_host_follows_a_checkpoint() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=8), torch.ones(8, 8, 8, dtype=torch.bool))
    half = torch.zeros(8, 8, 8, dtype=torch.bool)
    half[:4] = True
    other = OccupancyGrid(OccupancyConfig(resolution=8), half)
    for _ in range(3):
        other.update(lambda positions: positions[:, 0].abs(), torch.Generator().manual_seed(0))
    assert grid._on_host() == (0, 512)
    grid.load_state_dict(other.state_dict())
    assert grid._on_host() == other._on_host() == (3, 256)
