"""Packed alpha compositing on CUDA: one warp a ray, a block of its samples at a time.

Both directions are scans along a ray: the transmittance a running product from its start, the gradient a
linear recurrence from its end. A lane reads what its neighbour contributes, so that a scan over the lanes
leaves the lane's own sample out; what a block hands to the next one is a single number.

    forward    lane of sample i multiplies 1 - a_{i-1}           product over lanes = T_i
    backward   lane of sample i applies the step of sample i+1   chain over lanes = G_i

No sum's order depends on timing. Rows from ``offsets[-1]`` on belong to no ray and get zeros.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_BLOCK = 32
"""Samples of a ray at a time: few rays have more, and each lane of a warp has one."""

_MAX_CHANNELS = 16
"""Values of a sample at a time."""


@no_type_check
@triton.jit
def _weights_kernel(alpha, offsets, weights, transmittance, BLOCK: tl.constexpr):
    """w_i = T_i a_i with T_i = prod_{j < i} (1 - a_j)."""
    ray = tl.program_id(0)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    lane = tl.arange(0, BLOCK)
    light = tl.full((), 1.0, alpha.dtype.element_ty)  # T of the sample before `start`
    for start in range(first, end, BLOCK):
        row = start + lane
        is_row = row < end
        opacity = tl.load(alpha + row, mask=is_row, other=0.0)
        before = tl.load(alpha + row - 1, mask=is_row & (row > first), other=0.0)
        remaining = light * tl.cumprod(1.0 - before, 0)
        tl.store(transmittance + row, remaining, mask=is_row)
        tl.store(weights + row, remaining * opacity, mask=is_row)
        light = tl.sum(tl.where(lane == BLOCK - 1, remaining, 0.0), 0)


@no_type_check
@triton.jit
def _chain(added, factor, next_added, next_factor):
    """x -> next_added + next_factor * (added + factor * x)."""
    return next_added + next_factor * added, next_factor * factor


@no_type_check
@triton.jit
def _weights_backward_kernel(alpha, transmittance, offsets, d_weights, d_alpha, BLOCK: tl.constexpr):
    """dL/da_i = T_i (dw_i - G_i), G_i = sum_{j > i} dw_j a_j prod_{i < k < j} (1 - a_k).

    G runs backwards as G_{i-1} = dw_i a_i + (1 - a_i) G_i, which never divides by 1 - a: opaque samples
    are no special case. Lane 0 has a block's last sample.
    """
    ray = tl.program_id(0)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    lane = tl.arange(0, BLOCK)
    behind = tl.zeros((), alpha.dtype.element_ty)  # G of the sample after this block's last one
    for done in range(0, end - first, BLOCK):
        row = end - 1 - done - lane
        is_row = row >= first
        has_next = is_row & (row + 1 < end)
        opacity_next = tl.load(alpha + row + 1, mask=has_next, other=0.0)
        d_next = tl.load(d_weights + row + 1, mask=has_next, other=0.0)
        d_weight = tl.load(d_weights + row, mask=is_row, other=0.0)
        remaining = tl.load(transmittance + row, mask=is_row, other=0.0)
        added, factor = tl.associative_scan((d_next * opacity_next, 1.0 - opacity_next), 0, _chain)
        hidden = added + factor * behind
        tl.store(d_alpha + row, remaining * (d_weight - hidden), mask=is_row)
        behind = tl.sum(tl.where(lane == BLOCK - 1, hidden, 0.0), 0)


@no_type_check
@triton.jit
def _accumulate_kernel(
    weights, values, offsets, sums, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    ray = tl.program_id(0)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    for channel in range(0, CHANNELS, BLOCK_C):
        column = channel + tl.arange(0, BLOCK_C)
        is_column = column < CHANNELS
        total = tl.zeros((BLOCK, BLOCK_C), weights.dtype.element_ty)
        for start in range(first, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            is_row = row < end
            weight = tl.load(weights + row, mask=is_row, other=0.0)
            is_value = is_row[:, None] & is_column[None, :]
            cell = row[:, None] * CHANNELS + column[None, :]
            total += weight[:, None] * tl.load(values + cell, mask=is_value, other=0.0)
        tl.store(sums + ray.to(tl.int64) * CHANNELS + column, tl.sum(total, 0), mask=is_column)


@no_type_check
@triton.jit
def _accumulate_backward_kernel(
    weights,
    values,
    offsets,
    d_sums,
    d_weights,
    d_values,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dL/dw_i = dL/dsum . v_i and dL/dv_i = w_i dL/dsum."""
    ray = tl.program_id(0)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        is_row = row < end
        weight = tl.load(weights + row, mask=is_row, other=0.0)
        total = tl.zeros((BLOCK,), weights.dtype.element_ty)
        for channel in range(0, CHANNELS, BLOCK_C):
            column = channel + tl.arange(0, BLOCK_C)
            is_column = column < CHANNELS
            d_sum = tl.load(d_sums + ray.to(tl.int64) * CHANNELS + column, mask=is_column, other=0.0)
            is_value = is_row[:, None] & is_column[None, :]
            cell = row[:, None] * CHANNELS + column[None, :]
            value = tl.load(values + cell, mask=is_value, other=0.0)
            total += tl.sum(d_sum[None, :] * value, 1)
            tl.store(d_values + cell, d_sum[None, :] * weight[:, None], mask=is_value)
        tl.store(d_weights + row, total, mask=is_row)


class _RenderWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, alpha: Tensor, offsets: Tensor) -> Tensor:
        alpha = alpha.contiguous()
        weights, transmittance = torch.zeros_like(alpha), torch.empty_like(alpha)
        _weights_kernel[(len(offsets) - 1,)](
            alpha, offsets, weights, transmittance, BLOCK=_BLOCK, num_warps=1
        )
        ctx.save_for_backward(alpha, transmittance, offsets)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights):  # type: ignore[no-untyped-def]
        alpha, transmittance, offsets = ctx.saved_tensors
        d_alpha = torch.zeros_like(alpha)
        _weights_backward_kernel[(len(offsets) - 1,)](
            *(alpha, transmittance, offsets, d_weights.contiguous(), d_alpha), BLOCK=_BLOCK, num_warps=1
        )
        return d_alpha, None


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        weights, values = weights.contiguous(), values.contiguous()
        sums = values.new_empty(len(offsets) - 1, values.shape[1])
        _accumulate_kernel[(len(sums),)](weights, values, offsets, sums, **_tile(values))
        ctx.save_for_backward(weights, values, offsets)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums):  # type: ignore[no-untyped-def]
        weights, values, offsets = ctx.saved_tensors
        d_weights, d_values = torch.zeros_like(weights), torch.zeros_like(values)
        _accumulate_backward_kernel[(len(d_sums),)](
            *(weights, values, offsets, d_sums.contiguous(), d_weights, d_values), **_tile(values)
        )
        return d_weights, d_values, None


def _tile(values: Tensor) -> dict[str, int]:
    """How a kernel cuts (S, C) values into blocks."""
    channels = values.shape[1]
    block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
    return {"CHANNELS": channels, "BLOCK": _BLOCK, "BLOCK_C": block, "num_warps": 1}


def render_weights(alpha: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``render_weights``."""
    return _RenderWeights.apply(alpha, offsets)


def accumulate(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``accumulate``."""
    return _Accumulate.apply(weights, values, offsets)
