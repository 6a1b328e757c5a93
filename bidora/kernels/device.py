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
    base, hidden, factor, stats, bias, out, n, rows, rank, scaling,
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
    g = tl.load(stats + row, mask=inside, other=0.0)
    y = g[None, :] * (z.to(tl.float32) + scaling * tl.dot(h, tl.trans(b)))
    if BIAS:
        shift = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        y += ((1.0 - g) * shift)[None, :]
    tl.store(out + at, y.to(z.dtype), mask=mask)


@triton.jit
def scale_cotangent_kernel(
    cotangent, kept, hidden, factor, stats, bias, out, parts, through, n, rows, rank, span, scaling,
    N: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    SUMS: tl.constexpr, BASE: tl.constexpr, BIAS: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """Writes ``dz = g ⊙ dy``, a part of ``dz factor`` and of the column sums of ``dy ⊙ z``: one pass over dy and z.

    A program has N rows of dy and ``span`` columns.
    """
    i = tl.program_id(0) * N + tl.arange(0, N)
    q = tl.arange(0, RANK)
    there, known = i < n, q < rank
    start_of_row = i[:, None].to(tl.int64) * rows
    total = tl.zeros((N, RANK), tl.float32)
    if BASE:
        h = tl.load(hidden + i[:, None] * rank + q[None, :], mask=there[:, None] & known[None, :], other=0.0)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        at = start_of_row + row[None, :]
        mask = there[:, None] & inside[None, :]
        dy = tl.load(cotangent + at, mask=mask, other=0.0)
        g = tl.load(stats + row, mask=inside, other=0.0)
        wide = dy.to(tl.float32)
        dz = (wide * g[None, :]).to(dy.dtype)
        tl.store(out + at, dz, mask=mask)
        if THROUGH or BASE:
            b = tl.load(factor + row[:, None] * rank + q[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        if THROUGH:
            total = tl.dot(dz, b, total)
        if SUMS:
            z = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
            if BASE:
                z += scaling * tl.dot(h, tl.trans(b))
                if BIAS:
                    z -= tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
            else:
                z *= tl.where(g == 0.0, 0.0, 1.0 / tl.where(g == 0.0, 1.0, g))[None, :]
            tl.store(parts + tl.program_id(0) * rows + row, tl.sum(wide * z, 0), mask=inside)
    if THROUGH:
        at = through + (tl.program_id(1) * n + i)[:, None].to(tl.int64) * rank + q[None, :]
        tl.store(at, total.to(through.dtype.element_ty), mask=there[:, None] & known[None, :])


@triton.jit
def norm_cotangent_kernel(
    parts, through, stats, magnitude, lora_B, gradient, coefficient, gram, cotangents, summed,
    n, num_parts, rows, rank, padded, splits, width, programs,
    ROWS: tl.constexpr, TURNS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, FACTORS: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The first programs write the norm's cotangents, the others ``dz factor``, N rows each."""
    program = tl.program_id(0)
    if program < programs:
        _norm_cotangent(
            program, parts, stats, magnitude, lora_B, gradient, coefficient, gram, cotangents, n, num_parts, rows, rank,
            padded, ROWS, TURNS, PARTS, RANK, FACTORS,
        )  # fmt: skip
    else:
        if SUM:  # decided when it is compiled
            _sum_of_parts(program - programs, through, summed, splits, n, width, N, WIDTH)


@triton.jit
def _norm_cotangent(
    program, parts, stats, magnitude, lora_B, gradient, coefficient, gram, cotangents, offset, num_parts, rows, rank,
    padded,
    ROWS: tl.constexpr, TURNS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Writes dm, k, ``(k ⊙ B)ᵀ`` below ``offset`` rows of cotangents, and this program's part of ``(k ⊙ B)ᵀB``."""
    q = tl.arange(0, RANK)
    part = tl.arange(0, PARTS)
    total = tl.zeros((RANK, RANK), tl.float32)
    for turn in range(TURNS):
        row = (program * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        sums = tl.zeros((PARTS, ROWS), tl.float32)
        for start in range(0, num_parts, PARTS):
            index = start + part
            mask = (index < num_parts)[:, None] & inside[None, :]
            sums += tl.load(parts + index[:, None] * rows + row[None, :], mask=mask, other=0.0)
        inverse = tl.load(stats + rows + row, mask=inside, other=0.0)
        dm = tl.sum(sums, 0) * inverse
        k = -0.5 * dm * tl.load(magnitude + row, mask=inside, other=0.0).to(tl.float32) * inverse * inverse
        tl.store(gradient + row, dm.to(gradient.dtype.element_ty), mask=inside)
        tl.store(coefficient + row, k, mask=inside)
        if FACTORS:
            known = inside[:, None] & (q < rank)[None, :]
            b = tl.load(lora_B + row[:, None] * rank + q[None, :], mask=known, other=0.0).to(tl.float32)
            kb = tl.trans(k[:, None] * b)
            at = (offset + q[:, None]).to(tl.int64) * rows + row[None, :]
            mask = (q < padded)[:, None] & inside[None, :]
            tl.store(cotangents + at, kb.to(cotangents.dtype.element_ty), mask=mask)
            total = tl.dot(kb, b, total, input_precision="tf32x3")
    if FACTORS:
        at = gram + program * rank * rank + q[:, None] * rank + q[None, :]
        tl.store(at, total, mask=(q < rank)[:, None] & (q < rank)[None, :])


@triton.jit
def _sum_of_parts(program, parts, out, num_parts, n, width, N: tl.constexpr, WIDTH: tl.constexpr):
    """Writes N rows of the sum of ``parts`` (num_parts, n, width) over its first dimension."""
    i = program * N + tl.arange(0, N)
    column = tl.arange(0, WIDTH)
    at = i[:, None].to(tl.int64) * width + column[None, :]
    mask = (i < n)[:, None] & (column < width)[None, :]
    total = tl.zeros((N, WIDTH), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * n * width + at, mask=mask, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def factor_gradients_kernel(
    product_A, product_B, through_weight, gram, coefficient, projection, lora_A, gradient_A, gradient_B,
    offset, num_parts, rows, columns, rank, width, scaling, programs_A,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The first programs write ``s·product_A + 2s·(through_weight + s·gram A)``, the others dB."""
    program = tl.program_id(0)
    q = tl.arange(0, RANK)
    known = q < rank
    if HAS_A:  # noqa: SIM102 (decided when it is compiled)
        if program < programs_A:
            column = program * COLUMNS + tl.arange(0, COLUMNS)
            there = column < columns
            total = tl.zeros((RANK, RANK), tl.float32)
            square = q[:, None] * rank + q[None, :]
            for part in range(num_parts):
                total += tl.load(gram + part * rank * rank + square, mask=known[:, None] & known[None, :], other=0.0)
            at = q[:, None] * columns + column[None, :]
            mask = known[:, None] & there[None, :]
            a = tl.load(lora_A + at, mask=mask, other=0.0).to(tl.float32)
            weighted = (offset + q[:, None]).to(tl.int64) * columns + column[None, :]
            through = tl.load(through_weight + weighted, mask=mask, other=0.0).to(tl.float32)
            through += scaling * tl.dot(total, a, input_precision="tf32x3")
            value = tl.load(product_A + at, mask=mask, other=0.0).to(tl.float32)
            if SPLIT:
                value += tl.load(product_A + 2 * rank * columns + at, mask=mask, other=0.0).to(tl.float32)
            value = scaling * value + 2 * scaling * through
            tl.store(gradient_A + at, value.to(gradient_A.dtype.element_ty), mask=mask)
    if HAS_B:  # noqa: SIM102
        if program >= programs_A:
            row = (program - programs_A) * ROWS + tl.arange(0, ROWS)
            inside = row < rows
            at = row[:, None] * rank + q[None, :]
            mask = inside[:, None] & known[None, :]
            k = tl.load(coefficient + row, mask=inside, other=0.0)
            wide = product_B + row[:, None] * width + q[None, :]
            value = tl.load(wide, mask=mask, other=0.0).to(tl.float32)
            if SPLIT:
                value += tl.load(wide + rank, mask=mask, other=0.0).to(tl.float32)
            value = scaling * value + 2 * scaling * k[:, None] * tl.load(projection + at, mask=mask, other=0.0)
            tl.store(gradient_B + at, value.to(gradient_B.dtype.element_ty), mask=mask)
