"""The SDF network on the CPU: value, analytic gradient and their joint backward pass, no autograd inside.

With h_0 the encoding, the network and its derivative are two sweeps over the same layers,

    value      z_l = W_l h_{l-1} + b_l     h_l = softplus(z_l)      o = W_o h_n + b_o     sdf = o_0
    gradient   g_n = W_o[0]   u_l = g_l s_l   g_{l-1} = W_l^T u_l   n = J^T g_0     s_l = sigmoid(beta z_l)

and the backward pass walks both in the opposite order (do, dn are the upstream gradients):

    dg_0 = J dn     du_l = W_l dg_{l-1}     dW_l += u_l dg_{l-1}^T     dg_l = du_l s_l     dW_o[0] += dg_n
    dh_n = W_o^T do     dz_l = dh_l s_l + du_l u_l beta (1 - s_l)
    dW_l += dz_l h_{l-1}^T     dh_{l-1} = W_l^T dz_l

In the positions, which only the refinement of cameras asks for, dx = J^T dh_0 + d <g_0, J dn> / dx.
(dh_0 also takes the upstream gradient of the encoding, which is handed on beside o.) The second summand of
dz_l is the second derivative of softplus, s_l' = beta s_l (1 - s_l), times g_l du_l with g_l s_l = u_l. The
table's gradient takes both ends, dh_0 and (g_0, dn), in one pass over the samples. Matrix products are
PyTorch's; everything between two of them is one Numba kernel, because eager PyTorch spends 17 ms on a
softplus of 32768 x 64 numbers that takes 1.5 ms here.
"""

from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from encoder.hashgrid import GridGeometry, encode
from encoder.hashgrid.cpu import features_and_jacobian, mixed_gradient, table_gradient
from models.sdf_network import reference
from utils.padding import zero_padding

_BLOCK = 2048
_LOG2_E = np.float32(1.4426950408889634)


@no_type_check
@njit(parallel=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy", cache=True)
def _softplus_kernel(hidden, slope, beta):
    """Replace z by softplus(z) = log(1 + exp(beta z)) / beta in ``hidden``; ``slope`` gets sigmoid(beta z).

    Both come from e = exp(-beta |z|) in (0, 1], so nothing overflows. exp and log are polynomials because
    calls into the mathematics library would keep the loops from being vectorised; absolute errors are below
    2e-7 (softplus * beta) and 1e-6 (sigmoid).
    """
    flat_hidden = hidden.reshape(-1)
    flat_slope = slope.reshape(-1)
    count = flat_hidden.shape[0]
    for block in prange((count + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        size = min(_BLOCK, count - first)
        mantissa = np.empty(_BLOCK, np.float32)
        bits = np.empty(_BLOCK, np.int32)
        power = bits.view(np.float32)
        for i in range(size):
            # exp(-beta |z|) = 2^k 2^f with integer k and 0 <= f < 1; 2^k is written into the exponent's
            # bits. Below 2^-60 nothing changes in single precision, but products would become subnormal,
            # which slows the processor down twentyfold.
            exponent = max(-beta * _LOG2_E * abs(flat_hidden[first + i]), np.float32(-60.0))
            k = np.floor(exponent)
            f = exponent - k
            # Taylor series of 2^f around 0.5, degree 6.
            r = np.float32(0.6931471805599453) * (f - np.float32(0.5))
            p = np.float32(1.0 / 720.0)
            p = p * r + np.float32(1.0 / 120.0)
            p = p * r + np.float32(1.0 / 24.0)
            p = p * r + np.float32(1.0 / 6.0)
            p = p * r + np.float32(0.5)
            p = p * r + np.float32(1.0)
            p = p * r + np.float32(1.0)
            mantissa[i] = np.float32(1.4142135623730951) * p
            bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
        for i in range(size):
            z = flat_hidden[first + i]
            e = mantissa[i] * power[i]
            # log(1 + e) = 2 artanh(q), q = e / (2 + e) <= 1/3.
            q = e / (np.float32(2.0) + e)
            qq = q * q
            series = np.float32(1.0 / 13.0)
            series = series * qq + np.float32(1.0 / 11.0)
            series = series * qq + np.float32(1.0 / 9.0)
            series = series * qq + np.float32(1.0 / 7.0)
            series = series * qq + np.float32(1.0 / 5.0)
            series = series * qq + np.float32(1.0 / 3.0)
            log1p = np.float32(2.0) * q * (series * qq + np.float32(1.0))
            inverse = np.float32(1.0) / (np.float32(1.0) + e)
            flat_hidden[first + i] = max(z, np.float32(0.0)) + log1p / beta
            flat_slope[first + i] = inverse if z >= np.float32(0.0) else e * inverse


@no_type_check
@njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def _second_order_kernel(d_u, u, slope, beta, d_z):
    """From du, u and s: dg = du s (in place of du) and softplus's second-derivative share of dz."""
    flat_du, flat_u, flat_slope, flat_dz = d_u.reshape(-1), u.reshape(-1), slope.reshape(-1), d_z.reshape(-1)
    count = flat_du.shape[0]
    for block in prange((count + _BLOCK - 1) // _BLOCK):
        for i in range(block * _BLOCK, min((block + 1) * _BLOCK, count)):
            du = flat_du[i]
            s = flat_slope[i]
            flat_dz[i] = du * flat_u[i] * beta * (np.float32(1.0) - s)
            flat_du[i] = du * s


@no_type_check
@njit(parallel=True, fastmath=True, error_model="numpy", cache=True)
def _contract_kernel(jacobian, cotangent, gradient):
    """n = J^T g per sample: (S, 3, W) and (S, W) to (S, 3)."""
    width = cotangent.shape[1]
    for block in prange((cotangent.shape[0] + 255) // 256):
        for s in range(block * 256, min((block + 1) * 256, cotangent.shape[0])):
            for d in range(3):
                total = np.float32(0.0)
                for w in range(width):
                    total += jacobian[s, d, w] * cotangent[s, w]
                gradient[s, d] = total


@no_type_check
@njit(parallel=True, fastmath={"contract"}, error_model="numpy", cache=True)
def _expand_kernel(jacobian, direction, product):
    """dg_0 = J dn per sample: (S, 3, W) and (S, 3) to (S, W)."""
    width = product.shape[1]
    for block in prange((product.shape[0] + 255) // 256):
        for s in range(block * 256, min((block + 1) * 256, product.shape[0])):
            for w in range(width):
                product[s, w] = (
                    jacobian[s, 0, w] * direction[s, 0]
                    + jacobian[s, 1, w] * direction[s, 1]
                    + jacobian[s, 2, w] * direction[s, 2]
                )


def _softplus_layer(hidden: Tensor, weight: Tensor, bias: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """softplus(W h + b) and its slope sigmoid(beta (W h + b))."""
    activated = torch.addmm(bias, hidden, weight.t())
    slope = torch.empty_like(activated)
    _softplus_kernel(activated.numpy(), slope.numpy(), np.float32(beta))
    return activated, slope


class _SoftplusLayer(torch.autograd.Function):
    """softplus(W h + b), differentiable once: the value's half of the two sweeps, by itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor, beta: float) -> Tensor:
        activated, slope = _softplus_layer(hidden, weight, bias, beta)
        ctx.save_for_backward(hidden, weight, slope)
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx, d_activated):  # type: ignore[no-untyped-def]
        hidden, weight, slope = ctx.saved_tensors
        d_z = d_activated * slope
        d_hidden = d_z @ weight if ctx.needs_input_grad[0] else None
        return d_hidden, d_z.t() @ hidden, _column_sums(d_z), None


class _SDFWithGradient(torch.autograd.Function):
    """(positions, table, parameters) -> (outputs, gradient), differentiable once in all of them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        positions: Tensor,
        table: Tensor,
        geometry: GridGeometry,
        active_levels: float | Tensor,
        beta: float,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[0::2], parameters[1::2]
        features, jacobian = features_and_jacobian(positions, table, geometry, active_levels)
        hiddens, slopes = [features], []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            activated, slope = _softplus_layer(hiddens[-1], weight, bias, beta)
            hiddens.append(activated)
            slopes.append(slope)
        outputs = torch.cat([torch.addmm(biases[-1], hiddens[-1], weights[-1].t()), features], dim=1)

        cotangent = weights[-1][0]
        products = []
        for weight, slope in zip(reversed(weights[:-1]), reversed(slopes), strict=True):
            products.append(cotangent * slope)
            cotangent = products[-1] @ weight
        products.reverse()
        gradient = torch.empty_like(positions)
        _contract_kernel(jacobian.numpy(), cotangent.numpy(), gradient.numpy())

        ctx.save_for_backward(positions, table, jacobian, cotangent, *weights, *hiddens, *slopes, *products)
        ctx.geometry, ctx.active_levels, ctx.beta = geometry, active_levels, beta  # type: ignore[attr-defined]
        ctx.num_layers, ctx.features_per_level = len(slopes), table.shape[1]  # type: ignore[attr-defined]
        return outputs, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_gradient):  # type: ignore[no-untyped-def]
        n = ctx.num_layers
        positions, table, jacobian, cotangent, *rest = ctx.saved_tensors
        weights, hiddens, slopes, products = (
            rest[: n + 1],
            rest[n + 1 : 2 * n + 2],
            rest[2 * n + 2 : 3 * n + 2],
            rest[-n:],
        )
        d_gradient, beta = d_gradient.contiguous(), np.float32(ctx.beta)
        num_outputs = len(weights[-1])
        d_outputs, d_features = d_outputs[:, :num_outputs].contiguous(), d_outputs[:, num_outputs:]

        d_weights, d_biases, curvatures = [], [], []
        d_cotangent = torch.empty_like(cotangent)
        _expand_kernel(jacobian.numpy(), d_gradient.numpy(), d_cotangent.numpy())
        for weight, product, slope in zip(weights[:-1], products, slopes, strict=True):
            d_weights.append(product.t() @ d_cotangent)
            d_cotangent = d_cotangent @ weight.t()
            curvature = torch.empty_like(slope)
            _second_order_kernel(d_cotangent.numpy(), product.numpy(), slope.numpy(), beta, curvature.numpy())
            curvatures.append(curvature)
        d_weights.append(d_outputs.t() @ hiddens[-1])
        d_weights[-1][0] += _column_sums(d_cotangent)
        d_biases.append(_column_sums(d_outputs))

        d_hidden = d_outputs @ weights[-1]
        for layer in reversed(range(n)):
            d_z = curvatures[layer].addcmul_(d_hidden, slopes[layer])
            d_weights[layer].addmm_(d_z.t(), hiddens[layer])
            d_biases.insert(0, _column_sums(d_z))
            d_hidden = d_z @ weights[layer]
        d_hidden += d_features
        d_table = table_gradient(
            positions,
            ctx.geometry,
            ctx.active_levels,
            ctx.features_per_level,
            d_hidden,
            cotangent,
            d_gradient,
        )
        d_positions = None
        if ctx.needs_input_grad[0]:
            where = ctx.geometry, ctx.active_levels
            d_positions = mixed_gradient(positions, table, cotangent, d_gradient, *where)
            through_values = torch.empty_like(positions)
            _contract_kernel(jacobian.numpy(), d_hidden.numpy(), through_values.numpy())
            d_positions += through_values
        interleaved = [tensor for pair in zip(d_weights, d_biases, strict=True) for tensor in pair]
        return d_positions, d_table, None, None, None, *interleaved


def _column_sums(matrix: Tensor) -> Tensor:
    # As a matrix product: torch.sum over the long axis of a tall matrix is several times slower.
    return torch.mv(matrix.t(), torch.ones(len(matrix)))


def sdf_with_gradient(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See the package's ``sdf_with_gradient``."""
    parameters = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    positions = zero_padding(positions.contiguous(), count)
    outputs, gradient = _SDFWithGradient.apply(positions, table, geometry, active_levels, beta, *parameters)
    return zero_padding(outputs, count), zero_padding(gradient, count)


def sdf_only(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
) -> Tensor:
    """See the package's ``sdf_only``."""
    with torch.no_grad():
        hidden = encode(zero_padding(positions, count), table, geometry, active_levels, "cpu")
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden, _ = _softplus_layer(hidden, weight, bias, beta)
        sdf = torch.mv(hidden, weights[-1][0]) + biases[-1][0]
        return zero_padding(sdf[:, None], count)[:, 0]


def _network(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], beta: float) -> Tensor:
    """The layers alone, differentiable once."""
    hidden = features
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        hidden = _SoftplusLayer.apply(hidden, weight, bias, beta)
    return torch.addmm(biases[-1], hidden, weights[-1].t())


_ENCODE = partial(encode, backend="cpu")

sdf_outputs = partial(reference.sdf_outputs, encode=_ENCODE, network=_network)
"""See the package's ``sdf_outputs``."""

sdf_values = partial(reference.sdf_values, encode=_ENCODE, network=_network)
"""See the package's ``sdf_values``."""
