"""Which implementation serves each operation of a model: chosen once, when the model is built."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from encoder import hashgrid
from models import compositing, marching, mlp, sdf_network
from utils.backend import resolve_backend
from utils.errors import BackendError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """The implementation's name for each operation."""

    hash_grid: str
    sdf_network: str
    network: str
    """Of colours and densities: small ReLU networks."""
    marching: str
    compositing: str

    @classmethod
    def all(cls, name: str) -> "Backends":
        """The same name for every operation."""
        return cls(*[name] * len(fields(cls)))

    @property
    def waits(self) -> bool:
        """Whether some operation makes the host wait for a GPU, so that its steps cannot be recorded.

        nerfacc does, plain PyTorch does here and there; of tiny-cuda-nn it is not known.
        """
        return not {getattr(self, field.name) for field in fields(self)} <= {"cpu", "cuda"}


_PACKAGES: dict[str, ModuleType] = {
    "hash_grid": hashgrid,
    "sdf_network": sdf_network,
    "network": mlp,
    "marching": marching,
    "compositing": compositing,
}


def _known_to(package: ModuleType) -> dict[str, Callable[[torch.device], str | None]]:
    """Every implementation of an operation, those of optional libraries last: name -> check."""
    return package.IMPLEMENTATIONS | getattr(package, "OPTIONAL", {})


def choose_backends(requested: str, device: torch.device) -> Backends:
    """Choose the implementations and log each choice with its reason.

    Args:
        requested: ``auto``; one of ours (``cpu``, ``cuda``, ``reference``) for every operation; or an
            optional library (``nerfacc``, ``tinycudann``, both as ``nerfacc+tinycudann``), which serves the
            operations that it has, the others being chosen as by ``auto``.
        device: where the model will live.

    Raises:
        BackendError: a name is unknown, or what it names cannot run here.
    """
    wishes = requested.split("+")
    known = {name for package in _PACKAGES.values() for name in _known_to(package)}
    libraries = {name for package in _PACKAGES.values() for name in getattr(package, "OPTIONAL", {})}
    unknown = [wish for wish in wishes if wish != "auto" and wish not in known]
    if unknown or (len(wishes) > 1 and not set(wishes) <= libraries):
        raise BackendError(
            "model.backend",
            f"{requested!r} is not understood",
            f"give auto, one of {', '.join(sorted(known))}, or libraries joined by + "
            f"({'+'.join(sorted(libraries))})",
        )
    chosen = {}
    for operation, package in _PACKAGES.items():
        wish = next((wish for wish in wishes if wish in _known_to(package)), "auto")
        checks = package.IMPLEMENTATIONS if wish == "auto" else _known_to(package)
        bound = {name: functools.partial(check, device) for name, check in checks.items()}
        title = operation.replace("_", " ")
        chosen[operation], reason = resolve_backend(title, wish, bound, device)
        log.info("%s: backend %s (%s)", title, chosen[operation], reason)
    return Backends(**chosen)
