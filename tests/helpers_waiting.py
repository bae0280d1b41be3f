"""What must not happen in a step on a GPU: the host waiting for it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Raises at operations for which a host waits for the device, or whose result's shape hangs on data."""

    FORBIDDEN = (
        *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"),
        *("unique", "_unique2", "repeat_interleave.Tensor", "bincount", "allclose"),
        # What torch.tensor(numbers) does at last; on a GPU it copies them from the host.
        *("lift_fresh", "lift"),
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert name not in self.FORBIDDEN, name
        assert name.partition(".")[0] not in self.FORBIDDEN, name
        if name in ("index.Tensor", "index_put_.default", "index_put.default", "_index_put_impl_.default"):
            indices = [index for index in args[1] if index is not None]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in indices), name
        return func(*args, **(kwargs or {}))
