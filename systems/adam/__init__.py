"""AdamW (Loshchilov and Hutter 2019, algorithm 2) whose step no host waits for, so that a CUDA graph can
record it; without weight decay it is Adam (Kingma and Ba 2015, algorithm 1).

``reference.py`` is plain PyTorch, which a CPU uses, too; ``cuda.py`` one Triton kernel a parameter, which
reads and writes everything once. State has torch.optim.AdamW's keys and meaning, so that a checkpoint of
either goes on with the other.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from utils.backend import (
    available_anywhere,
    available_on_cpu,
    available_on_gpu,
    implementation,
    resolve_backend,
)

log = logging.getLogger(__name__)

IMPLEMENTATIONS = {"cpu": available_on_cpu, "cuda": available_on_gpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

_MODULES = {"cpu": "reference", "cuda": "cuda", "reference": "reference"}
_UNSUPPORTED = ("amsgrad", "maximize")


class Adam(torch.optim.Optimizer):
    """AdamW with all of its state on the device.

    m and v are the running means of the gradient g and of its square, t counts the steps, from 1: ::

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        parameter -= lr weight_decay parameter
        parameter -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Every tensor is made here and stays where it is, as a recorded step demands. A group's ``lr`` is a number
    or a 0-dim float32 tensor on the device, which is read there, at each step; its ``weight_decay`` a number.

    Args:
        params: parameters or groups of them, float32, contiguous, all on one device.
        lr: learning rate of groups that do not give their own.
        betas: decay of the two means per step, 0..1.
        eps: added to the denominator.
        weight_decay: of groups that do not give their own; decoupled, it is no part of the gradient.
        skip_untouched: leave alone, its means and its decay included, every element whose gradient is
            exactly 0:
            instant-ngp's rule for hash tables, many of whose rows no sample of a step touches. Such rows cost
            no more than reading their gradient.
        backend: a key of :data:`IMPLEMENTATIONS`, or ``auto``.

    Raises:
        ValueError: parameters of another type or on several devices.
        BackendError: the backend cannot run on the parameters' device.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Float[Tensor, ""] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        skip_untouched: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # These mean nothing here; torch.optim.AdamW wants them in a checkpoint that it loads.
        super().__init__(params, defaults | {"fused": True, "decoupled_weight_decay": True})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device
        for parameter in parameters:
            is_usable = parameter.dtype == torch.float32 and parameter.is_contiguous()
            if not is_usable or parameter.device != device:
                raise ValueError("Adam: parameters must be contiguous, float32, and all on one device")
        checks = {name: functools.partial(check, device) for name, check in IMPLEMENTATIONS.items()}
        name, reason = resolve_backend("optimizer", backend, checks, device)
        log.info("optimizer: backend %s (%s)", name, reason)
        self.skip_untouched = skip_untouched
        self._update = implementation("systems.adam", _MODULES[name]).update_
        # The counts lie side by side, so that their corrections are computed together.
        self._steps = torch.zeros(len(parameters), device=device)
        self._log_betas = torch.zeros(len(parameters), 2, dtype=torch.float64, device=device)
        for step, parameter in zip(self._steps, parameters, strict=True):
            self.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._read_betas()

    def _read_betas(self) -> None:
        betas = [group["betas"] for group in self.param_groups for _ in group["params"]]
        self._log_betas.copy_(torch.tensor(betas, dtype=torch.float64).log())

    @torch.no_grad()
    def step(self, finite: Bool[Tensor, ""]) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            finite: whether to, on the device; where it is False, nothing changes at all.
        """
        stepped = [
            (row, group, parameter)
            for row, (group, parameter) in enumerate(
                (group, parameter) for group in self.param_groups for parameter in group["params"]
            )
            if parameter.grad is not None
        ]
        if not stepped:
            return
        counts = [self.state[parameter]["step"] for _, _, parameter in stepped]
        # A list of the same tensor: the tensor alone would be taken for a number and read on the host.
        torch._foreach_add_(counts, [finite.float()] * len(counts))
        # 1 - beta^t; in float64, because 1 - 0.99 has lost two of float32's seven digits.
        corrections = torch.expm1(self._steps[:, None] * self._log_betas).neg_()
        for row, group, parameter in stepped:
            state = self.state[parameter]
            self._update(
                *(parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                corrections=corrections[row],
                finite=finite,
                skip_untouched=self.skip_untouched,
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's; learning rates are numbers. This waits for the device."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["lr"] = float(group["lr"])
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state of this class's or of torch.optim.AdamW's into the tensors that are here.

        Adam's serves as well if it has no weight decay, which there is part of the gradient.

        Raises:
            ValueError: it is of other groups or parameters, or of a variant of Adam that this is not.
        """
        groups = list(zip(self.param_groups, state_dict["param_groups"], strict=True))
        pairs = [
            (self.state[parameter], state_dict["state"].get(index, {}))
            for group, saved in groups
            for parameter, index in zip(group["params"], saved["params"], strict=True)
        ]
        wrong = [key for _, saved in groups for key in _UNSUPPORTED if saved.get(key)]
        if any(saved.get("weight_decay") and not saved.get("decoupled_weight_decay") for _, saved in groups):
            wrong.insert(0, "weight_decay within the gradient")
        if wrong:
            raise ValueError(f"Adam: cannot go on from a state with {', '.join(wrong)}")
        for own, found in pairs:
            for key in found:
                if own[key].shape != found[key].shape:
                    shapes = f"{tuple(found[key].shape)}, expected {tuple(own[key].shape)}"
                    raise ValueError(f"Adam: the state has a tensor {key} of shape {shapes}")
        for group, saved in groups:
            for key, value in saved.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                elif key not in ("params", "decoupled_weight_decay"):
                    group[key] = value
        for own, found in pairs:
            for key, tensor in own.items():
                # torch.optim.Adam has no state of a parameter that never had a gradient.
                tensor.copy_(found[key]) if key in found else tensor.zero_()
        self._read_betas()


def all_finite(tensors: Sequence[Float[Tensor, "..."]]) -> Bool[Tensor, ""]:
    """Whether all elements of one or more tensors are finite, on the device.

    Sums are looked at: a sum is non-finite as soon as one element is (or where it exceeds float32's 3e38).
    """
    return torch.isfinite(torch.stack([tensor.sum() for tensor in tensors])).all()


@torch.no_grad()
def clip_norm(gradients: Sequence[Float[Tensor, "..."]], max_norm: float) -> None:
    """Scale gradients in place so that their norm, taken over them all, is at most ``max_norm``.

    The same as :func:`torch.nn.utils.clip_grad_norm_`, on gradients instead of parameters.
    """
    norm = nn.utils.get_total_norm(gradients)
    # Without a branch, which would have the host wait for the norm.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
