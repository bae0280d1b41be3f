"""AdamW with one learning rate per group of parameters: its config, its groups, and how it goes on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from models import Model
from systems.adam import Adam

Group = dict[str, Any]
"""Parameters with a name and rates of their own, as PyTorch's optimisers take them."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with one learning rate per group of parameters."""

    grid: float = 1e-2
    """Learning rate of the hash grids' tables."""
    networks: float = 2e-3
    """Learning rate of the networks."""
    variance: float = 2e-3
    """Learning rate of v in inv_s = exp(10 v), or 1 / beta = exp(10 v)."""
    background: float = 2e-3
    """Learning rate of all of the background field; confs/base/surroundings.yaml has a higher one."""
    proposals: float = 2e-3
    """Learning rate of proposal networks that are no hash grids (mip-NeRF 360's)."""
    beta2: float = 0.99
    """Decay of the mean of squared gradients per step (Adam's own 0.999 is for long runs)."""
    eps: float = 1e-15
    """Added to Adam's denominator: gradients well below it move little."""
    warmup_steps: int = 100
    """Over these the rates rise."""
    warmup: Literal["linear", "sine"] = "linear"
    """From 1 / warmup_steps in a straight line, or from 1/100 along a quarter of a sine (mip-NeRF 360)."""
    decay: Literal["exponential", "cosine", "constant"] = "exponential"
    """After the warm-up, over the fraction of training done."""
    final_ratio: float = 0.05
    """Learning rate at the end over that at the start."""
    weight_decay: float = 0.0
    """Share of every parameter but the variance's, times its learning rate, that a step takes away (AdamW).

    Of the variance it would pull inv_s towards 1, which has nothing to do with simplicity."""
    clip_norm: float = 0.0
    """Largest norm of the gradient of each group; 0 leaves gradients as they are."""
    skip_untouched: bool = False
    """With fixed buffers: leave what has a gradient of exactly 0 alone (table rows that no sample of the step
    touched; instant-ngp's rule), instead of letting its moments decay and move it on."""

    def __post_init__(self) -> None:
        for key in ("grid", "networks", "variance", "background", "proposals", "clip_norm", "eps"):
            if not 0 <= getattr(self, key) <= 10:
                raise ValueError(f"trainer.optimizer.{key}: must lie in 0..10, got {getattr(self, key)}")
        if self.eps == 0:
            # What has no gradient would be moved by 0 / 0.
            raise ValueError("trainer.optimizer.eps: must be above 0, got 0")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"trainer.optimizer.beta2: must lie in [0, 1), got {self.beta2}")
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"trainer.optimizer.weight_decay: must lie in 0..1, got {self.weight_decay}")
        if not 0 < self.final_ratio <= 1:
            raise ValueError(f"trainer.optimizer.final_ratio: must lie in (0, 1], got {self.final_ratio}")


def parameter_groups(config: OptimizerConfig, model: Model) -> list[Group]:
    """The parameters of a model, by the names of its groups."""
    return [
        parameter_group(
            name, parameters, getattr(config, name), 0.0 if name == "variance" else config.weight_decay
        )
        for name, parameters in model.parameter_groups().items()
    ]


def parameter_group(
    name: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float = 0.0
) -> Group:
    """One of them; ``base_lr`` keeps the rate that warm-up and decay start from."""
    return {
        "params": list(parameters),
        "lr": rate,
        "base_lr": rate,
        "weight_decay": weight_decay,
        "name": name,
    }


def new_adam(config: OptimizerConfig, groups: list[Group]) -> Adam:
    """For buffers of fixed size: takes and skips its steps on the device."""
    return Adam(groups, betas=(0.9, config.beta2), eps=config.eps, skip_untouched=config.skip_untouched)


def new_adamw(config: OptimizerConfig, groups: list[Group]) -> torch.optim.AdamW:
    """For packed buffers: PyTorch's own."""
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), eps=config.eps, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from an optimiser's stored state, with the learning rates and weight decay of now."""
    now = [{key: group[key] for key in ("base_lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rates in zip(optimizer.param_groups, now, strict=True):
        group.update(rates)
