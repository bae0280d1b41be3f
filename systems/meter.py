"""What a run looks like while it trains: running means for the history, and one line in the terminal."""

import sys
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from models import Model
from systems.record import Run


@dataclass(frozen=True)
class StepRecord:
    """What one step reports; tensors, so that nothing waits for the device until somebody looks."""

    loss: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """The unweighted terms that were computed."""
    psnr: Float[Tensor, ""]
    """Of the step's pixels, dB."""
    finite: bool
    """Whether the step was taken; one with a loss or a gradient that is not finite is skipped."""
    num_rays: int
    num_samples: int
    """Samples that were rendered."""
    num_marched: int
    """Samples before those that nothing can see were dropped."""


def mean_psnr(records: list[StepRecord]) -> float:
    """Mean over some steps, dB."""
    return float(torch.stack([record.psnr for record in records]).mean())


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


class Meter:
    """Takes every step's record; every ``log_every`` steps it writes a row and refreshes the progress bar.

    Args:
        run: whose history and tensorboard the rows go to; closed with the meter.
        model: asked for its sharpness and its occupancy when a row is written.
        terms: names of all loss terms, each a column whether it is computed or not.
        log_every: steps between rows.
        max_steps: for the progress bar.
        seconds: training time before the first step, which a resumed run has.
    """

    def __init__(
        self, run: Run, model: Model, terms: list[str], log_every: int, max_steps: int, seconds: float
    ) -> None:
        self.psnr = 0.0
        self._run, self._model, self._terms = run, model, terms
        self._log_every, self._max_steps = log_every, max_steps
        self._records: list[StepRecord] = []
        self._since = seconds
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
        return mean_psnr(self._records) if self._records else self.psnr

    def add(self, record: StepRecord, step: int, seconds: float, fraction: float) -> None:
        """Take one step's record.

        Args:
            record: what the step reported.
            step: steps taken so far, this one included.
            seconds: training time so far.
            fraction: of training done, 0..1.
        """
        self._records.append(record)
        if step % self._log_every != 0:
            return
        elapsed = max(seconds - self._since, 1e-9)
        records, self._records, self._since = self._records, [], seconds
        self.psnr = mean_psnr(records)
        values = {
            "minutes": seconds / 60,
            "loss": float(record.loss),
            "psnr": self.psnr,
            **{name: float(record.terms.get(name, 0.0)) for name in self._terms},
            "inv_s": float(self._model.inv_s().detach()),
            "occupied": self._model.occupancy.share,
            "rays": record.num_rays,
            "samples": record.num_samples,
            "marched": record.num_marched,
            "rays_per_second": sum(record.num_rays for record in records) / elapsed,
            "samples_per_second": sum(record.num_samples for record in records) / elapsed,
            "skipped": sum(not record.finite for record in records),
        }
        self._run.scalars(step, values)
        self._refresh_bar(values, step, seconds, fraction)

    def _refresh_bar(self, values: dict[str, float], step: int, seconds: float, fraction: float) -> None:
        left = seconds / max(fraction, 1e-9) * (1.0 - fraction)
        shown = (
            f"step {step}/{self._max_steps}",
            f"loss {values['loss']:.4f}",
            f"PSNR {self.psnr:.2f}",
            f"1/s {values['inv_s']:.0f}",
            f"{values['rays_per_second'] / 1e3:.1f}k rays/s",
            f"{values['samples_per_second'] / 1e3:.0f}k samples/s",
            f"{memory_gib():.1f} GiB",
            f"{left // 60:.0f}:{left % 60:02.0f} left",
        )
        self._bar.set_description_str("  ".join(shown), refresh=False)
        self._bar.update(100.0 * fraction - self._bar.n)
