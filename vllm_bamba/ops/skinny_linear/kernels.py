"""A linear map of few rows, which takes as long as its weights take to be read, with what stands before and behind it.

A program reads some rows of the weights once, from end to end, and multiplies them with all of x on tensor cores.
Programs begin at different places of their rows: rows lie a power of two apart, and side by side they would all ask the
same channels of the memory at once. What is read besides weights is asked for before them, and used after them.
"""

import triton
import triton.language as tl

from vllm_bamba.ops.mixer_step.kernels import silu

SUMMED = tl.constexpr(32)  # columns whose squares become one number


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, out, sums, residual, norm, weighted, squares,
    rows, x_stride, out_stride, sums_stride, share, eps,
    N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr, SUMS: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of out [rows, N] = x [rows, K] times weight [N, K] transposed, of at most ROWS rows.

    x and the weight are pointers, or DESCRIBED, as tensor descriptors of what a step takes of them.

    With SUMS, rows are divided by the root of `share` times the sum of their SUMS numbers in `sums`, plus `eps`. GATED,
    the weight is [2N, K], and out is silu(first half) * second half. ADDED, out is that plus `residual`, `weighted` is
    out times `norm`, and `squares` has sums of the squares of SUMMED columns; all of these are without gaps, as out is.
    """
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    row, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    inside = (column < N)[:, None] & (row < rows)[None, :]
    if SUMS:
        part = tl.arange(0, triton.next_power_of_2(SUMS))
        here = (part < SUMS)[:, None] & (row < rows)[None, :]
        parts = tl.load(sums + row[None, :] * sums_stride + part[:, None], mask=here, other=0)
    if ADDED:
        at_column = row[None, :] * N + column[:, None]
        before = tl.load(residual + at_column, mask=inside, other=0)
        norm_weight = tl.load(norm + column, mask=column < N, other=0)
    if not DESCRIBED:  # what stands outside repeats the last one, and is not stored
        within = tl.minimum(column, N - 1)
        if GATED:
            up_weight = weight + (N + within).to(tl.int64)[:, None] * K
        weight += within.to(tl.int64)[:, None] * K
        x += tl.minimum(row, rows - 1)[None, :] * x_stride
    steps = K // DEPTH
    first = program % steps
    y = tl.zeros([COLUMNS, ROWS], tl.float32)
    if GATED:
        up = tl.zeros([COLUMNS, ROWS], tl.float32)
    for i in tl.range(steps, num_stages=STAGES):
        step = first + i
        at = tl.where(step < steps, step, step - steps) * DEPTH
        if DESCRIBED:
            of_x = x.load([0, at]).T
            y = tl.dot(weight.load([program * COLUMNS, at]), of_x, y)
            if GATED:
                up = tl.dot(weight.load([N + program * COLUMNS, at]), of_x, up)
        else:
            w = tl.load(weight + (at + k)[None, :], eviction_policy="evict_first")
            of_x = tl.load(x + (at + k)[:, None])
            y = tl.dot(w, of_x, y)
            if GATED:
                w = tl.load(up_weight + (at + k)[None, :], eviction_policy="evict_first")
                up = tl.dot(w, of_x, up)
    if SUMS:
        factor = tl.rsqrt(tl.sum(parts.to(tl.float32), 0) * share + eps)[None, :]
        y *= factor
        if GATED:
            up *= factor
    if GATED:
        y = silu(y) * up
    dtype: tl.constexpr = out.dtype.element_ty
    if ADDED:
        y = (y + before.to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(weighted + at_column, (y * norm_weight.to(tl.float32)[:, None]).to(dtype), mask=inside)
        PARTS: tl.constexpr = COLUMNS // SUMMED
        square = tl.reshape(tl.where(inside, y * y, 0), [PARTS, SUMMED, ROWS])
        part, all_parts = program * PARTS + tl.arange(0, PARTS), (N + SUMMED - 1) // SUMMED
        here = (part < all_parts)[:, None] & (row < rows)[None, :]
        tl.store(squares + row[None, :] * all_parts + part[:, None], tl.sum(square, 1), mask=here)
    tl.store(out + row[None, :] * out_stride + column[:, None], y.to(dtype), mask=inside)
