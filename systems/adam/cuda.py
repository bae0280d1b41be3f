"""AdamW's update of one parameter as a Triton kernel: 16 bytes read and 12 written per element, each once.

A program has a block of consecutive elements, seen as a matrix ``(BLOCK / WIDTH, WIDTH)`` whose rows are what
a thread loads with one instruction. Masks hold for whole rows, since a mask of single elements would have
every element loaded by itself. ::

    element = row * WIDTH + column        | 0 1 2 3 | 4 5 6 7 | ... |   WIDTH 4: 16 bytes a row

With ``skip_untouched`` nothing else is read or written of rows without a gradient (memory moves sectors of
two rows), and a block without any ends at once.
"""

import math
from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements a program: with 8 warps one load of four per thread from each tensor, in some 45 registers."""
_WIDEST = 4
"""Elements that one instruction loads: 16 bytes."""


@no_type_check
@triton.jit
def _update_block(
    parameter, exp_avg, exp_avg_sq, g, mask, rate, decay, scale, beta2, rest1, rest2, eps, SKIP: tl.constexpr
):
    """Update the elements behind a block of pointers from their gradients ``g``."""
    p = tl.load(parameter, mask=mask, other=0.0)
    m = tl.load(exp_avg, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq, mask=mask, other=0.0)
    mean = m + rest1 * (g - m)
    square = beta2 * v + rest2 * g * g
    # The approximate root flushes what is below 1e-38 to 0 and the approximate quotient is a bit off.
    updated = (p - decay * p) - rate * tl.div_rn(mean, tl.sqrt_rn(square) * scale + eps)
    if SKIP:
        # Elements without a gradient that share a row with one that has.
        updated = tl.where(g != 0.0, updated, p)
        mean = tl.where(g != 0.0, mean, m)
        square = tl.where(g != 0.0, square, v)
    tl.store(parameter, updated, mask=mask)
    tl.store(exp_avg, mean, mask=mask)
    tl.store(exp_avg_sq, square, mask=mask)


# Neither the count nor where a rate happens to lie is worth a compilation of its own.
@no_type_check
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lr"])
def _update_kernel(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    lr,  # a number or a pointer to one
    corrections,  # (2,) float64: 1 - beta1^t, 1 - beta2^t
    finite,
    num_rows,
    beta2,
    rest1,  # 1 - beta1
    rest2,  # 1 - beta2
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SKIP: tl.constexpr,
    RATE_ON_DEVICE: tl.constexpr,
):
    """m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2, p -= lr (w p + m / c1 / (sqrt(v) / sqrt(c2) + eps))."""
    if tl.load(finite):
        rate = tl.load(lr) if RATE_ON_DEVICE else lr
        decay = rate * weight_decay
        rate = tl.div_rn(rate, tl.load(corrections).to(tl.float32))
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(corrections + 1).to(tl.float32)))
        rows: tl.constexpr = BLOCK // WIDTH
        row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
        element = row * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = row < num_rows
        g = tl.load(gradient + element, mask=mask, other=0.0)
        p, m, v = parameter + element, exp_avg + element, exp_avg_sq + element
        if SKIP:
            touched = tl.max((g != 0.0).to(tl.int32), axis=1, keep_dims=True)
            if tl.max(touched) > 0:
                mask = touched > 0
                _update_block(p, m, v, g, mask, rate, decay, scale, beta2, rest1, rest2, eps, SKIP)
        else:
            _update_block(p, m, v, g, mask, rate, decay, scale, beta2, rest1, rest2, eps, SKIP)


def update_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    corrections: Tensor,
    finite: Tensor,
    skip_untouched: bool,
) -> None:
    """See :func:`systems.adam.reference.update_`; all tensors contiguous, parameters float32."""
    width = math.gcd(parameter.numel(), _WIDEST)
    _update_kernel[(triton.cdiv(parameter.numel(), _BLOCK),)](
        *(parameter, gradient, exp_avg, exp_avg_sq, lr, corrections, finite, parameter.numel() // width),
        *(betas[1], 1.0 - betas[0], 1.0 - betas[1], eps, weight_decay),
        BLOCK=_BLOCK,
        WIDTH=width,
        SKIP=skip_untouched,
        RATE_ON_DEVICE=isinstance(lr, Tensor),
        num_warps=8,
    )
