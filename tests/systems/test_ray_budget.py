"""How the number of rays follows from the samples that they have."""

import torch

from systems.ray_budget import RayBudget

BUDGET = RayBudget(samples=1000, max_rays=200)


def test_next_number_of_rays_by_hand() -> None:
    assert BUDGET.next(100, 1000) == 100
    assert BUDGET.next(100, 2000) == 95
    assert BUDGET.next(100, 500) == 110
    assert BUDGET.next(100, 0) == 110
    assert BUDGET.next(190, 10) == 200
    assert BUDGET.next(1, 10**6) == 1


def test_there_are_never_fewer_rays_than_the_patches_have() -> None:
    assert RayBudget(1000, 200, min_rays=75).next(100, 2000) == 95
    assert RayBudget(1000, 200, min_rays=95).next(100, 100_000) == 95
    assert RayBudget(1000, 200, min_rays=95).next(95, 10**6) == 95
    assert [RayBudget(1000, 200, min_rays=75).clamp(rays) for rays in (1, 80, 500)] == [75, 80, 200]


def test_buffers_hold_what_is_looked_at_and_what_is_rendered() -> None:
    budget = RayBudget(1001, 200, lookahead=1.5).on_device(48, torch.device("cpu"))
    assert (int(budget.num_rays), budget.marched, budget.rendered) == (48, 1501, 1001)


def test_half_of_a_budget() -> None:
    half = RayBudget(1001, 200, min_rays=120, lookahead=1.5).halved()
    assert half == RayBudget(500, 120, min_rays=120, lookahead=1.5, is_halved=True)
    assert RayBudget(1, 1).halved() == RayBudget(1, 1, is_halved=True)
