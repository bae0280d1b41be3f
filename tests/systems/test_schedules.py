"""Schedules: values by hand, what cannot be a schedule, and progress as a function of the fraction alone."""

import doctest
import math
from itertools import pairwise
from typing import Any

import pytest

from systems import schedules
from systems.schedules import check_schedule, learning_rate_factor, value_at


def test_example_in_the_docstring() -> None:
    result = doctest.testmod(schedules)
    assert result.attempted >= 1
    assert result.failed == 0


@pytest.mark.parametrize(
    ("schedule", "fraction", "value"),
    [
        (0.3, 0.0, 0.3),
        (2, 0.7, 2.0),
        ([[0.0, 0.0], [0.3, 0.1]], 0.15, 0.05),
        ([[0.0, 0.0], [0.3, 0.1]], 0.3, 0.1),
        ([[0.0, 0.0], [0.3, 0.1]], 1.0, 0.1),
        ([[0.2, 5.0], [0.4, 1.0], [1.0, 3.0]], 0.0, 5.0),
        ([[0.2, 5.0], [0.4, 1.0], [1.0, 3.0]], 0.2, 5.0),
        ([[0.2, 5.0], [0.4, 1.0], [1.0, 3.0]], 0.3, 3.0),
        ([[0.2, 5.0], [0.4, 1.0], [1.0, 3.0]], 0.7, 2.0),
        ([[0.5, 4.0]], 0.0, 4.0),
        ([[0.5, 4.0]], 1.0, 4.0),
        ([(0, 1), (1, 0)], 0.25, 0.75),
    ],
)
def test_value_by_hand(schedule: Any, fraction: float, value: float) -> None:
    check_schedule("key", schedule)
    assert value_at(schedule, fraction) == pytest.approx(value)


def test_value_lies_between_its_neighbours() -> None:
    schedule = [[0.1, 1.0], [0.35, -2.0], [0.9, 0.5]]
    values = [value_at(schedule, k / 1000) for k in range(1001)]
    assert max(abs(b - a) for a, b in pairwise(values)) <= 12.0 / 1000 + 1e-9
    assert min(values) == pytest.approx(-2.0, abs=1e-9)
    assert max(values) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        "0.1",
        None,
        True,
        [],
        math.nan,
        math.inf,
        [0.1, 0.2],
        [[0.0, 1.0, 2.0]],
        [[0.0, "high"]],
        [[0.0, math.nan]],
        [[0.5, 1.0], [0.2, 0.0]],
        [[0.5, 1.0], [0.5, 0.0]],
        [[-0.1, 1.0]],
        [[0.0, 1.0], [1.5, 0.0]],
    ],
)
def test_bad_schedules_name_their_key(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"^system\.loss\.eikonal: must be a number or a list of \["):
        check_schedule("system.loss.eikonal", schedule)


def test_warm_up_is_linear_in_steps() -> None:
    factors = [learning_rate_factor(step, 0.0, 4, "constant", 0.1) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, 0.0, 0, "constant", 0.1) == 1.0


def test_warm_up_along_a_sine() -> None:
    factors = [learning_rate_factor(step, 0.0, 512, "constant", 0.1, "sine") for step in (0, 256, 512, 900)]
    assert factors == pytest.approx([0.01, 0.01 + 0.99 * math.sqrt(0.5), 1.0, 1.0])
    assert learning_rate_factor(0, 0.0, 0, "constant", 0.1, "sine") == 1.0


@pytest.mark.parametrize(
    ("decay", "halfway"), [("exponential", 0.1), ("cosine", 0.5 * (1 + 0.01)), ("constant", 1.0)]
)
def test_decay_by_hand(decay: str, halfway: float) -> None:
    def factor(fraction: float) -> float:
        return learning_rate_factor(1000, fraction, 10, decay, 0.01)

    assert factor(0.0) == 1.0
    assert factor(0.5) == pytest.approx(halfway)
    assert factor(1.0) == pytest.approx(1.0 if decay == "constant" else 0.01)


def test_warm_up_and_decay_multiply() -> None:
    assert learning_rate_factor(4, 0.5, 10, "exponential", 0.01) == pytest.approx(0.5 * 0.1)
