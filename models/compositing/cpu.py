"""Packed alpha compositing on the CPU: a Numba thread walks whole rays, so each sum's order is fixed.

Rows from ``offsets[-1]`` on belong to no ray and get zeros.
"""

from typing import no_type_check

import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _weights_kernel(alpha, offsets, weights, transmittance):
    """w_i = T_i a_i with T_i = prod_{j < i} (1 - a_j)."""
    for ray in prange(offsets.shape[0] - 1):
        remaining = alpha.dtype.type(1.0)
        for i in range(offsets[ray], offsets[ray + 1]):
            transmittance[i] = remaining
            weights[i] = remaining * alpha[i]
            remaining *= alpha.dtype.type(1.0) - alpha[i]


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _weights_backward_kernel(alpha, transmittance, offsets, d_weights, d_alpha):
    """dL/da_i = T_i (dw_i - G_i), G_i = sum_{j > i} dw_j a_j prod_{i < k < j} (1 - a_k).

    G runs backwards as G_{i-1} = dw_i a_i + (1 - a_i) G_i, which never divides by 1 - a: opaque samples
    are no special case.
    """
    for ray in prange(offsets.shape[0] - 1):
        behind = alpha.dtype.type(0.0)
        for i in range(offsets[ray + 1] - 1, offsets[ray] - 1, -1):
            d_alpha[i] = transmittance[i] * (d_weights[i] - behind)
            behind = d_weights[i] * alpha[i] + (alpha.dtype.type(1.0) - alpha[i]) * behind


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _accumulate_kernel(weights, values, offsets, sums):
    for ray in prange(offsets.shape[0] - 1):
        for i in range(offsets[ray], offsets[ray + 1]):
            for c in range(values.shape[1]):
                sums[ray, c] += weights[i] * values[i, c]


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _accumulate_backward_kernel(weights, values, offsets, d_sums, d_weights, d_values):
    for ray in prange(offsets.shape[0] - 1):
        for i in range(offsets[ray], offsets[ray + 1]):
            total = weights.dtype.type(0.0)
            for c in range(values.shape[1]):
                total += d_sums[ray, c] * values[i, c]
                d_values[i, c] = d_sums[ray, c] * weights[i]
            d_weights[i] = total


def _blank(like: Tensor, offsets: Tensor) -> Tensor:
    """Memory for a result: only the padding has been written."""
    blank = torch.empty_like(like)
    blank[int(offsets[-1]) :] = 0
    return blank


class _RenderWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, alpha: Tensor, offsets: Tensor) -> Tensor:
        alpha = alpha.contiguous()
        weights, transmittance = _blank(alpha, offsets), torch.empty_like(alpha)
        _weights_kernel(alpha.detach().numpy(), offsets.numpy(), weights.numpy(), transmittance.numpy())
        ctx.save_for_backward(alpha, transmittance, offsets)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights):  # type: ignore[no-untyped-def]
        alpha, transmittance, offsets = ctx.saved_tensors
        d_alpha = _blank(alpha, offsets)
        _weights_backward_kernel(
            alpha.detach().numpy(),
            transmittance.numpy(),
            offsets.numpy(),
            d_weights.contiguous().numpy(),
            d_alpha.numpy(),
        )
        return d_alpha, None


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        weights, values = weights.contiguous(), values.contiguous()
        sums = torch.zeros(len(offsets) - 1, values.shape[1], dtype=values.dtype)
        _accumulate_kernel(weights.detach().numpy(), values.detach().numpy(), offsets.numpy(), sums.numpy())
        ctx.save_for_backward(weights, values, offsets)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums):  # type: ignore[no-untyped-def]
        weights, values, offsets = ctx.saved_tensors
        d_weights, d_values = _blank(weights, offsets), _blank(values, offsets)
        _accumulate_backward_kernel(
            weights.detach().numpy(),
            values.detach().numpy(),
            offsets.numpy(),
            d_sums.contiguous().numpy(),
            d_weights.numpy(),
            d_values.numpy(),
        )
        return d_weights, d_values, None


def render_weights(alpha: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``render_weights``."""
    return _RenderWeights.apply(alpha, offsets)


def accumulate(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``accumulate``."""
    return _Accumulate.apply(weights, values, offsets)
