"""Work in pieces that fit into the device's memory, however much of it others have taken.

How much fits cannot be known beforehand: it depends on the model, on the scene, and on who else uses the GPU.
"""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from utils.errors import ExportError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Chunks:
    """How many rows are worked on at once; fewer once memory has run out.

    One instance serves all of a job, so that what did not fit is not tried again. ::

        chunks = Chunks("rays", 4096, "test.rays_per_chunk")
        parts = [pixels for _, pixels in chunks.results(lambda rows: render(rays[rows]), len(rays))]

    Args:
        what: name of the rows in the log.
        size: most rows at once, at least 1.
        key: dotted key of the config that gives ``size``.

    Raises:
        ValueError: ``size`` is below 1.
    """

    def __init__(self, what: str, size: int, key: str) -> None:
        if size < 1:
            raise ValueError(f"{key}: must be at least 1, got {size}")
        self.what, self.size, self.key = what, size, key

    def results(self, function: Callable[[slice], T], count: int) -> Iterator[tuple[slice, T]]:
        """Apply ``function`` to the rows ``0..count`` piece by piece, in order.

        A piece for which memory runs out is tried again in halves, so ``function`` must do no harm when it is
        called twice for a row.

        Args:
            function: computes the result of the rows in a slice.
            count: number of rows, 0 or more.

        Yields:
            Each piece's slice and result.

        Raises:
            ExportError: there is no memory for a single row.
        """
        start = 0
        while start < count:
            rows = slice(start, min(start + self.size, count))
            fits = True
            try:
                result = function(rows)
            except torch.OutOfMemoryError:
                fits = False
            # Not inside the except block: there the traceback still holds what the call had allocated.
            if not fits:
                self._shrink(rows.stop - rows.start)
                continue
            yield rows, result
            start = rows.stop

    def _shrink(self, tried: int) -> None:
        """Go on with half of what was tried, and with the memory that PyTorch keeps for later uses."""
        if tried == 1:
            raise ExportError(
                self.key,
                f"the device's memory does not hold one of the {self.what} at a time",
                "end other programs that use the device (nvidia-smi lists them) or use --device cpu",
            )
        self.size = tried // 2
        torch.cuda.empty_cache()
        log.warning("out of memory: %s in chunks of %d from now on", self.what, self.size)
