"""What a run looks like while it trains: running means for the history, and one line in the terminal."""

import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models import Model
from systems.record import Run
from systems.step import FIELDS, StepRecord


def memory_gib() -> float:
    """Largest memory of this process so far; on a GPU, of PyTorch's tensors there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource  # absent on Windows

    # Kilobytes on Linux, bytes on macOS.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _columns(records: list[StepRecord]) -> dict[str, Tensor]:
    """What all of some steps reported, by name, on the host; waits for a GPU once."""
    # Terms come and go with their weights; what every step reports comes first.
    table = torch.stack([record.values[: len(FIELDS)] for record in records]).cpu()
    return dict(zip(FIELDS, table.unbind(dim=1), strict=True))


def _mean_psnr(columns: dict[str, Tensor]) -> float:
    """Mean in dB over the steps that were taken and had rays; NaN where none was."""
    counts = (columns["finite"] != 0) & (columns["num_rays"] > 0)
    return float(columns["psnr"][counts].mean())


class Meter:
    """Takes every step's record; every ``log_every`` steps it writes a row and refreshes the progress bar.

    Args:
        run: whose history and tensorboard the rows go to; closed with the meter.
        model: asked for its own numbers (sharpness, occupancy) when a row is written.
        system: names the loss terms, each a column whether it is computed or not, and knows the progress.
        log_every: steps between rows.
        max_steps: for the progress bar.
        seconds: training time before the first step, which a resumed run has.
    """

    def __init__(
        self, run: Run, model: Model, system: Any, log_every: int, max_steps: int, seconds: float
    ) -> None:
        self.psnr = 0.0
        self._run, self._model, self._system = run, model, system
        self._log_every, self._max_steps = log_every, max_steps
        self._records: list[StepRecord] = []
        self._since = self._latest = seconds
        self._bar = tqdm(
            total=100.0, unit="%", bar_format="{percentage:3.0f}%|{bar:20}| {desc}", mininterval=1.0
        )

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._run.close()

    def recent_psnr(self) -> float:
        """Mean over the steps since the last row, or over that row's right after it."""
        if not self._records:
            return self.psnr
        return _mean_psnr(_columns(self._records))

    def add(self, record: StepRecord, step: int, seconds: float, fraction: float) -> None:
        """Take one step's record.

        Args:
            record: what the step reported.
            step: steps taken so far, this one included.
            seconds: training time so far.
            fraction: of training done, 0..1.
        """
        if seconds < self._latest:
            # The run was rolled back: what came before belongs to no row.
            self._records, self._since = [], seconds
        self._latest = seconds
        self._records.append(record)
        if step % self._log_every != 0:
            return
        elapsed = max(seconds - self._since, 1e-9)
        records, self._records, self._since = self._records, [], seconds
        column = _columns(records)
        self.psnr = _mean_psnr(column)
        last = dict(zip(record.terms, record.values[len(FIELDS) :].tolist(), strict=True))
        values = {
            "minutes": seconds / 60,
            "loss": float(column["loss"][-1]),
            "psnr": self.psnr,
            **{name: last.get(name, 0.0) for name in self._system.terms},
            **self._model.scalars(self._system.progress_at(fraction)),
            "rays": int(column["num_rays"][-1]),
            "samples": int(column["num_samples"][-1]),
            "marched": int(column["num_marched"][-1]),
            "rays_per_second": float(column["num_rays"].double().sum()) / elapsed,
            "samples_per_second": float(column["num_samples"].double().sum()) / elapsed,
            "skipped": int((column["finite"] == 0).sum()),
        }
        self._run.scalars(step, values)
        self._refresh_bar(values, step, seconds, fraction)

    def _refresh_bar(self, values: dict[str, float], step: int, seconds: float, fraction: float) -> None:
        left = seconds / max(fraction, 1e-9) * (1.0 - fraction)
        shown = (
            f"step {step}/{self._max_steps}",
            f"loss {values['loss']:.4f}",
            f"PSNR {self.psnr:.2f}",
            *([f"1/s {values['inv_s']:.0f}"] if "inv_s" in values else []),
            f"{values['rays_per_second'] / 1e3:.1f}k rays/s",
            f"{values['samples_per_second'] / 1e3:.0f}k samples/s",
            f"{memory_gib():.1f} GiB",
            f"{left // 60:.0f}:{left % 60:02.0f} left",
        )
        self._bar.set_description_str("  ".join(shown), refresh=False)
        self._bar.update(100.0 * fraction - self._bar.n)
