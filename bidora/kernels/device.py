"""The Triton kernels. Their arguments are addresses and sizes; what they compute is in :mod:`bidora.kernels.plain`.

Tiles: rows of W₀ (or columns of y) × columns of W₀ (or rows of y); RANK is r, or k, padded to a power of two ≥ 16.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found, import-untyped, misc"

import triton
import triton.language as tl

__all__ = [
    "combine_kernel",
    "factor_gradients_kernel",
    "norm_cotangent_kernel",
    "row_scale_kernel",
    "scale_cotangent_kernel",
]


@triton.jit
def row_scale_kernel(
    weight, lora_A, lora_B, magnitude, out, projection, rows, columns, rank, stride_row, stride_column,
    scaling, zero, ill_conditioned, smallest,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    SPLIT: tl.constexpr, PROJECT: tl.constexpr, RECOVERABLE: tl.constexpr,
):  # fmt: skip
    """Writes g, 1/‖V‖ to ``out`` (2, rows), and VAᵀ: a pass over W₀, and another if a row is ill-conditioned."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.arange(0, RANK)
    inside = row < rows
    start_of_row = row.to(tl.int64) * stride_row
    half = tl.zeros((ROWS, RANK), tl.float32)
    gram = tl.zeros((RANK, RANK), tl.float32)
    elementwise = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed at the end: a reduction in every turn is slow
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < columns
        w = tl.load(
            weight + start_of_row[:, None] + column[None, :].to(tl.int64) * stride_column,
            mask=inside[:, None] & there[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(
            lora_A + q[:, None] * columns + column[None, :], mask=(q < rank)[:, None] & there[None, :], other=0.0
        )
        high = a.to(w.dtype)
        half = tl.dot(w, tl.trans(high), half)
        gram = tl.dot(high, tl.trans(high), gram)
        if SPLIT:
            low = (a - high.to(tl.float32)).to(w.dtype)
            half = tl.dot(w, tl.trans(low), half)
            gram = tl.dot(high, tl.trans(low), gram)
            gram = tl.dot(low, tl.trans(high), gram)
        wide = w.to(tl.float32)
        elementwise += wide * wide
    known = tl.sum(elementwise, 1)

    b = tl.load(lora_B + row[:, None] * rank + q[None, :], mask=inside[:, None] & (q < rank)[None, :], other=0.0)
    b = b.to(tl.float32)
    through = half + scaling * tl.dot(b, gram, input_precision="tf32x3")
    squares = known + scaling * tl.sum(b * (half + through), 1)
    trace = tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], gram, 0.0), 1), 0)
    ill = squares < ill_conditioned * (known + scaling * scaling * trace * tl.sum(b * b, 1))
    if tl.max(ill.to(tl.int32), 0) > 0:
        dense = tl.zeros((ROWS,), tl.float32)
        formed = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = column < columns
            v = tl.load(
                weight + start_of_row[:, None] + column[None, :].to(tl.int64) * stride_column,
                mask=inside[:, None] & there[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            for j in range(rank):
                a_j = tl.load(lora_A + j * columns + column, mask=there, other=0.0).to(tl.float32)
                b_j = tl.load(lora_B + row * rank + j, mask=inside, other=0.0).to(tl.float32)
                v += (scaling * b_j)[:, None] * a_j[None, :]
            dense += tl.sum(v * v, 1)
            if PROJECT:
                for j in range(rank):
                    a_j = tl.load(lora_A + j * columns + column, mask=there, other=0.0).to(tl.float32)
                    formed += tl.where(q[None, :] == j, tl.sum(v * a_j[None, :], 1)[:, None], 0.0)
        squares = tl.where(ill, dense, squares)
        through = tl.where(ill[:, None], formed, through)

    is_zero = squares <= zero
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, squares)))
    scale = tl.load(magnitude + row, mask=inside, other=0.0).to(tl.float32) * inverse
    if RECOVERABLE:
        moved = tl.where(scale < 0, -smallest, smallest)
        scale = tl.where((tl.abs(scale) < smallest) & (is_zero == 0), moved, scale)
    tl.store(out + row, scale, mask=inside)
    tl.store(out + rows + row, inverse, mask=inside)
    if PROJECT:
        tl.store(projection + row[:, None] * rank + q[None, :], through, mask=inside[:, None] & (q < rank)[None, :])


@triton.jit
def combine_kernel(
    base, hidden, factor, scale, bias, out, n, rows, rank, scaling,
    N: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Writes ``g ⊙ (base + s·hidden factorᵀ) + (1 − g) ⊙ bias``: base is read once, out written once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * N + tl.arange(0, N)
    q = tl.arange(0, RANK)
    inside, there, known = row < rows, i < n, q < rank
    at = i[:, None].to(tl.int64) * rows + row[None, :]
    mask = there[:, None] & inside[None, :]
    z = tl.load(base + at, mask=mask, other=0.0)
    h = tl.load(hidden + i[:, None] * rank + q[None, :], mask=there[:, None] & known[None, :], other=0.0)
    b = tl.load(factor + row[:, None] * rank + q[None, :], mask=inside[:, None] & known[None, :], other=0.0)
    g = tl.load(scale + row, mask=inside, other=0.0)
    y = g[None, :] * (z.to(tl.float32) + scaling * tl.dot(h, tl.trans(b)))
    if BIAS:
        shift = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        y += ((1.0 - g) * shift)[None, :]
    tl.store(out + at, y.to(z.dtype), mask=mask)


@triton.jit
def scale_cotangent_kernel(
    cotangent, kept, hidden, factor, scale, bias, out, parts, n, rows, rank, scaling,
    N: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, SUMS: tl.constexpr, BASE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Writes ``g ⊙ dy`` and the column sums of ``dy ⊙ z`` over N rows: dy and the kept tensor are read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * N + tl.arange(0, N)
    inside, there = row < rows, i < n
    at = i[:, None].to(tl.int64) * rows + row[None, :]
    mask = there[:, None] & inside[None, :]
    dy = tl.load(cotangent + at, mask=mask, other=0.0)
    g = tl.load(scale + row, mask=inside, other=0.0)
    wide = dy.to(tl.float32)
    tl.store(out + at, (wide * g[None, :]).to(dy.dtype), mask=mask)
    if SUMS:
        z = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
        if BASE:
            q = tl.arange(0, RANK)
            known = q < rank
            h = tl.load(hidden + i[:, None] * rank + q[None, :], mask=there[:, None] & known[None, :], other=0.0)
            b = tl.load(factor + row[:, None] * rank + q[None, :], mask=inside[:, None] & known[None, :], other=0.0)
            z += scaling * tl.dot(h, tl.trans(b))
            if BIAS:
                z -= tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
        else:
            z *= tl.where(g == 0.0, 0.0, 1.0 / tl.where(g == 0.0, 1.0, g))[None, :]
        tl.store(parts + tl.program_id(1) * rows + row, tl.sum(wide * z, 0), mask=inside)


@triton.jit
def norm_cotangent_kernel(
    parts, inverse, magnitude, lora_B, gradient, coefficient, weighted, num_parts, rows, rank, padded,
    ROWS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Writes dm, k and ``(k ⊙ B)ᵀ``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    part = tl.arange(0, PARTS)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_parts, PARTS):
        index = start + part
        mask = (index < num_parts)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(parts + index[:, None] * rows + row[None, :], mask=mask, other=0.0), 0)
    reciprocal = tl.load(inverse + row, mask=inside, other=0.0)
    dm = sums * reciprocal
    k = -0.5 * dm * tl.load(magnitude + row, mask=inside, other=0.0).to(tl.float32) * reciprocal * reciprocal
    tl.store(gradient + row, dm.to(gradient.dtype.element_ty), mask=inside)
    tl.store(coefficient + row, k, mask=inside)
    if FACTORS:
        q = tl.arange(0, RANK)
        b = tl.load(lora_B + row[:, None] * rank + q[None, :], mask=inside[:, None] & (q < rank)[None, :], other=0.0)
        b = b.to(tl.float32)
        kb = tl.trans(k[:, None] * b)
        tl.store(
            weighted + q[:, None].to(tl.int64) * rows + row[None, :],
            kb.to(weighted.dtype.element_ty),
            mask=(q < padded)[:, None] & inside[None, :],
        )


@triton.jit
def factor_gradients_kernel(
    product_A, product_B, through_weight, gram, coefficient, projection, lora_A, gradient_A, gradient_B,
    rows, columns, rank, scaling, programs_A,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """The first programs write ``s·product_A + 2s·(through_weight + s·gram A)``, the others dB."""
    program = tl.program_id(0)
    q = tl.arange(0, RANK)
    known = q < rank
    if HAS_A:  # noqa: SIM102 (decided when it is compiled)
        if program < programs_A:
            column = program * COLUMNS + tl.arange(0, COLUMNS)
            there = column < columns
            square = tl.load(
                gram + q[:, None] * rank + q[None, :], mask=known[:, None] & known[None, :], other=0.0
            ).to(tl.float32)  # fmt: skip
            at = q[:, None] * columns + column[None, :]
            mask = known[:, None] & there[None, :]
            a = tl.load(lora_A + at, mask=mask, other=0.0).to(tl.float32)
            through = tl.load(through_weight + at, mask=mask, other=0.0).to(tl.float32)
            through += scaling * tl.dot(square, a, input_precision="tf32x3")
            value = scaling * tl.load(product_A + at, mask=mask, other=0.0).to(tl.float32) + 2 * scaling * through
            tl.store(gradient_A + at, value.to(gradient_A.dtype.element_ty), mask=mask)
    if HAS_B:  # noqa: SIM102
        if program >= programs_A:
            row = (program - programs_A) * ROWS + tl.arange(0, ROWS)
            inside = row < rows
            at = row[:, None] * rank + q[None, :]
            mask = inside[:, None] & known[None, :]
            k = tl.load(coefficient + row, mask=inside, other=0.0)
            value = scaling * tl.load(product_B + at, mask=mask, other=0.0).to(tl.float32)
            value += 2 * scaling * k[:, None] * tl.load(projection + at, mask=mask, other=0.0)
            tl.store(gradient_B + at, value.to(gradient_B.dtype.element_ty), mask=mask)
