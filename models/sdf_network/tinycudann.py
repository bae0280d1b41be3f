"""The SDF network on tiny-cuda-nn's hash grid: its encoding, and PyTorch's layers and autograd around it."""

from functools import partial

from encoder.hashgrid import encode
from models.sdf_network import reference

sdf_with_gradient = partial(reference.sdf_with_gradient, encode=partial(encode, backend="tinycudann"))
"""See the package's ``sdf_with_gradient``."""

sdf_only = partial(reference.sdf_only, encode=partial(encode, backend="tinycudann"))
"""See the package's ``sdf_only``."""

sdf_outputs = partial(reference.sdf_outputs, encode=partial(encode, backend="tinycudann"))
"""See the package's ``sdf_outputs``."""

sdf_values = partial(reference.sdf_values, encode=partial(encode, backend="tinycudann"))
"""See the package's ``sdf_values``."""
