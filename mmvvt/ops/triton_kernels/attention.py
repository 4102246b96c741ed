r"""The ``triton`` backend of vicinity attention: fused kernels.

The vicinity weight of query p and key r is
:math:`\sum_j f_j(p) g_j(r)`, a sum of J products of a query factor and a key
factor. J is 4 for 'sum' and 'product', 2 for '1d' and 1 for 'none'; f and g
are the cosine and sine factors on the query grid and the key grid. With q and
k after the ReLU and the clamp c, one head computes

.. math::
    S_j = \sum_r g_j(r) k_r^T v_r, \quad s_j = \sum_r g_j(r) k_r, \\
    n_p = \sum_j f_j(p) q_p c(S_j), \quad
    z_p = 1 / (\sum_j f_j(p) q_p \cdot s_j + eps), \\
    o_p = c(c(n_p) c(z_p)).

The forward pass computes the sums in one pass over the keys and the output in
one pass over the queries. For the backward pass, let :math:`g_p` be the
gradient of :math:`o_p`, set to zero where the last clamp is active. Then,
omitting the gradients of the other clamps (1 inside the bounds, 0 outside),

.. math::
    t_p = c(z_p) g_p, \quad \delta_p = -z_p^2 \, g_p \cdot c(n_p), \\
    dq_p = \sum_j f_j(p) (t_p c(S_j)^T + \delta_p s_j), \\
    dS_j = \sum_p f_j(p) q_p^T t_p, \quad ds_j = \sum_p f_j(p) \delta_p q_p, \\
    dk_r = \sum_j g_j(r) (v_r dS_j^T + ds_j), \quad
    dv_r = \sum_j g_j(r) k_r dS_j.

dS and ds have the same form as S and s and are computed by the same kernel.
q, k, v and the sums are saved for the backward pass; the numerator and the
normaliser are recomputed.

Precision: factors, clamps and sums are computed in float32. The operands of
the matrix products depend on the input dtype:

- bfloat16: The operands are bfloat16. q and v are used unchanged. The product
  of k and its factor is rounded once, because rounding the factor itself would
  give all channels of a token the same relative error. The clamped S, dS and t
  are rounded.
- float16: The exponent range of float16 is too small for sums and gradients,
  so the products use TF32, which represents every float16 value exactly.
- float32: The products use IEEE float32.

The partial sums of the chunks of tokens are stored separately and added in a
fixed order, so the results are bitwise deterministic.
"""

import math
from typing import List, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..angles import NUM_FACTORS
from ..dispatch import INTERPRETED
from .common import (
    add_chunks,
    cast,
    clamp,
    inside,
    num_programs,
    on_its_device,
    round_bits,
    split,
)

_HALF_PI = tl.constexpr(math.pi / 2)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Grids and chunk counts vary between calls. Specialising the kernels for
# values of 1 or multiples of 16 would cause recompilation without a speedup.
_SIZES = ['heads', 'tokens', 'h', 'w']


@triton.jit
def _angle(index, length):
    # Same order of operations, and thus the same rounding, as
    # angles.axis_angles.
    return tl.div_rn(index.to(tl.float32) * _HALF_PI, length.to(tl.float32))


@triton.jit
def _sine(x):
    """Sine of x in [0, pi / 2] radians, with float32 accuracy.

    Uses seven terms of the Taylor series; the eighth term is below 1e-9. The
    range reduction of ``tl.sin`` for large angles needs additional code and
    stack memory.
    """
    square = x * x
    tail = 1 / 6227020800 * square - 1 / 39916800
    tail = tail * square + 1 / 362880
    tail = tail * square - 1 / 5040
    tail = tail * square + 1 / 120
    tail = tail * square - 1 / 6
    return x + x * square * tail


@triton.jit
def _cosine(x):
    # pi / 2 is subtracted as the sum of two float32 constants, because the
    # cosine is close to pi / 2 - x near pi / 2.
    return _sine((-x + _HALF_PI) - 4.371139e-8)


@triton.jit
def _tables(token, tokens, h, w, LOCALITY: tl.constexpr):
    """Cosines and sines of the row angles and of the column angles.

    For '1d', both are those of the angles along the sequence.
    """
    if LOCALITY == '1d':
        a = _angle(token, tokens)
        b = a
    else:
        a = _angle(token // w, h)
        b = _angle(token % w, w)
    return _cosine(a), _sine(a), _cosine(b), _sine(b)


@triton.jit
def _factor(j, cos_a, sin_a, cos_b, sin_b, LOCALITY: tl.constexpr):
    if LOCALITY == 'none':
        factor = tl.full(cos_a.shape, 1.0, tl.float32)
    elif LOCALITY == 'product':
        factor = tl.where(j < 2, cos_a, sin_a) * tl.where(
            j % 2 == 0, cos_b, sin_b
        )
    else:
        factor = tl.where(
            j < 2,
            tl.where(j == 0, cos_a, sin_a),
            tl.where(j == 2, cos_b, sin_b),
        )
    return factor


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def _dot(x, y, acc, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    x, y = cast(x, PRODUCT), cast(y, PRODUCT)
    if PRECISION == 'tf32' and PRODUCT == tl.float32:
        # Tensor cores truncate these bits, so round to nearest first.
        x, y = round_bits(x, 13), round_bits(y, 13)
    if _INTERPRETED:  # its tl.dot does not support bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _head_offset(
    pair,  # int, image * heads + head
    heads,  # number of heads
    stride_b,  # stride of the batch axis
    stride_h,  # stride of the head axis
    ALIGN: tl.constexpr,  # power of two that divides both strides
):
    """Offset of the first element of one head of one image."""
    pair = pair.to(tl.int64)
    offset = pair // heads * stride_b + pair % heads * stride_h
    # Triton only detects strides that are multiples of 16. The hint allows
    # 16-byte loads for others too, such as 40, which is a multiple of 8.
    return tl.multiple_of(offset, ALIGN)


@triton.jit
def _tile(
    pointer,  # (N, d) with any strides, any dtype
    token,  # (tokens,), int32, token indices
    column,  # (columns,), int32, channel indices
    stride_n,  # stride of the token axis
    stride_d,  # stride of the channel axis
):
    # Pointers of shape (tokens, columns)
    return (
        pointer
        + token[:, None].to(tl.int64) * stride_n
        + column[None, :] * stride_d
    )


@triton.jit(do_not_specialize=_SIZES + ['chunk', 'chunks'])
def _partial_sums(
    x_ptr,  # (B, heads, N, d), input dtype, before the ReLU
    y_ptr,  # (B, heads, N, d), input dtype or float32
    weight_ptr,  # (B * heads, N), float32, or None
    partial_ptr,  # (chunks, B * heads, J * d * d + J * d), float32
    x_b,  # stride of x: batch
    x_h,  # stride of x: head
    x_n,  # stride of x: token
    x_d,  # stride of x: channel
    y_b,  # stride of y: batch
    y_h,  # stride of y: head
    y_n,  # stride of y: token
    y_d,  # stride of y: channel
    heads,  # number of heads
    tokens,  # number of tokens N, N = h * w
    h,  # rows of the grid
    w,  # columns of the grid
    chunk,  # tokens per program, a multiple of TOKENS
    chunks,  # number of chunks per head
    d: tl.constexpr,  # channels per head
    D: tl.constexpr,  # d rounded up to a power of two, at least 16
    E: tl.constexpr,  # channels per block of columns, at most D
    TOKENS: tl.constexpr,  # tokens loaded at once
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
    WEIGHTED: tl.constexpr,  # whether weight_ptr is used
    ALIGN: tl.constexpr,  # power of two that divides batch, head strides
    PRODUCT: tl.constexpr,  # dtype of matrix product operands
    PRECISION: tl.constexpr,  # input_precision of tl.dot: 'ieee', 'tf32'
):
    """Compute the sums over a chunk of tokens, for one head and E columns.

    ``S_j = sum f_j relu(x)^T y`` and ``s_j = sum f_j weight relu(x)``. The
    weights are 1 if ``WEIGHTED`` is False.
    """
    pair = tl.program_id(0) // chunks
    part = tl.program_id(0) % chunks
    block = tl.program_id(1)
    rows = tl.arange(0, D)
    columns = block * E + tl.arange(0, E)
    x_ptr += _head_offset(pair, heads, x_b, x_h, ALIGN)
    y_ptr += _head_offset(pair, heads, y_b, y_h, ALIGN)
    if WEIGHTED:
        weight_ptr += pair.to(tl.int64) * tokens

    kv_0 = tl.zeros((D, E), tl.float32)
    kv_1 = tl.zeros((D, E), tl.float32)
    kv_2 = tl.zeros((D, E), tl.float32)
    kv_3 = tl.zeros((D, E), tl.float32)
    # The key sums are added over the tokens after the loop: a sum in the loop
    # would let all warps wait for each other in each step.
    k_0 = tl.zeros((TOKENS, D), tl.float32)
    k_1 = tl.zeros((TOKENS, D), tl.float32)
    k_2 = tl.zeros((TOKENS, D), tl.float32)
    k_3 = tl.zeros((TOKENS, D), tl.float32)
    begin = part * chunk
    for start in range(begin, tl.minimum(begin + chunk, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        real = token < tokens
        x = tl.load(
            _tile(x_ptr, token, rows, x_n, x_d),
            mask=real[:, None] & (rows < d)[None, :],
            other=0.0,
        )
        y = tl.load(
            _tile(y_ptr, token, columns, y_n, y_d),
            mask=real[:, None] & (columns < d)[None, :],
            other=0.0,
        )
        x = _relu(x.to(tl.float32))
        cos_a, sin_a, cos_b, sin_b = _tables(token, tokens, h, w, LOCALITY)
        if WEIGHTED:
            weight = tl.load(weight_ptr + token, mask=real, other=0.0)
        else:
            weight = tl.full((TOKENS,), 1.0, tl.float32)
        for j in tl.static_range(FACTORS):
            factor = _factor(j, cos_a, sin_a, cos_b, sin_b, LOCALITY)
            scaled = x * factor[:, None]
            key = scaled * weight[:, None]
            if j == 0:
                kv_0 = _dot(tl.trans(scaled), y, kv_0, PRODUCT, PRECISION)
                k_0 += key
            elif j == 1:
                kv_1 = _dot(tl.trans(scaled), y, kv_1, PRODUCT, PRECISION)
                k_1 += key
            elif j == 2:
                kv_2 = _dot(tl.trans(scaled), y, kv_2, PRODUCT, PRECISION)
                k_2 += key
            else:
                kv_3 = _dot(tl.trans(scaled), y, kv_3, PRODUCT, PRECISION)
                k_3 += key

    # (chunks, B * heads, J * d * d + J * d): all S_j, followed by all s_j
    pairs = tl.num_programs(0) // chunks
    partial_ptr += (part.to(tl.int64) * pairs + pair) * (FACTORS * d * (d + 1))
    kv_ptr = partial_ptr + rows[:, None] * d + columns[None, :]
    kv_mask = (rows < d)[:, None] & (columns < d)[None, :]
    k_ptr = partial_ptr + FACTORS * d * d + rows
    k_mask = (rows < d) & (block == 0)
    for j in tl.static_range(FACTORS):
        if j == 0:
            kv, key = kv_0, k_0
        elif j == 1:
            kv, key = kv_1, k_1
        elif j == 2:
            kv, key = kv_2, k_2
        else:
            kv, key = kv_3, k_3
        tl.store(kv_ptr + j * d * d, kv, mask=kv_mask)
        tl.store(k_ptr + j * d, tl.sum(key, axis=0), mask=k_mask)


@triton.jit
def _load_sums(
    sums_ptr,  # (J * d * d + J * d,), float32, of one head
    j,  # index of the factor, 0 <= j < J
    rows,  # (D,), int32, channel indices
    columns,  # (E,), int32, channel indices
    d: tl.constexpr,  # channels per head
    CLAMP: tl.constexpr,  # whether the sums are clamped
):
    sums = tl.load(
        sums_ptr + j * d * d + rows[:, None] * d + columns[None, :],
        mask=(rows < d)[:, None] & (columns < d)[None, :],
        other=0.0,
    )
    return clamp(sums) if CLAMP else sums


@triton.jit
def _mix_key_sums(
    sums_ptr,  # (J * d * d + J * d,), float32, of one head
    rows,  # (D,), int32, channel indices
    cos_a,  # (tokens,), float32, cosine, first axis
    sin_a,  # (tokens,), float32, sine, first axis
    cos_b,  # (tokens,), float32, cosine, second axis
    sin_b,  # (tokens,), float32, sine, second axis
    d: tl.constexpr,  # channels per head
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
):
    """Compute ``sum_j f_j s_j`` for each token, of shape ``(tokens, D)``."""
    mixed = tl.zeros((cos_a.shape[0], rows.shape[0]), tl.float32)
    for j in tl.static_range(FACTORS):
        key = tl.load(
            sums_ptr + FACTORS * d * d + j * d + rows, mask=rows < d, other=0.0
        )
        factor = _factor(j, cos_a, sin_a, cos_b, sin_b, LOCALITY)
        mixed += factor[:, None] * key[None, :]
    return mixed


@triton.jit
def _normaliser(q, key, eps, real):
    # The sum of weights of padding tokens can be 0. It is replaced by 1,
    # because 1 / 0 would result in NaN in the sums.
    weight = tl.where(real, tl.sum(q * key, axis=1) + eps, 1.0)
    return tl.div_rn(1.0, weight)


@triton.jit
def _through_sums(
    x,  # (tokens, D), or (tokens, E) if BACK
    sums_ptr,  # (J * d * d + J * d,), float32, of one head
    columns,  # (E,), int32, channel indices
    cos_a,  # (tokens,), float32, cosine, first axis
    sin_a,  # (tokens,), float32, sine, first axis
    cos_b,  # (tokens,), float32, cosine, second axis
    sin_b,  # (tokens,), float32, sine, second axis
    d: tl.constexpr,  # channels per head
    D: tl.constexpr,  # d rounded up to a power of two, at least 16
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
    CLAMP: tl.constexpr,  # whether the S_j are clamped
    BACK: tl.constexpr,  # whether to multiply by the transposed S_j
    PRODUCT: tl.constexpr,  # dtype of matrix product operands
    PRECISION: tl.constexpr,  # input_precision of tl.dot: 'ieee', 'tf32'
):
    """Compute ``sum_j f_j x S_j``, or ``sum_j f_j x S_j^T`` if BACK.

    The loop over j is not unrolled. IEEE products read their operands from
    registers, which only have room for one S_j at a time. The other products
    use a software pipeline that prefetches the next S_j.
    """
    STAGES: tl.constexpr = 1 if PRECISION == 'ieee' else 3
    rows = tl.arange(0, D)
    WIDTH: tl.constexpr = D if BACK else columns.shape[0]
    out = tl.zeros((x.shape[0], WIDTH), tl.float32)
    for j in tl.range(FACTORS, num_stages=STAGES):
        sums = _load_sums(sums_ptr, j, rows, columns, d, CLAMP)
        if BACK:
            sums = tl.trans(sums)
        part = _dot(
            x,
            sums,
            tl.zeros((x.shape[0], WIDTH), tl.float32),
            PRODUCT,
            PRECISION,
        )
        factor = _factor(j, cos_a, sin_a, cos_b, sin_b, LOCALITY)
        out += part * factor[:, None]
    return out


@triton.jit(do_not_specialize=_SIZES + ['chunk', 'chunks'])
def _output(
    q_ptr,  # (B, heads, N, d), input dtype, before the ReLU
    sums_ptr,  # (B * heads, J * d * d + J * d), float32
    out_ptr,  # (B, heads, N, d), input dtype
    q_b,  # stride of q: batch
    q_h,  # stride of q: head
    q_n,  # stride of q: token
    q_d,  # stride of q: channel
    o_b,  # stride of out: batch
    o_h,  # stride of out: head
    o_n,  # stride of out: token
    o_d,  # stride of out: channel
    heads,  # number of heads
    tokens,  # number of tokens N, N = h * w
    h,  # rows of the grid
    w,  # columns of the grid
    chunk,  # tokens per program, a multiple of TOKENS
    chunks,  # number of chunks per head
    eps,  # float, added to the sum of weights
    d: tl.constexpr,  # channels per head
    D: tl.constexpr,  # d rounded up to a power of two, at least 16
    E: tl.constexpr,  # channels per block of columns, at most D
    TOKENS: tl.constexpr,  # tokens loaded at once
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
    CLAMP: tl.constexpr,  # whether the clamps are applied
    HOIST: tl.constexpr,  # whether the S_j are loaded once, before the loop
    ALIGN: tl.constexpr,  # power of two that divides batch, head strides
    PRODUCT: tl.constexpr,  # dtype of matrix product operands
    PRECISION: tl.constexpr,  # input_precision of tl.dot: 'ieee', 'tf32'
):
    """Compute E columns of the output for a chunk of tokens of one head."""
    pair = tl.program_id(0) // chunks
    part = tl.program_id(0) % chunks
    rows = tl.arange(0, D)
    columns = tl.program_id(1) * E + tl.arange(0, E)
    q_ptr += _head_offset(pair, heads, q_b, q_h, ALIGN)
    out_ptr += _head_offset(pair, heads, o_b, o_h, ALIGN)
    sums_ptr += pair.to(tl.int64) * (FACTORS * d * (d + 1))

    if HOIST:
        kv_0 = _load_sums(sums_ptr, 0, rows, columns, d, CLAMP).to(PRODUCT)
        if FACTORS > 1:
            kv_1 = _load_sums(sums_ptr, 1, rows, columns, d, CLAMP).to(PRODUCT)
        if FACTORS > 2:
            kv_2 = _load_sums(sums_ptr, 2, rows, columns, d, CLAMP).to(PRODUCT)
            kv_3 = _load_sums(sums_ptr, 3, rows, columns, d, CLAMP).to(PRODUCT)
    begin = part * chunk
    for start in range(begin, tl.minimum(begin + chunk, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        real = token < tokens
        q = tl.load(
            _tile(q_ptr, token, rows, q_n, q_d),
            mask=real[:, None] & (rows < d)[None, :],
            other=0.0,
        )
        q = _relu(q.to(tl.float32))
        cos_a, sin_a, cos_b, sin_b = _tables(token, tokens, h, w, LOCALITY)
        key = _mix_key_sums(
            sums_ptr, rows, cos_a, sin_a, cos_b, sin_b, d, FACTORS, LOCALITY
        )
        z = _normaliser(q, key, eps, real)
        if HOIST:
            numerator = tl.zeros((TOKENS, E), tl.float32)
            for j in tl.static_range(FACTORS):
                if j == 0:
                    kv = kv_0
                elif j == 1:
                    kv = kv_1
                elif j == 2:
                    kv = kv_2
                else:
                    kv = kv_3
                part_j = _dot(
                    q,
                    kv,
                    tl.zeros((TOKENS, E), tl.float32),
                    PRODUCT,
                    PRECISION,
                )
                factor = _factor(j, cos_a, sin_a, cos_b, sin_b, LOCALITY)
                numerator += part_j * factor[:, None]
        else:
            numerator = _through_sums(
                q,
                sums_ptr,
                columns,
                cos_a,
                sin_a,
                cos_b,
                sin_b,
                d,
                D,
                FACTORS,
                LOCALITY,
                CLAMP,
                False,
                PRODUCT,
                PRECISION,
            )
        if CLAMP:
            out = clamp(clamp(numerator) * clamp(z)[:, None])
        else:
            out = numerator * z[:, None]
        tl.store(
            _tile(out_ptr, token, columns, o_n, o_d),
            cast(out, out_ptr.dtype.element_ty),
            mask=real[:, None] & (columns < d)[None, :],
        )


@triton.jit(do_not_specialize=_SIZES + ['tiles'])
def _query_gradient(
    q_ptr,  # (B, heads, N, d), input dtype, before the ReLU
    sums_ptr,  # (B * heads, J * d * d + J * d), float32
    grad_ptr,  # (B, heads, N, d), input dtype, gradient of out
    dq_ptr,  # (B, heads, N, d), input dtype, output
    t_ptr,  # (B, heads, N, d), bfloat16 or float32, output
    delta_ptr,  # (B * heads, N), float32, output
    q_b,  # stride of q: batch
    q_h,  # stride of q: head
    q_n,  # stride of q: token
    q_d,  # stride of q: channel
    g_b,  # stride of grad: batch
    g_h,  # stride of grad: head
    g_n,  # stride of grad: token
    g_d,  # stride of grad: channel
    dq_b,  # stride of dq: batch
    dq_h,  # stride of dq: head
    dq_n,  # stride of dq: token
    dq_d,  # stride of dq: channel
    t_b,  # stride of t: batch
    t_h,  # stride of t: head
    t_n,  # stride of t: token
    t_d,  # stride of t: channel
    heads,  # number of heads
    tokens,  # number of tokens N, N = h * w
    h,  # rows of the grid
    w,  # columns of the grid
    tiles,  # number of tiles per head
    eps,  # float, added to the sum of weights
    d: tl.constexpr,  # channels per head
    D: tl.constexpr,  # d rounded up to a power of two, at least 16
    E: tl.constexpr,  # channels per block of columns, at most D
    TOKENS: tl.constexpr,  # tokens per program
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
    CLAMP: tl.constexpr,  # whether the clamps are applied
    ALIGN: tl.constexpr,  # power of two that divides batch, head strides
    PRODUCT: tl.constexpr,  # dtype of matrix product operands
    PRECISION: tl.constexpr,  # input_precision of tl.dot: 'ieee', 'tf32'
):
    """Compute dq, t and delta of a tile of tokens (see module docstring)."""
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    rows = tl.arange(0, D)
    q_ptr += _head_offset(pair, heads, q_b, q_h, ALIGN)
    grad_ptr += _head_offset(pair, heads, g_b, g_h, ALIGN)
    dq_ptr += _head_offset(pair, heads, dq_b, dq_h, ALIGN)
    t_ptr += _head_offset(pair, heads, t_b, t_h, ALIGN)
    delta_ptr += pair.to(tl.int64) * tokens
    sums_ptr += pair.to(tl.int64) * (FACTORS * d * (d + 1))

    token = tile * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    q = tl.load(
        _tile(q_ptr, token, rows, q_n, q_d),
        mask=real[:, None] & (rows < d)[None, :],
        other=0.0,
    )
    q = _relu(q.to(tl.float32))
    cos_a, sin_a, cos_b, sin_b = _tables(token, tokens, h, w, LOCALITY)
    key = _mix_key_sums(
        sums_ptr, rows, cos_a, sin_a, cos_b, sin_b, d, FACTORS, LOCALITY
    )
    z = _normaliser(q, key, eps, real)
    scale = clamp(z) if CLAMP else z
    dq = tl.zeros((TOKENS, D), tl.float32)
    dz = tl.zeros((TOKENS,), tl.float32)
    for first in tl.range(0, d, E, num_stages=1):
        columns = first + tl.arange(0, E)
        numerator = _through_sums(
            q,
            sums_ptr,
            columns,
            cos_a,
            sin_a,
            cos_b,
            sin_b,
            d,
            D,
            FACTORS,
            LOCALITY,
            CLAMP,
            False,
            PRODUCT,
            PRECISION,
        )
        mask = real[:, None] & (columns < d)[None, :]
        grad = tl.load(
            _tile(grad_ptr, token, columns, g_n, g_d), mask=mask, other=0.0
        )
        grad = grad.to(tl.float32)
        if CLAMP:
            clamped = clamp(numerator)
            grad = tl.where(inside(clamped * scale[:, None]), grad, 0.0)
            dz += tl.sum(grad * clamped, axis=1)
            grad = tl.where(inside(numerator), grad, 0.0)
        else:
            dz += tl.sum(grad * numerator, axis=1)
        t = cast(grad * scale[:, None], t_ptr.dtype.element_ty)
        tl.store(_tile(t_ptr, token, columns, t_n, t_d), t, mask=mask)
        dq += _through_sums(
            t,
            sums_ptr,
            columns,
            cos_a,
            sin_a,
            cos_b,
            sin_b,
            d,
            D,
            FACTORS,
            LOCALITY,
            CLAMP,
            True,
            PRODUCT,
            PRECISION,
        )
    delta = -z * z * dz
    if CLAMP:
        delta = tl.where(inside(z), delta, 0.0)
    tl.store(delta_ptr + token, delta, mask=real)
    dq += delta[:, None] * key
    tl.store(
        _tile(dq_ptr, token, rows, dq_n, dq_d),
        cast(tl.where(q > 0, dq, 0.0), dq_ptr.dtype.element_ty),
        mask=real[:, None] & (rows < d)[None, :],
    )


@triton.jit(do_not_specialize=_SIZES + ['tiles'])
def _key_gradient(
    k_ptr,  # (B, heads, N, d), input dtype, before the ReLU
    v_ptr,  # (B, heads, N, d), input dtype
    dsums_ptr,  # (B * heads, J * d * d + J * d), float32
    dk_ptr,  # (B, heads, N, d), input dtype, output
    dv_ptr,  # (B, heads, N, d), input dtype, output
    k_b,  # stride of k: batch
    k_h,  # stride of k: head
    k_n,  # stride of k: token
    k_d,  # stride of k: channel
    v_b,  # stride of v: batch
    v_h,  # stride of v: head
    v_n,  # stride of v: token
    v_d,  # stride of v: channel
    dk_b,  # stride of dk: batch
    dk_h,  # stride of dk: head
    dk_n,  # stride of dk: token
    dk_d,  # stride of dk: channel
    dv_b,  # stride of dv: batch
    dv_h,  # stride of dv: head
    dv_n,  # stride of dv: token
    dv_d,  # stride of dv: channel
    heads,  # number of heads
    tokens,  # number of keys N, N = h * w
    h,  # rows of the key grid
    w,  # columns of the key grid
    tiles,  # number of tiles per head
    d: tl.constexpr,  # channels per head
    D: tl.constexpr,  # d rounded up to a power of two, at least 16
    E: tl.constexpr,  # channels per block of columns, at most D
    TOKENS: tl.constexpr,  # tokens per program
    FACTORS: tl.constexpr,  # number of factors J: 4, 2 or 1
    LOCALITY: tl.constexpr,  # 'sum', 'product', '1d' or 'none'
    ALIGN: tl.constexpr,  # power of two that divides batch, head strides
    PRODUCT: tl.constexpr,  # dtype of matrix product operands
    PRECISION: tl.constexpr,  # input_precision of tl.dot: 'ieee', 'tf32'
):
    """Compute dk and dv of a tile of tokens (see the module docstring)."""
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    rows = tl.arange(0, D)
    k_ptr += _head_offset(pair, heads, k_b, k_h, ALIGN)
    v_ptr += _head_offset(pair, heads, v_b, v_h, ALIGN)
    dk_ptr += _head_offset(pair, heads, dk_b, dk_h, ALIGN)
    dv_ptr += _head_offset(pair, heads, dv_b, dv_h, ALIGN)
    dsums_ptr += pair.to(tl.int64) * (FACTORS * d * (d + 1))

    token = tile * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    k_mask = real[:, None] & (rows < d)[None, :]
    k = tl.load(_tile(k_ptr, token, rows, k_n, k_d), mask=k_mask, other=0.0)
    k = _relu(k.to(tl.float32))
    cos_a, sin_a, cos_b, sin_b = _tables(token, tokens, h, w, LOCALITY)
    dk = _mix_key_sums(
        dsums_ptr, rows, cos_a, sin_a, cos_b, sin_b, d, FACTORS, LOCALITY
    )
    for first in tl.range(0, d, E, num_stages=1):
        columns = first + tl.arange(0, E)
        mask = real[:, None] & (columns < d)[None, :]
        v = tl.load(
            _tile(v_ptr, token, columns, v_n, v_d), mask=mask, other=0.0
        )
        dv = _through_sums(
            k,
            dsums_ptr,
            columns,
            cos_a,
            sin_a,
            cos_b,
            sin_b,
            d,
            D,
            FACTORS,
            LOCALITY,
            False,
            False,
            PRODUCT,
            PRECISION,
        )
        dk += _through_sums(
            v,
            dsums_ptr,
            columns,
            cos_a,
            sin_a,
            cos_b,
            sin_b,
            d,
            D,
            FACTORS,
            LOCALITY,
            False,
            True,
            PRODUCT,
            PRECISION,
        )
        tl.store(
            _tile(dv_ptr, token, columns, dv_n, dv_d),
            cast(dv, dv_ptr.dtype.element_ty),
            mask=mask,
        )
    tl.store(
        _tile(dk_ptr, token, rows, dk_n, dk_d),
        cast(tl.where(k > 0, dk, 0.0), dk_ptr.dtype.element_ty),
        mask=k_mask,
    )


# Maximum number of tokens that a program loads at once, and of their elements,
# for the kernels that compute the sums, the output and the gradients,
# respectively. Larger tiles need more registers than a thread has, see
# docs/kernels.md.
_TILES = {
    torch.bfloat16: ((32, 1024), (32, 4096), (64, 4096)),
    torch.float16: ((32, 1024), (32, 4096), (32, 4096)),
    torch.float32: ((32, 512), (32, 4096), (16, 2048)),
}


def _tile_tokens(kind: int, dtype: torch.dtype, width: int) -> int:
    """Number of tokens that a kernel loads at once.

    Args:
        kind (int): Position in :data:`_TILES`: 0 for the sums, 1 for the
            output, 2 for the gradients.
        dtype (torch.dtype): Data type of the input.
        width (int): Channels per head, rounded up to a power of two.

    Returns:
        int: Number of tokens, at least 16.
    """
    tokens, elements = _TILES[dtype][kind]
    return max(16, min(tokens, elements // width))


def _settings(q: Tensor, locality: str) -> dict:
    """Return the constexpr arguments and options shared by all kernels here.

    Args:
        q (Tensor): Queries of shape ``(B, heads, N, d)``.
        locality (str): 'sum', 'product', '1d' or 'none'.

    Returns:
        dict: Keyword arguments of the kernel launches.
    """
    d = q.shape[-1]
    width = max(16, triton.next_power_of_2(d))  # tl.dot needs >= 16
    # A program keeps its J * D * E sums in registers: at most 16384 elements,
    # which is 64 for each of 256 threads.
    columns = min(width, 4096 // width)
    return dict(
        d=d,
        D=width,
        E=columns,
        FACTORS=NUM_FACTORS[locality],
        LOCALITY=locality,
        PRODUCT=tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32,
        PRECISION='ieee' if q.dtype == torch.float32 else 'tf32',
        num_warps=8 if width > 32 else 4,
    )


def _align(*tensors: Tensor) -> int:
    """Largest power of two, up to 16, that divides all head offsets.

    The offset of a head is a sum of multiples of the strides of the batch and
    head axes, in elements.
    """
    return math.gcd(16, *(t.stride(i) for t in tensors for i in (0, 1)))


def _new_like(t: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Allocate an uninitialised tensor of the same shape as ``t``.

    Args:
        t (Tensor): Tensor of shape ``(B, heads, N, d)``.
        dtype (torch.dtype, optional): Data type. Defaults to that of ``t``.

    Returns:
        Tensor: Tensor of shape ``(B, heads, N, d)``, stored in memory as
        ``(B, N, heads, d)``.
    """
    b, heads, n, d = t.shape
    # (B, N, heads, d) -> (B, heads, N, d)
    return t.new_empty((b, n, heads, d), dtype=dtype).transpose(1, 2)


def _take_sums(x, y, weight, grid_shape, settings, forward=None) -> Tensor:
    """Compute the sums ``S_j`` and ``s_j`` over all tokens.

    Args:
        x (Tensor): Tensor of shape ``(B, heads, N, d)``, before the ReLU.
        y (Tensor): Tensor of shape ``(B, heads, N, d)``.
        weight (Tensor, optional): Weights of the tokens in ``s_j``, of shape
            ``(B * heads, N)``. None means 1.
        grid_shape (tuple[int, int]): Grid ``(h, w)``, N = h * w.
        settings (dict): See :func:`_settings`.
        forward (Tensor, optional): Sums of the forward pass, of the same
            shape as the result. Elements of the result are set to 0 where
            the forward sums ``S_j`` were clamped. Defaults to None.

    Returns:
        Tensor: float32 tensor of shape
        ``(B * heads, J * d * d + J * d)``.
    """
    b, heads, n, d = x.shape
    pairs, blocks = b * heads, triton.cdiv(d, settings['E'])
    # A chunk writes J * d * E elements, as many as hundreds of tokens have, so
    # the number of chunks is limited to what is needed to fill the device.
    tile = _tile_tokens(0, x.dtype, settings['D'])
    chunk, chunks = split(n, tile, num_programs(x.device) // (pairs * blocks))
    length = settings['FACTORS'] * d * (d + 1)
    partial = x.new_empty((chunks, pairs, length), dtype=torch.float32)
    _partial_sums[(pairs * chunks, blocks)](
        x,
        y,
        weight,
        partial,
        *x.stride(),
        *y.stride(),
        heads,
        n,
        *grid_shape,
        chunk,
        chunks,
        WEIGHTED=weight is not None,
        TOKENS=tile,
        ALIGN=_align(x, y),
        **settings,
    )
    return add_chunks(partial, forward, settings['FACTORS'] * d * d)


@torch.library.custom_op('mmvvt::vicinity_attention', mutates_args=())
@on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: List[int],
    key_shape: List[int],
    locality: str,
    clamp: bool,
    eps: float,
) -> Tuple[Tensor, Tensor]:
    b, heads, n, _ = q.shape
    settings = _settings(q, locality)
    sums = _take_sums(k, v, None, key_shape, settings)
    out = _new_like(q)
    blocks = triton.cdiv(settings['d'], settings['E'])
    # Launching four times as many programs as multiprocessors balances the
    # load.
    tile = _tile_tokens(1, q.dtype, settings['D'])
    chunk, chunks = split(
        n, tile, 4 * num_programs(q.device) // (b * heads * blocks)
    )
    _output[(b * heads * chunks, blocks)](
        q,
        sums,
        out,
        *q.stride(),
        *out.stride(),
        heads,
        n,
        *query_shape,
        chunk,
        chunks,
        eps,
        CLAMP=clamp,
        HOIST=q.dtype != torch.float32,
        TOKENS=tile,
        ALIGN=_align(q, out),
        **settings,
    )
    return out, sums


@_forward.register_fake
def _(q, k, v, query_shape, key_shape, locality, clamp, eps):
    b, heads, _, d = q.shape
    sums = q.new_empty(
        (b * heads, NUM_FACTORS[locality] * d * (d + 1)), dtype=torch.float32
    )
    return _new_like(q), sums


@torch.library.custom_op('mmvvt::vicinity_attention_backward', mutates_args=())
@on_its_device
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    query_shape: List[int],
    key_shape: List[int],
    locality: str,
    clamp: bool,
    eps: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    b, heads, n, _ = q.shape
    settings = _settings(q, locality)
    dq, dk, dv = (_new_like(t) for t in (q, k, v))
    # The values of t can exceed the range of float16.
    t = _new_like(
        q, torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    )
    delta = q.new_empty((b * heads, n), dtype=torch.float32)
    gradient = dict(settings)
    if q.dtype == torch.float32:
        # IEEE products read their operands from registers.
        width = settings['D']
        gradient['E'] = min(width, 2048 // width)
    tile = _tile_tokens(2, q.dtype, settings['D'])
    tiles = triton.cdiv(n, tile)
    _query_gradient[(b * heads * tiles,)](
        q,
        sums,
        grad,
        dq,
        t,
        delta,
        *q.stride(),
        *grad.stride(),
        *dq.stride(),
        *t.stride(),
        heads,
        n,
        *query_shape,
        tiles,
        eps,
        CLAMP=clamp,
        TOKENS=tile,
        ALIGN=_align(q, grad, dq, t),
        **gradient,
    )
    dsums = _take_sums(
        q, t, delta, query_shape, settings, sums if clamp else None
    )
    m = k.shape[2]
    tiles = triton.cdiv(m, tile)
    _key_gradient[(b * heads * tiles,)](
        k,
        v,
        dsums,
        dk,
        dv,
        *k.stride(),
        *v.stride(),
        *dk.stride(),
        *dv.stride(),
        heads,
        m,
        *key_shape,
        tiles,
        TOKENS=tile,
        ALIGN=_align(k, v, dk, dv),
        **gradient,
    )
    return dq, dk, dv


@_backward.register_fake
def _(grad, q, k, v, sums, query_shape, key_shape, locality, clamp, eps):
    return _new_like(q), _new_like(k), _new_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _gradients(ctx, grad, _):
    grads = _backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_shape: Tuple[int, int],
    key_shape: Tuple[int, int],
    locality: str,
    clamp: bool,
    eps: float,
) -> Tensor:
    """Linear vicinity attention on a GPU or in Triton's interpreter.

    Args:
        q (Tensor): Queries of shape ``(B, heads, N, d)``, before the ReLU, in
            float32, bfloat16 or float16. d must be at most 128. The strides
            are arbitrary.
        k (Tensor): Keys of shape ``(B, heads, M, d)``, before the ReLU, in
            the dtype of ``q``.
        v (Tensor): Values of shape ``(B, heads, M, d)``, in the dtype of
            ``q``.
        query_shape (tuple[int, int]): Query grid ``(h, w)``, N = h * w.
        key_shape (tuple[int, int]): Key grid ``(h, w)``, M = h * w.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Whether to apply the clamps of the published models.
        eps (float): Value added to the sum of weights.

    Returns:
        Tensor: Output of shape ``(B, heads, N, d)``, stored in memory as
        ``(B, N, heads, d)``.
    """
    return _forward(q, k, v, query_shape, key_shape, locality, clamp, eps)[0]
