"""The process's global random generators, read and set as one, so that a resumed run repeats exactly."""

import random
from typing import Any

import numpy as np
import torch


def global_random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's generators, in types that checkpoints hold."""
    # Libraries still draw from NumPy's one global generator, which only these legacy functions reach.
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_global_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`global_random_state` read; CUDA's only where there is one."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
