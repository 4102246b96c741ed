r"""The ``triton`` backend of vicinity attention: fused kernels.

Every locality is a sum of J products of a query's and a key's factor, its
weight being :math:`\sum_j f_j(p) g_j(r)` (J is 4 for 'sum' and 'product', 2
for '1d', 1 for 'none'; f and g are the same cosines and sines on the two
grids). With q and k after the ReLU, and c the clamp, one head computes

.. math::
    S_j = \sum_r g_j(r) k_r^T v_r, \quad s_j = \sum_r g_j(r) k_r, \\
    n_p = \sum_j f_j(p) q_p c(S_j), \quad
    z_p = 1 / (\sum_j f_j(p) q_p \cdot s_j + eps), \\
    o_p = c(c(n_p) c(z_p)).

The forward pass takes the sums in one sweep over the keys and the output in
one over the queries. For the backward pass let :math:`g_p` be the gradient of
:math:`o_p` where the last clamp lets it through. Then, again up to the clamps'
own gradients (1 inside the bounds, 0 outside),

.. math::
    t_p = c(z_p) g_p, \quad \delta_p = -z_p^2 \, g_p \cdot c(n_p), \\
    dq_p = \sum_j f_j(p) (t_p c(S_j)^T + \delta_p s_j), \\
    dS_j = \sum_p f_j(p) q_p^T t_p, \quad ds_j = \sum_p f_j(p) \delta_p q_p, \\
    dk_r = \sum_j g_j(r) (v_r dS_j^T + ds_j), \quad
    dv_r = \sum_j g_j(r) k_r dS_j.

dS and ds have the form of S and s, and come from the same kernel. Kept for
the backward pass are q, k, v and the sums; numerator and normaliser are made
anew.

Rounding: factors, clamps and sums are float32; what a matrix product takes
depends on the inputs. Of bfloat16 inputs it takes bfloat16: q and v as they
come, k times its factor rounded once (a factor rounded by itself would be one
error common to all of a token), the clamped S, dS and t rounded. float16 has
too few exponents for sums and gradients, so those products run in TF32, which
holds a float16 exactly. Products of float32 are IEEE float32.

Sums over blocks of tokens are written side by side and added in a fixed
order: the same call gives the same bits.
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

# Grids and chunk counts change from call to call; to compile anew for a 1 or
# a multiple of 16 among them would gain nothing.
_SIZES = ['heads', 'tokens', 'h', 'w']


@triton.jit
def _angle(index, length):
    # The two roundings of angles.axis_angles, in its order.
    return tl.div_rn(index.to(tl.float32) * _HALF_PI, length.to(tl.float32))


@triton.jit
def _sine(x):
    """Sine within [0, pi / 2], to float32.

    Seven terms of Taylor's series: the eighth is below 1e-9. The library's
    sine carries code for any angle, and a stack for it.
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
    # pi / 2 in two parts: near pi / 2 the cosine is what is left of it.
    return _sine((-x + _HALF_PI) - 4.371139e-8)


@triton.jit
def _tables(token, tokens, h, w, LOCALITY: tl.constexpr):
    """Cosine and sine along rows (or the sequence), then along columns."""
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
        # The tensor cores drop these bits.
        x, y = round_bits(x, 13), round_bits(y, 13)
    if _INTERPRETED:  # it would multiply the bits of a bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _head_offset(pair, heads, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where one head of one image begins; `pair` is image * heads + head."""
    pair = pair.to(tl.int64)
    offset = pair // heads * stride_b + pair % heads * stride_h
    # A stride of 40 is no multiple of 16, but 16-byte loads need to know
    # that it is one of 8.
    return tl.multiple_of(offset, ALIGN)


@triton.jit
def _tile(pointer, token, column, stride_n, stride_d):
    # (tokens, columns)
    return (
        pointer
        + token[:, None].to(tl.int64) * stride_n
        + column[None, :] * stride_d
    )


@triton.jit(do_not_specialize=_SIZES + ['chunk', 'chunks'])
def _partial_sums(
    x_ptr,
    y_ptr,
    weight_ptr,
    partial_ptr,
    x_b,
    x_h,
    x_n,
    x_d,
    y_b,
    y_h,
    y_n,
    y_d,
    heads,
    tokens,
    h,
    w,
    chunk,
    chunks,
    d: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over a chunk of tokens, for one head and E columns of y:

    ``S_j = sum f_j relu(x)^T y`` and ``s_j = sum f_j weight relu(x)``.
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
    k_0 = tl.zeros((D,), tl.float32)
    k_1 = tl.zeros((D,), tl.float32)
    k_2 = tl.zeros((D,), tl.float32)
    k_3 = tl.zeros((D,), tl.float32)
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
            key = tl.sum(scaled * weight[:, None], axis=0)
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

    # (chunks, B * heads, J * d * d + J * d): all S_j, then all s_j
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
        tl.store(k_ptr + j * d, key, mask=k_mask)


@triton.jit
def _load_sums(
    sums_ptr, j, rows, columns, d: tl.constexpr, CLAMP: tl.constexpr
):
    sums = tl.load(
        sums_ptr + j * d * d + rows[:, None] * d + columns[None, :],
        mask=(rows < d)[:, None] & (columns < d)[None, :],
        other=0.0,
    )
    return clamp(sums) if CLAMP else sums


@triton.jit
def _mix_key_sums(
    sums_ptr,
    rows,
    cos_a,
    sin_a,
    cos_b,
    sin_b,
    d: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
):
    """``sum_j f_j s_j`` for each token, ``(tokens, D)``."""
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
    # 1 / 0 beyond the last token would reach the sums as NaN.
    weight = tl.where(real, tl.sum(q * key, axis=1) + eps, 1.0)
    return tl.div_rn(1.0, weight)


@triton.jit
def _through_sums(
    x,
    sums_ptr,
    columns,
    cos_a,
    sin_a,
    cos_b,
    sin_b,
    d: tl.constexpr,
    D: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
    CLAMP: tl.constexpr,
    BACK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum_j f_j x S_j``, or with the transpose of S_j on the way back.

    A loop that is not unrolled: IEEE products take their operands from
    registers, and those of one j fit. The others load the next S_j ahead.
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
    q_ptr,
    sums_ptr,
    out_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    o_b,
    o_h,
    o_n,
    o_d,
    heads,
    tokens,
    h,
    w,
    chunk,
    chunks,
    eps,
    d: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
    CLAMP: tl.constexpr,
    HOIST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E columns of the output, for a chunk of one head's tokens."""
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
    q_ptr,
    sums_ptr,
    grad_ptr,
    dq_ptr,
    t_ptr,
    delta_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    g_b,
    g_h,
    g_n,
    g_d,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
    t_b,
    t_h,
    t_n,
    t_d,
    heads,
    tokens,
    h,
    w,
    tiles,
    eps,
    d: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
    CLAMP: tl.constexpr,
    ALIGN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, t and delta (see the top of the file) of a tile of tokens."""
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
    k_ptr,
    v_ptr,
    dsums_ptr,
    dk_ptr,
    dv_ptr,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    dk_b,
    dk_h,
    dk_n,
    dk_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    heads,
    tokens,
    h,
    w,
    tiles,
    d: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    FACTORS: tl.constexpr,
    LOCALITY: tl.constexpr,
    ALIGN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of tokens."""
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


# Tokens of a tile, in the kernels of sums, output and gradients.
_TILES = {
    torch.bfloat16: (64, 64, 64),
    torch.float16: (32, 32, 32),
    torch.float32: (16, 32, 32),
}


def _settings(q: Tensor, locality: str) -> dict:
    """What all kernels over tokens are compiled with."""
    d = q.shape[-1]
    width = max(16, triton.next_power_of_2(d))  # tl.dot wants 16 at least
    # The J * D * E sums of a program live in registers: 16 384 at most, 64
    # for each of 256 threads.
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
    """Largest power of two, up to 16, that divides where heads begin."""
    return math.gcd(16, *(t.stride(i) for t in tensors for i in (0, 1)))


def _new_like(t: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Uninitialised, in the memory order of tokens: ``(B, N, heads, d)``."""
    b, heads, n, d = t.shape
    # (B, N, heads, d) -> (B, heads, N, d)
    return t.new_empty((b, n, heads, d), dtype=dtype).transpose(1, 2)


def _take_sums(x, y, weight, grid_shape, settings, forward=None) -> Tensor:
    """Sums over all tokens, ``(B * heads, J * d * d + J * d)``, float32.

    Args:
        x (Tensor): ``(B, heads, N, d)`` before the ReLU.
        y (Tensor): ``(B, heads, N, d)``.
        weight (Tensor, optional): ``(B * heads, N)``, of the sums of x.
        grid_shape (tuple[int, int]): Grid, N = h * w.
        settings (dict): See :func:`_settings`.
        forward (Tensor, optional): The forward pass's sums, whose clamp
            decides which of these are 0.
    """
    b, heads, n, d = x.shape
    pairs, blocks = b * heads, triton.cdiv(d, settings['E'])
    # A chunk writes J * d * E numbers, as many as hundreds of tokens have:
    # no more chunks than fill the device.
    tile = _TILES[x.dtype][0]
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
    # Four times as many programs as fill the device even out its load.
    tile = _TILES[q.dtype][1]
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
    # t has no bounds that float16 could keep.
    t = _new_like(
        q, torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    )
    delta = q.new_empty((b * heads, n), dtype=torch.float32)
    tile = _TILES[q.dtype][2]
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
        **settings,
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
        **settings,
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
    """Linear vicinity attention, on a GPU or in Triton's interpreter.

    Args:
        q (Tensor): ``(B, heads, N, d)`` before the ReLU, d at most 128, of
            any strides; float32, bfloat16 or float16, as k and v.
        k (Tensor): ``(B, heads, M, d)`` before the ReLU.
        v (Tensor): ``(B, heads, M, d)``.
        query_shape (tuple[int, int]): Query grid, N = h * w.
        key_shape (tuple[int, int]): Key grid, M = h * w.
        locality (str): 'sum', 'product', '1d' or 'none'.
        clamp (bool): Apply the clamps of the published models.
        eps (float): Added to the sum of weights.

    Returns:
        Tensor: ``(B, heads, N, d)``, in memory ``(B, N, heads, d)``.
    """
    return _forward(q, k, v, query_shape, key_shape, locality, clamp, eps)[0]
