"""Small ReLU networks as two Triton kernels: all layers forward, and all layers backward.

A program takes a block of rows through every layer, so that hidden activations live in registers and shared
memory alone: nothing as large as rows x hidden width is written. The backward pass computes them again from
the inputs. Programs are persistent: each walks over many blocks and sums the parameters' gradients on its
multiprocessor; the programs' sums are added up in a fixed order, so that equal inputs give equal gradients.

Matrix units want sides that are powers of two, at least 16. Inputs are split in two, columns ``0:HEAD`` and
the rest, padded to ``TAIL``: 70 inputs cost as much as 64 + 16. Outputs are padded to 16.

All parameters travel in one vector, each weight matrix row-major and followed by its biases, and so do their
gradients, one such vector per program: ::

    | W_1 (HIDDEN x INPUTS) | b_1 | W_2 (HIDDEN x HIDDEN) | b_2 | ... | W_out (OUTPUTS x HIDDEN) | b_out |
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.mlp import reference
from utils.backend import is_interpreted

ROWS = 64
"""Rows of a block."""
NUM_WARPS = 4
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 4, 2
"""Programs that a multiprocessor holds at a time; registers are what limits them."""

_LEAST = tl.constexpr(16)
"""Least side of a matrix in ``tl.dot``; outputs, of which there may be so many, are padded to it."""
_IS_INTERPRETED = tl.constexpr(is_interpreted())
"""Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""


# ---- matrices: in and out of memory, and multiplied --------------------------------------------------------


@no_type_check
@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32; factors are rounded to bfloat16 or TF32, or split into what TF32 can hold."""
    if PRECISION == "bfloat16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if _IS_INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b)
    elif PRECISION == "tf32":
        product = tl.dot(a, b, input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision="tf32x3")
    return product


@no_type_check
@triton.jit
def _read(
    matrix, height, COLUMNS: tl.constexpr, FIRST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Columns ``FIRST:FIRST + WIDTH`` of ``height`` rows of ``COLUMNS`` numbers; zeros beyond either."""
    row, column = tl.arange(0, HEIGHT)[:, None], FIRST + tl.arange(0, WIDTH)[None, :]
    return tl.load(matrix + row * COLUMNS + column, mask=(row < height) & (column < COLUMNS), other=0.0)


@no_type_check
@triton.jit
def _write(matrix, tile, height, COLUMNS: tl.constexpr, FIRST: tl.constexpr):
    """The opposite of ``_read``."""
    row, column = tl.arange(0, tile.shape[0])[:, None], FIRST + tl.arange(0, tile.shape[1])[None, :]
    tl.store(matrix + row * COLUMNS + column, tile, mask=(row < height) & (column < COLUMNS))


@no_type_check
@triton.jit
def _relu(sums):
    """As in PyTorch NaN stays NaN, so that a bad step is noticed."""
    return tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)


@no_type_check
@triton.jit
def _first_layer(
    rows,
    parameters,
    height,
    INPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """relu(W_1 x + b_1) of ``height`` rows."""
    weight = _read(parameters, HIDDEN, INPUTS, 0, HIDDEN, HEAD)
    sums = _dot(_read(rows, height, INPUTS, 0, ROWS, HEAD), tl.trans(weight), PRECISION)
    if TAIL > 0:
        weight = _read(parameters, HIDDEN, INPUTS, HEAD, HIDDEN, TAIL)
        sums += _dot(_read(rows, height, INPUTS, HEAD, ROWS, TAIL), tl.trans(weight), PRECISION)
    bias = tl.load(parameters + HIDDEN * INPUTS + tl.arange(0, HIDDEN))
    return _relu(sums + bias[None, :])


@no_type_check
@triton.jit
def _next_layer(hidden, parameters, HIDDEN: tl.constexpr, PRECISION: tl.constexpr):
    """relu(W h + b), with ``parameters`` pointing at W."""
    weight = _read(parameters, HIDDEN, HIDDEN, 0, HIDDEN, HIDDEN)
    bias = tl.load(parameters + HIDDEN * HIDDEN + tl.arange(0, HIDDEN))
    return _relu(_dot(hidden, tl.trans(weight), PRECISION) + bias[None, :])


@no_type_check
@triton.jit
def _num_real(count, num_rows):
    """Rows that are not padding; ``count`` points at their number or is ``None``."""
    num_real = num_rows
    if count is not None:
        num_real = tl.minimum(tl.load(count), num_rows).to(tl.int32)
    return num_real


# ---- forward ----------------------------------------------------------------------------------------------


@no_type_check
@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    inputs,
    parameters,
    outputs,
    count,
    num_rows,
    INPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of all rows, zeros for padding."""
    num_real = _num_real(count, num_rows)
    parameters_2 = parameters + HIDDEN * (INPUTS + 1)
    parameters_3 = parameters_2 + HIDDEN * (HIDDEN + 1)
    parameters_out = parameters_2 + (LAYERS - 1) * HIDDEN * (HIDDEN + 1)
    num_blocks, num_real_blocks = tl.cdiv(num_rows, ROWS), tl.cdiv(num_real, ROWS)

    # Not pipelined: the weights, too, would get several buffers, and other programs hide the latency.
    for block in tl.range(tl.program_id(0), num_real_blocks, tl.num_programs(0), num_stages=1):
        height = num_real - block * ROWS
        start = tl.full((), ROWS, tl.int64) * block
        rows = inputs + start * INPUTS
        hidden = _first_layer(rows, parameters, height, INPUTS, HEAD, TAIL, HIDDEN, ROWS, PRECISION)
        if LAYERS > 1:
            hidden = _next_layer(hidden, parameters_2, HIDDEN, PRECISION)
        if LAYERS > 2:
            hidden = _next_layer(hidden, parameters_3, HIDDEN, PRECISION)
        weight = _read(parameters_out, OUTPUTS, HIDDEN, 0, _LEAST, HIDDEN)
        output = tl.arange(0, _LEAST)
        bias = tl.load(parameters_out + OUTPUTS * HIDDEN + output, mask=output < OUTPUTS, other=0.0)
        result = _dot(hidden, tl.trans(weight), PRECISION) + bias[None, :]
        result = tl.where((tl.arange(0, ROWS) < height)[:, None], result, 0.0)
        _write(outputs + start * OUTPUTS, result, num_rows - block * ROWS, OUTPUTS, 0)

    for block in tl.range(num_real_blocks + tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=1):
        nothing = tl.zeros((ROWS, _LEAST), tl.float32)
        _write(
            outputs + tl.full((), ROWS * OUTPUTS, tl.int64) * block,
            nothing,
            num_rows - block * ROWS,
            OUTPUTS,
            0,
        )


# ---- backward ---------------------------------------------------------------------------------------------


@no_type_check
@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(  # noqa: C901 - its branches are settled when it is compiled
    inputs,
    parameters,
    d_outputs,
    d_inputs,
    d_parameters,
    count,
    num_rows,
    INPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients: of the inputs (unless ``d_inputs`` is ``None``), and this program's part of the parameters'.

    With z_k = W_k h_{k-1} + b_k, h_k = relu(z_k), h_0 the inputs and D_k = d loss / d z_k, a row each: ::

        dW_k = D_k^T h_{k-1}    db_k = sum of D_k    D_{k-1} = D_k W_k where h_{k-1} > 0, else 0
    """
    num_real = _num_real(count, num_rows)
    parameters_2 = parameters + HIDDEN * (INPUTS + 1)
    parameters_3 = parameters_2 + HIDDEN * (HIDDEN + 1)
    parameters_out = parameters_2 + (LAYERS - 1) * HIDDEN * (HIDDEN + 1)
    num_blocks, num_real_blocks = tl.cdiv(num_rows, ROWS), tl.cdiv(num_real, ROWS)
    unit, output = tl.arange(0, HIDDEN), tl.arange(0, _LEAST)

    # This program's sums. Those of the weights stay in registers to the end. Those of the biases would be
    # held by every warp again, so they are added up in memory: by whoever has the numbers, hence atomically,
    # yet always in the same order.
    part = d_parameters + tl.program_id(0).to(tl.int64) * (
        HIDDEN * (INPUTS + 1) + (LAYERS - 1) * HIDDEN * (HIDDEN + 1) + OUTPUTS * (HIDDEN + 1)
    )
    part_2 = part + HIDDEN * (INPUTS + 1)
    part_3 = part_2 + HIDDEN * (HIDDEN + 1)
    part_out = part_2 + (LAYERS - 1) * HIDDEN * (HIDDEN + 1)
    db_1, db_2, db_3 = part + HIDDEN * INPUTS, part_2 + HIDDEN * HIDDEN, part_3 + HIDDEN * HIDDEN
    db_out = part_out + OUTPUTS * HIDDEN
    dw_head = tl.zeros((HIDDEN, HEAD), tl.float32)
    tl.store(db_1 + unit, tl.zeros((HIDDEN,), tl.float32))
    if TAIL > 0:
        dw_tail = tl.zeros((HIDDEN, TAIL), tl.float32)
    if LAYERS > 1:
        dw_2 = tl.zeros((HIDDEN, HIDDEN), tl.float32)
        tl.store(db_2 + unit, tl.zeros((HIDDEN,), tl.float32))
    if LAYERS > 2:
        dw_3 = tl.zeros((HIDDEN, HIDDEN), tl.float32)
        tl.store(db_3 + unit, tl.zeros((HIDDEN,), tl.float32))
    # Transposed, because matrix units like the first side to be the long one.
    dw_out = tl.zeros((HIDDEN, _LEAST), tl.float32)
    tl.store(db_out + output, tl.zeros((_LEAST,), tl.float32), mask=output < OUTPUTS)
    tl.debug_barrier()

    for block in tl.range(tl.program_id(0), num_real_blocks, tl.num_programs(0), num_stages=1):
        height = num_real - block * ROWS
        start = tl.full((), ROWS, tl.int64) * block
        rows = inputs + start * INPUTS
        hidden_1 = _first_layer(rows, parameters, height, INPUTS, HEAD, TAIL, HIDDEN, ROWS, PRECISION)
        last = hidden_1
        if LAYERS > 1:
            hidden_2 = _next_layer(hidden_1, parameters_2, HIDDEN, PRECISION)
            last = hidden_2
        if LAYERS > 2:
            last = _next_layer(hidden_2, parameters_3, HIDDEN, PRECISION)

        # From here on the weights and the rows are read again (from the cache): the atomic additions keep the
        # compiler from holding on to what it has read above, for which there are no registers.
        slope = _read(d_outputs + start * OUTPUTS, height, OUTPUTS, 0, ROWS, _LEAST)
        dw_out += _dot(tl.trans(last), slope, PRECISION)
        tl.atomic_add(db_out + output, tl.sum(slope, axis=0), mask=output < OUTPUTS, sem="relaxed")
        weight = _read(parameters_out, OUTPUTS, HIDDEN, 0, _LEAST, HIDDEN)
        slope = tl.where(last > 0.0, _dot(slope, weight, PRECISION), 0.0)
        if LAYERS > 2:
            dw_3 += _dot(tl.trans(slope), hidden_2, PRECISION)
            tl.atomic_add(db_3 + unit, tl.sum(slope, axis=0), sem="relaxed")
            weight = _read(parameters_3, HIDDEN, HIDDEN, 0, HIDDEN, HIDDEN)
            slope = tl.where(hidden_2 > 0.0, _dot(slope, weight, PRECISION), 0.0)
        if LAYERS > 1:
            dw_2 += _dot(tl.trans(slope), hidden_1, PRECISION)
            tl.atomic_add(db_2 + unit, tl.sum(slope, axis=0), sem="relaxed")
            weight = _read(parameters_2, HIDDEN, HIDDEN, 0, HIDDEN, HIDDEN)
            slope = tl.where(hidden_1 > 0.0, _dot(slope, weight, PRECISION), 0.0)
        dw_head += _dot(tl.trans(slope), _read(rows, height, INPUTS, 0, ROWS, HEAD), PRECISION)
        if TAIL > 0:
            dw_tail += _dot(tl.trans(slope), _read(rows, height, INPUTS, HEAD, ROWS, TAIL), PRECISION)
        tl.atomic_add(db_1 + unit, tl.sum(slope, axis=0), sem="relaxed")
        if d_inputs is not None:
            # Rows of padding have no slope, so what they get is zero.
            d_rows, all_rows = d_inputs + start * INPUTS, num_rows - block * ROWS
            weight = _read(parameters, HIDDEN, INPUTS, 0, HIDDEN, HEAD)
            _write(d_rows, _dot(slope, weight, PRECISION), all_rows, INPUTS, 0)
            if TAIL > 0:
                weight = _read(parameters, HIDDEN, INPUTS, HEAD, HIDDEN, TAIL)
                _write(d_rows, _dot(slope, weight, PRECISION), all_rows, INPUTS, HEAD)

    if d_inputs is not None:
        for block in tl.range(
            num_real_blocks + tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=1
        ):
            d_rows, all_rows = (
                d_inputs + tl.full((), ROWS * INPUTS, tl.int64) * block,
                num_rows - block * ROWS,
            )
            _write(d_rows, tl.zeros((ROWS, HEAD), tl.float32), all_rows, INPUTS, 0)
            if TAIL > 0:
                _write(d_rows, tl.zeros((ROWS, TAIL), tl.float32), all_rows, INPUTS, HEAD)

    _write(part, dw_head, HIDDEN, INPUTS, 0)
    if TAIL > 0:
        _write(part, dw_tail, HIDDEN, INPUTS, HEAD)
    if LAYERS > 1:
        _write(part_2, dw_2, HIDDEN, HIDDEN, 0)
    if LAYERS > 2:
        _write(part_3, dw_3, HIDDEN, HIDDEN, 0)
    _write(part_out, tl.trans(dw_out), OUTPUTS, HIDDEN, 0)


# ---- around the kernels ------------------------------------------------------------------------------------


def kernel_sizes(num_inputs: int, hidden_widths: Sequence[int], num_outputs: int) -> dict[str, int] | None:
    """The kernels' constants for a network; ``None`` where they do not cover it.

    Wider layers would not leave enough registers: libraries for large matrices do well there.
    """
    is_covered = (
        1 <= num_inputs <= 128
        and 1 <= len(hidden_widths) <= 3
        and len(set(hidden_widths)) == 1
        and hidden_widths[0] in (16, 32, 64)
        and 1 <= num_outputs <= 16
    )
    if not is_covered:
        return None
    head = min(64, max(16, 2 ** (num_inputs.bit_length() - 1)))
    rest = num_inputs - head
    return {
        "INPUTS": num_inputs,
        "HEAD": head,
        "TAIL": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0,
        "HIDDEN": hidden_widths[0],
        "LAYERS": len(hidden_widths),
        "OUTPUTS": num_outputs,
    }


def _num_programs(rows: Tensor, per_multiprocessor: int) -> int:
    """As many programs as run at a time, but no more than there are blocks."""
    multiprocessors = 1  # the interpreter's, which runs one program after another
    if rows.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(rows.device).multi_processor_count
    return max(1, min(triton.cdiv(len(rows), ROWS), per_multiprocessor * multiprocessors))


class _ReLUNetwork(torch.autograd.Function):
    """All layers; parameters are weight, bias, weight, bias, ..."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        count: Tensor | None,
        sizes: dict[str, int],
        precision: str,
        *parameters: Tensor,
    ) -> Tensor:
        inputs = inputs.contiguous()
        packed = torch.cat([parameter.flatten() for parameter in parameters])
        outputs = inputs.new_empty(len(inputs), sizes["OUTPUTS"])
        constants = {**sizes, "ROWS": ROWS, "PRECISION": precision}
        programs = _num_programs(inputs, _FORWARD_PROGRAMS)
        forward_kernel[(programs,)](
            inputs, packed, outputs, count, len(inputs), **constants, num_warps=NUM_WARPS
        )
        ctx.save_for_backward(inputs, packed, count)  # type: ignore[arg-type] # None is welcome
        ctx.constants = constants  # type: ignore[attr-defined]
        ctx.shapes = [parameter.shape for parameter in parameters]  # type: ignore[attr-defined]
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs):  # type: ignore[no-untyped-def]
        inputs, packed, count = ctx.saved_tensors
        d_inputs = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        programs = _num_programs(inputs, _BACKWARD_PROGRAMS)
        parts = packed.new_empty(programs, len(packed))
        backward_kernel[(programs,)](
            *(inputs, packed, d_outputs.contiguous(), d_inputs, parts, count, len(inputs)),
            **ctx.constants,
            num_warps=NUM_WARPS,
        )
        d_packed = parts.sum(dim=0).split([shape.numel() for shape in ctx.shapes])
        d_parameters = [part.view(shape) for part, shape in zip(d_packed, ctx.shapes, strict=True)]
        return d_inputs, None, None, None, *d_parameters


def relu_mlp(
    inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], count: Tensor | None, precision: str
) -> Tensor:
    """See the package's ``relu_mlp``."""
    parameters = [tensor for layer in zip(weights, biases, strict=True) for tensor in layer]
    sizes = kernel_sizes(inputs.shape[1], [len(bias) for bias in biases[:-1]], len(biases[-1]))
    if sizes is None or any(tensor.dtype != torch.float32 for tensor in (inputs, *parameters)):
        return reference.relu_mlp(inputs, weights, biases, count, precision)
    return _ReLUNetwork.apply(inputs, count, sizes, precision, *parameters)
