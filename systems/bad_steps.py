"""Steps that are not finite: counted, named, and rolled back where there are too many in a row.

With packed buffers the host sees every step fail. With buffers of fixed size the device counts by itself, and
the host learns of it where numbers are written.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from systems.step import FIELDS, Judgement, StepRecord
from utils.errors import TrainingError

log = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
"""Where so many have not helped, one more will not either."""


class BadSteps:
    """What a run knows of its steps that were skipped because their loss or a gradient was not finite.

    Args:
        limit: so many in a row ask for a roll-back.
    """

    def __init__(self, limit: int) -> None:
        self.in_a_row = 0
        """Bad steps up to now, since the last good one."""
        self.rollbacks = 0
        """Roll-backs of this run."""
        self._limit = limit
        self._culprits = ""

    def end(self) -> None:
        """Note that a step was taken."""
        self.in_a_row = 0

    def recount(self, in_a_row: int) -> None:
        """Take over the number that the device has counted."""
        self.in_a_row = in_a_row

    def restore(self, in_a_row: int, rollbacks: int) -> None:
        """Go on where a checkpoint was written."""
        self.in_a_row, self.rollbacks = in_a_row, rollbacks

    def add(self, step: int, judgement: Judgement) -> None:
        """Count one, and say which terms spoiled it and which views its rays are from."""
        self.in_a_row += 1
        self._culprits = _names(name for name, term in judgement.terms.items() if not torch.isfinite(term))
        views = sorted(set(judgement.batch.rays.camera_indices.tolist()))[:8]
        log.warning(
            "step %d skipped: %s is not finite (%d in a row; rays from views %s ...)",
            *(step, self._culprits, self.in_a_row, views),
        )

    def name_last(self, step: int, record: StepRecord) -> None:
        """Say what spoiled the latest step, if it was a bad one; asks the device."""
        if self.in_a_row == 0:
            return
        terms = zip(record.terms, record.values[len(FIELDS) :].tolist(), strict=True)
        self._culprits = _names(name for name, value in terms if not math.isfinite(value))
        log.warning("step %d skipped: %s is not finite (%d in a row)", step, self._culprits, self.in_a_row)

    def are_too_many(self, step: int, last_checkpoint: Path | None) -> bool:
        """Whether to roll back to the last checkpoint now.

        Raises:
            TrainingError: they are, but there is no checkpoint, or three roll-backs did not help.
        """
        if self.in_a_row < self._limit:
            return False
        if last_checkpoint is None or self.rollbacks == MAX_ROLLBACKS:
            raise TrainingError(
                f"step {step}",
                f"{self._culprits} is not finite in {self.in_a_row} steps in a row",
                f"resume from {last_checkpoint} with smaller trainer.optimizer rates",
            )
        return True

    def start_over(self, last_checkpoint: Path) -> None:
        """Count a roll-back, and say where it leads."""
        self.in_a_row = 0
        self.rollbacks += 1
        log.warning("rolling back to %s (%d of %d)", last_checkpoint, self.rollbacks, MAX_ROLLBACKS)


def _names(culprits: Iterable[str]) -> str:
    return ", ".join(culprits) or "a gradient"
