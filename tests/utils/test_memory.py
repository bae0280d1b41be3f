"""Work in chunks: nothing lost or repeated, fewer rows at once where memory runs out, a clear end."""

import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch

from utils.errors import ExportError
from utils.memory import Chunks


class Device:
    """A device on which more than ``limit`` rows do not fit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[int] = []

    def square(self, rows: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(rows))
        if len(rows) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows**2


def run(chunks: Chunks, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    squares = torch.full_like(rows, float("nan"))
    for part, square in chunks.results(lambda part: function(rows[part]), len(rows)):
        assert torch.isnan(squares[part]).all(), "rows are done once"
        squares[part] = square
    return squares


@pytest.mark.parametrize("count", [0, 1, 7, 64, 100])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("limit", [1, 2, 10, 10**6])
def test_the_result_is_that_of_all_rows_at_once(count: int, size: int, limit: int) -> None:
    rows = torch.arange(count, dtype=torch.float64)
    device, chunks = Device(limit), Chunks("rows", size, "test.rows")
    assert torch.equal(run(chunks, device.square, rows), rows**2)
    assert max(device.tried, default=0) <= size


def test_what_did_not_fit_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    device, chunks = Device(limit=30), Chunks("rays", 100, "test.rays_per_chunk")
    with caplog.at_level(logging.WARNING, "utils.memory"):
        run(chunks, device.square, torch.rand(110))
        run(chunks, device.square, torch.rand(50))
    assert device.tried == [100, 50, 25, 25, 25, 25, 10, 25, 25]
    assert chunks.size == 25
    assert [entry.getMessage() for entry in caplog.records] == [
        f"out of memory: rays in chunks of {size} from now on" for size in (50, 25)
    ]


def test_halves_are_of_what_was_tried_not_of_what_was_allowed() -> None:
    device = Device(limit=5)
    run(Chunks("rows", 10**6, "test.rows"), device.square, torch.rand(10))
    assert device.tried == [10, 5, 5]


def test_no_memory_for_a_single_row() -> None:
    device = Device(limit=0)
    with pytest.raises(ExportError) as raised:
        run(Chunks("rays", 4, "test.rays_per_chunk"), device.square, torch.rand(9))
    assert str(raised.value) == (
        "test.rays_per_chunk: the device's memory does not hold one of the rays at a time; "
        "end other programs that use the device (nvidia-smi lists them) or use --device cpu"
    )
    assert device.tried == [4, 2, 1]


def test_a_failed_attempt_holds_no_memory_during_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    emptied: list[bool] = []
    # The cache can give back only what nobody refers to any more.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(all(ref() is None for ref in held)))

    def greedy(part: slice) -> int:
        scratch = torch.zeros(10)
        held.append(weakref.ref(scratch))
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return int(scratch.sum())

    gc.disable()
    try:
        assert len(list(Chunks("rows", 8, "test.rows").results(greedy, 8))) == 4
    finally:
        gc.enable()
    assert emptied == [True, True]


def test_other_errors_pass() -> None:
    def fail(_: slice) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(Chunks("rows", 8, "test.rows").results(fail, 8))


def test_chunks_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"export\.chunk: must be at least 1, got 0"):
        Chunks("points", 0, "export.chunk")
