"""Schedules: pure functions of how far training is, so that a resumed run has nothing to restore.

A weight in a config is a number, or a list of ``[fraction, value]`` pairs, piecewise linear between them and
constant before the first and after the last: ``[[0, 0.0], [0.3, 0.1]]`` rises from 0 to 0.1 over the first
30 % of training.
"""

import math
from collections.abc import Sequence

Schedule = float | int | Sequence[Sequence[float | int]]


def check_schedule(key: str, schedule: object) -> None:
    """Raise ``ValueError`` naming the dotted ``key`` unless ``schedule`` is a number or a list of pairs."""
    if isinstance(schedule, (int, float)) and not isinstance(schedule, bool) and math.isfinite(schedule):
        return
    remedy = "must be a number or a list of [fraction, value] pairs with fractions rising within 0..1"
    if not isinstance(schedule, (list, tuple)) or not schedule:
        raise ValueError(f"{key}: {remedy}, got {schedule!r}")
    last = -1.0
    for pair in schedule:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in pair):
            raise ValueError(f"{key}: {remedy}, got {schedule!r}")
        if not last < pair[0] <= 1 or pair[0] < 0:
            raise ValueError(f"{key}: {remedy}, got {schedule!r}")
        last = pair[0]


def value_at(schedule: Schedule, fraction: float) -> float:
    """The schedule's value when ``fraction`` (0..1) of training is done.

    >>> value_at([[0.0, 0.0], [0.5, 1.0]], 0.25)
    0.5
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    before = schedule[0]
    for after in schedule:
        if fraction < after[0]:
            if after[0] == before[0]:
                return float(after[1])
            share = (fraction - before[0]) / (after[0] - before[0])
            return float(before[1] + max(share, 0.0) * (after[1] - before[1]))
        before = after
    return float(before[1])


def is_ever_on(schedule: Schedule) -> bool:
    """Whether the schedule is above 0 at some time: between its points it is never above both of them.

    >>> is_ever_on([[0.0, 0.0], [0.5, 0.1]]), is_ever_on(0.0)
    (True, False)
    """
    if isinstance(schedule, (int, float)):
        return schedule > 0
    return any(pair[1] > 0 for pair in schedule)


def proposal_exponent(fraction: float, end: float, bias: float = 10.0) -> float:
    """Exponent on proposals' weights: from 0, where all intervals count alike, to 1 at the fraction ``end``.

    Schlick's bias b f / ((b - 1) f + 1) of the part f of the way there that is done: half of it after
    1 / (b + 1).

    >>> proposal_exponent(0.5, 1.0, bias=3.0), proposal_exponent(0.0, 0.1), proposal_exponent(0.2, 0.1)
    (0.75, 0.0, 1.0)
    >>> proposal_exponent(0.0, 0.0)
    1.0

    Source: mip-NeRF 360 (Barron et al. 2022), section "Annealing" of the supplement (b = 10, over all of
    training).
    """
    if fraction >= end:
        return 1.0
    done = fraction / end
    return bias * done / ((bias - 1.0) * done + 1.0)


def learning_rate_factor(
    step: int, fraction: float, warmup_steps: int, decay: str, final_ratio: float, warmup: str = "linear"
) -> float:
    """Factor on the base learning rate: warm-up in steps, decay over the fraction of training done.

    Args:
        step: steps taken so far.
        fraction: of training done, 0..1.
        warmup_steps: the factor rises to 1 over these; 0 for none.
        decay: ``exponential`` (final_ratio ** fraction), ``cosine`` (half a cosine from 1 to final_ratio) or
            ``constant``.
        final_ratio: what is left at the end.
        warmup: ``linear`` (from 1 / warmup_steps) or ``sine`` (from 1 / 100 along a quarter of a sine, as
            multinerf's).
    """
    if warmup_steps == 0:
        rise = 1.0
    elif warmup == "sine":
        rise = 0.01 + 0.99 * math.sin(0.5 * math.pi * min(step / warmup_steps, 1.0))
    else:
        rise = min((step + 1) / warmup_steps, 1.0)
    if decay == "exponential":
        return rise * final_ratio**fraction
    if decay == "cosine":
        return rise * (final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * fraction)))
    return rise
