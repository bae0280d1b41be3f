"""A training step on a GPU that no host waits for: recorded once as a CUDA graph, then replayed.

Everything has a fixed shape: a batch of ``max_rays`` rays, of which the first so many are rendered that the
sample buffers are almost full (:class:`utils.types.Budget`). Everything that changes from step to step lives
on the device: weights and learning rates in one small tensor that is overwritten before each step, the number
of rays, the random generators. Without recording the same code runs eagerly and computes the same.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from systems.adam import Adam, all_finite, clip_norm
from systems.step import Forward, StepRecord
from utils.types import Budget, Progress

_WARMUP = 3
"""Steps taken eagerly before one is recorded: libraries initialise themselves and kernels are compiled."""
_FILL = 0.95
"""How full the sample buffers are meant to be: rays that do not fit would be traced in vain."""
_NUM_SCALARS = 4
"""Of a progress, before the terms' weights and the learning rates, among what is uploaded for a step."""


class StepGraphs:
    """Runs a function of fixed shapes, recorded as one CUDA graph per key; the graphs share their memory.

    A key stands for everything in which the function's course may differ: which losses there are, say.

    Args:
        device: a GPU, or the CPU, where nothing is recorded.
        generators: what the function draws from, on the device.
        records: False runs the function eagerly every time.
    """

    def __init__(
        self, device: torch.device, generators: Sequence[torch.Generator], records: bool = True
    ) -> None:
        self._records = records and device.type == "cuda"
        self._generators = generators
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Capture needs a stream of its own, and what is recorded should have run there before.
        self._stream = torch.cuda.Stream(device) if self._records else None

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Run the function, or replay it; the result is the caller's to keep."""
        if not self._records:
            return function()
        if key in self._graphs:
            return self._replay(key)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= _WARMUP:
            return self._run_aside(function)
        self._record(key, function)
        return self._replay(key)

    def _replay(self, key: Hashable) -> Tensor:
        graph, result = self._graphs[key]
        graph.replay()
        return result.clone()

    def _run_aside(self, function: Callable[[], Tensor]) -> Tensor:
        assert self._stream is not None
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def _record(self, key: Hashable, function: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            result = function()
        self._graphs[key] = graph, result


class DeviceStep:
    """Takes training steps without asking the device for anything.

    Args:
        forward: the forward half of a step.
        optimizer: its groups' learning rates become views of this object's tensor of live values.
        terms: names of all loss terms there may be.
        budget: buffer sizes; its ``num_rays`` is adapted step by step.
        max_rays: rays in a batch.
        clip_norm: largest norm of each group's gradient; 0 leaves gradients as they are.
        records: whether steps are recorded as CUDA graphs.
    """

    def __init__(
        self,
        forward: Forward,
        optimizer: Adam,
        terms: Sequence[str],
        budget: Budget,
        max_rays: int,
        clip_norm: float = 0.0,
        records: bool = True,
    ) -> None:
        self.budget, self.max_rays = budget, max_rays
        self.bad_steps: Int64[Tensor, ""] = torch.zeros_like(budget.num_rays)
        """Steps in a row, up to now, that were not finite."""
        self._forward, self._optimizer, self._terms, self._clip_norm = forward, optimizer, terms, clip_norm
        self._min_rays = max(1, forward.batches.num_patch_rays)
        device = budget.num_rays.device
        self._live = torch.zeros(_NUM_SCALARS + len(terms) + len(optimizer.param_groups), device=device)
        self._graphs = StepGraphs(device, (forward.batches.generator, forward.generator), records)
        self.attach_rates()

    def attach_rates(self) -> None:
        """Let the optimiser read its learning rates here; again after its state has been loaded."""
        for group, rate in zip(
            self._optimizer.param_groups, self._live[_NUM_SCALARS + len(self._terms) :].unbind(), strict=True
        ):
            group["lr"] = rate

    def restore(self, num_rays: int, bad_steps: int) -> None:
        """Go on with so many rays after so many bad steps in a row; the optimiser's state has been loaded."""
        self.attach_rates()
        self.budget.num_rays.fill_(num_rays)
        self.bad_steps.fill_(bad_steps)

    def __call__(self, progress: Progress, rates: Sequence[float]) -> StepRecord:
        """Take one step at this progress with these learning rates, one for each group."""
        live = self._upload(progress, rates)
        terms = tuple(progress.loss_weights)
        key = (terms, self._forward.stage(progress))
        return StepRecord(self._graphs.run(key, lambda: self._step(live)), terms)

    def _upload(self, progress: Progress, rates: Sequence[float]) -> Progress:
        """Write this step's values to the device; returns the progress that reads them there."""
        weights = [progress.loss_weights.get(name, 0.0) for name in self._terms]
        inv_s = 0.0 if progress.inv_s is None else progress.inv_s
        scalars = [progress.cos_anneal, progress.active_levels, inv_s, progress.proposal_anneal]
        numbers = [*scalars, *weights, *rates]
        # From pinned memory the copy runs on the stream and the host goes on.
        staged = torch.tensor(numbers, dtype=torch.float32, pin_memory=self._live.device.type == "cuda")
        self._live.copy_(staged, non_blocking=True)
        cos_anneal, active_levels, live_inv_s, proposal_anneal, *rest = self._live.unbind()
        on_device = dict(zip(self._terms, rest, strict=False))
        live_weights = {name: on_device[name] for name in progress.loss_weights}
        return replace(
            progress,
            cos_anneal=cos_anneal,
            active_levels=active_levels,
            loss_weights=live_weights,
            inv_s=None if progress.inv_s is None else live_inv_s,
            proposal_anneal=proposal_anneal,
        )

    def _step(self, progress: Progress) -> Float[Tensor, " K"]:
        judgement = self._forward(progress, self.max_rays, self.budget)
        self._optimizer.zero_grad(set_to_none=True)
        judgement.loss.backward()
        groups = [
            [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            for group in self._optimizer.param_groups
        ]
        finite = all_finite([judgement.loss.detach(), *(gradient for group in groups for gradient in group)])
        if self._clip_norm > 0:
            for gradients in filter(None, groups):  # a prescribed sharpness has no gradient
                clip_norm(gradients, self._clip_norm)
        self._optimizer.step(finite)
        self.bad_steps.copy_(torch.where(finite, 0, self.bad_steps + 1))
        record = StepRecord.of(judgement, finite)
        self.budget.num_rays.copy_(self._next_num_rays(record))
        return record.values

    def _next_num_rays(self, record: StepRecord) -> Int64[Tensor, ""]:
        """Rays for the next step: a tenth of the way from this step's to what would fill a buffer."""
        rays, rendered, marched = record.values[3:6].unbind()
        now = self.budget.num_rays
        per_buffer = torch.minimum(
            self.budget.rendered / rendered.clamp(min=1.0), self.budget.marched / marched.clamp(min=1.0)
        )
        # The rays that were rendered say how many samples a ray has; where none was, there is no telling.
        wanted = torch.where(rays > 0, _FILL * rays * per_buffer, 0.5 * now)
        return (0.9 * now + 0.1 * wanted).long().clamp(self._min_rays, self.max_rays)
