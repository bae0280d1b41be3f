"""Groups of parameters with rates of their own, and what of an optimiser's state a resumed run takes over."""

import pytest
import torch
from tiny import tiny_config, tiny_model

from systems.optimizer import (
    OptimizerConfig,
    new_adam,
    new_adamw,
    parameter_group,
    parameter_groups,
    restore_optimizer,
)


def test_an_optimiser_needs_a_little_in_its_denominator() -> None:
    with pytest.raises(ValueError, match=r"trainer\.optimizer\.eps: must be above 0, got 0"):
        OptimizerConfig(eps=0.0)


def test_every_parameter_is_in_one_group_with_its_rate() -> None:
    model = tiny_model(tiny_config("model.background.enabled=true"))
    config = OptimizerConfig(grid=0.1, networks=0.2, variance=0.3, background=0.4, weight_decay=0.01)
    groups = parameter_groups(config, model)
    rates = {group["name"]: (group["lr"], group["base_lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "grid": (0.1, 0.1, 0.01),
        "networks": (0.2, 0.2, 0.01),
        "variance": (0.3, 0.3, 0.0),
        "background": (0.4, 0.4, 0.01),
    }
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [new_adam, new_adamw])
def test_moments_go_on_and_rates_are_those_of_now(make: type) -> None:
    config = OptimizerConfig(beta2=0.9, eps=1e-8)
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    old = make(config, [parameter_group("networks", [first], 0.1, 0.01)])
    assert old.param_groups[0]["betas"] == (0.9, 0.9)
    first.grad = torch.tensor([1.0, 2.0, 3.0])
    old.step(*([torch.tensor(True)] if make is new_adam else []))
    new = make(config, [parameter_group("networks", [second], 0.5, 0.02)])
    restore_optimizer(new, old.state_dict())
    (group,) = new.param_groups
    assert (group["base_lr"], group["weight_decay"]) == (0.5, 0.02)
    assert torch.equal(new.state[second]["exp_avg"], old.state[first]["exp_avg"])
    assert new.state[second]["exp_avg"].any()
