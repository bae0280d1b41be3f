"""The SDF network on a GPU: fused Triton kernels for one and two hidden layers, see ``cuda_kernels.py``.

The backward pass reads positions and parameters and computes the rest again, so that nothing as large as
samples x width is kept for it. Its kernel leaves two matrices (S, W) for the hash grid's own, which scatters
them into the table's gradient: in one kernel with the layers, scattering would have to share their registers.
Other shapes take the reference's way with the hash grid's kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from encoder.hashgrid import GridGeometry, encode
from encoder.hashgrid import cuda as operations
from models.sdf_network import cuda_kernels, reference

_MAX_WIDTH = 64
"""Hidden units and outputs that the kernels take at most: beyond, most of their matrices would spill."""

_ENCODE = partial(encode, backend="cuda")

BLOCK = 32
"""Samples per program: its share of the matrices just fits into the registers of four warps."""
LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 1}
"""One stage: reading ahead for the next block would take shared memory and registers that are all in use."""
SDF_LAUNCH = LAUNCH | {"maxnreg": 128}
"""Without the gradient half of the registers do, and twice the programs hide more of the memory's latency."""
NUM_PROGRAMS = 2 * 132
"""Programs that share the blocks of a backward pass, each with sums of its own: as many as an H100's 132
multiprocessors have registers for. Fixed, so that every GPU sums equal inputs in the same order."""


@dataclass(frozen=True)
class _Operands:
    """What all kernels read, in the order of their arguments."""

    positions: Tensor
    table: Tensor
    active_levels: float | Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    count: Tensor | None
    geometry: GridGeometry
    beta: float

    def arguments(self) -> list[Tensor | float | int | None]:
        """From ``positions`` to ``beta``; the second hidden layer may be missing."""
        grid = self.geometry.on(self.positions.device)
        level_weights = self.geometry.level_weights_on(self.positions.device, self.active_levels)
        has_second = len(self.weights) == 3
        return [
            *(self.positions, self.table, grid.cells, grid.offsets, grid.masks, level_weights),
            *(self.weights[0], self.biases[0]),
            *((self.weights[1], self.biases[1]) if has_second else (None, None)),
            *(self.weights[-1], self.count, len(self.positions), self.geometry.bound, self.beta),
        ]

    def sizes(self) -> dict[str, int]:
        """The kernels' sizes, and what they are padded to."""
        return sizes(
            self.geometry.num_levels, self.table.shape[1], len(self.weights[0]), len(self.weights[-1])
        )


def sizes(levels: int, features: int, hidden: int, outputs: int) -> dict[str, int]:
    """The kernels' constants: sides of matrices are padded to powers of two, and to 16 at least."""
    features_padded = triton.next_power_of_2(features)
    return {
        "LEVELS": levels,
        "FEATURES": features,
        "LEVELS_PADDED": max(triton.next_power_of_2(levels), 16 // features_padded),
        "FEATURES_PADDED": features_padded,
        "HIDDEN": hidden,
        "HIDDEN_PADDED": max(triton.next_power_of_2(hidden), 16),
        "OUTPUTS": outputs,
        "OUTPUTS_PADDED": max(triton.next_power_of_2(outputs), 16),
    }


def _spills(device: torch.device) -> bool:
    """Whether two hidden layers, or more than 32 features, are more than the backward pass has registers for.

    Compiled for Ampere this keeps 10 to 19 KB a thread in local memory, for Hopper under 3 KB.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9


def _is_fused(table: Tensor, geometry: GridGeometry, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels take a network of this shape."""
    hidden, outputs = len(weights[0]), len(weights[-1])
    padded = sizes(geometry.num_levels, table.shape[1], hidden, outputs)
    max_layers, max_features = (1, 32) if _spills(table.device) else (2, 64)
    return (
        len(weights) - 1 in range(1, max_layers + 1)
        and all(len(weight) == hidden for weight in weights[:-1])
        and max(hidden, outputs) <= _MAX_WIDTH
        and padded["LEVELS_PADDED"] * padded["FEATURES_PADDED"] <= max_features
    )


class _SDFWithGradient(torch.autograd.Function):
    """(positions, table, parameters) -> (outputs, gradient), differentiable once in table and parameters."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        positions: Tensor,
        table: Tensor,
        active_levels: float | Tensor,
        geometry: GridGeometry,
        beta: float,
        count: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[0::2], parameters[1::2]
        entries = table.half() if geometry.reads_half else table
        operands = _Operands(positions, entries, active_levels, weights, biases, count, geometry, beta)
        num_outputs = len(weights[-1]) + weights[0].shape[1]
        # The kernel leaves padding as it finds it.
        allocate = positions.new_empty if count is None else positions.new_zeros
        outputs, gradient = allocate(len(positions), num_outputs), allocate(len(positions), 3)
        grid = (triton.cdiv(len(positions), BLOCK),)
        if len(positions) > 0:
            cuda_kernels.forward_kernel[grid](
                *operands.arguments(),
                biases[-1],
                outputs,
                gradient,
                **operands.sizes(),
                **LAUNCH,
            )
        ctx.save_for_backward(positions, entries, count, *parameters)  # type: ignore[arg-type]
        ctx.geometry, ctx.active_levels, ctx.beta = geometry, active_levels, beta  # type: ignore[attr-defined]
        return outputs, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_gradient):  # type: ignore[no-untyped-def]
        positions, entries, count, *parameters = ctx.saved_tensors
        weights, biases = tuple(parameters[0::2]), tuple(parameters[1::2])
        operands = _Operands(
            *(positions, entries, ctx.active_levels, weights, biases, count, ctx.geometry, ctx.beta)
        )
        d_gradient = d_gradient.contiguous()
        numbers = [parameter.numel() for parameter in parameters]
        num_programs = min(triton.cdiv(len(positions), BLOCK), NUM_PROGRAMS)
        shares = positions.new_empty(num_programs, sum(numbers))
        cotangents = positions.new_empty(2, len(positions), weights[0].shape[1])
        if num_programs > 0:
            cuda_kernels.backward_kernel[(num_programs,)](
                *operands.arguments(),
                d_outputs.contiguous(),
                d_gradient,
                cotangents,
                shares,
                **operands.sizes(),
                **LAUNCH,
            )
        d_table = operations.table_gradient(
            *(positions, ctx.geometry, ctx.active_levels, entries.shape[1]),
            *(cotangents[0], cotangents[1], d_gradient, count),
        )
        summed = shares.sum(dim=0).split(numbers)
        d_parameters = [flat.view_as(p) for flat, p in zip(summed, parameters, strict=True)]
        return None, d_table, None, None, None, None, *d_parameters


def sdf_with_gradient(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package's ``sdf_with_gradient``."""
    # The kernels leave out what positions would need; only cameras that are refined ask for it.
    if positions.requires_grad or not _is_fused(table, geometry, weights):
        return reference.sdf_with_gradient(
            *(positions, table, geometry, active_levels, weights, biases, beta, count),
            encode=_ENCODE,
        )
    parameters = [tensor.contiguous() for pair in zip(weights, biases, strict=True) for tensor in pair]
    return _SDFWithGradient.apply(
        positions.contiguous(), table.contiguous(), active_levels, geometry, beta, count, *parameters
    )


def sdf_only(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None,
) -> Tensor:
    """See the package's ``sdf_only``."""
    if not _is_fused(table, geometry, weights):
        return reference.sdf_only(
            *(positions, table, geometry, active_levels, weights, biases, beta, count),
            encode=_ENCODE,
        )
    with torch.no_grad():
        operands = _Operands(
            positions.contiguous(),
            (table.half() if geometry.reads_half else table).contiguous(),
            active_levels,
            tuple(weight.contiguous() for weight in weights),
            tuple(bias.contiguous() for bias in biases),
            count,
            geometry,
            beta,
        )
        sdf = positions.new_empty(len(positions))
        if len(positions) > 0:
            padded = operands.sizes()
            del padded["OUTPUTS"], padded["OUTPUTS_PADDED"]
            cuda_kernels.sdf_kernel[(triton.cdiv(len(positions), BLOCK),)](
                *operands.arguments(), operands.biases[-1], sdf, **padded, **SDF_LAUNCH
            )
        return sdf


sdf_outputs = partial(reference.sdf_outputs, encode=_ENCODE)
"""See the package's ``sdf_outputs``."""

sdf_values = partial(reference.sdf_values, encode=_ENCODE)
"""See the package's ``sdf_values``."""
