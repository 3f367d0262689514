"""A linear map of few rows, which takes as long as its weights take to be read.

A program reads some rows of the weights once, from end to end, and multiplies them with all of x on tensor cores.
Programs begin at different places of their rows: rows lie a power of two apart, and side by side they would all ask the
same channels of the memory at once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, out, rows, x_stride, out_stride,
    N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of out [rows, N] = x [rows, K] times weight [N, K] transposed, of at most ROWS rows.

    x and the weight are pointers, or DESCRIBED, as tensor descriptors of what a step takes of them.
    """
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    row, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    if not DESCRIBED:  # what stands outside repeats the last one, and is not stored
        weight += tl.minimum(column, N - 1).to(tl.int64)[:, None] * K
        x += tl.minimum(row, rows - 1)[None, :] * x_stride
    steps = K // DEPTH
    first = program % steps
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for i in tl.range(steps, num_stages=STAGES):
        step = first + i
        at = tl.where(step < steps, step, step - steps) * DEPTH
        if DESCRIBED:
            sums = tl.dot(weight.load([program * COLUMNS, at]), x.load([0, at]).T, sums)
        else:
            w = tl.load(weight + (at + k)[None, :], eviction_policy="evict_first")
            sums = tl.dot(w, tl.load(x + (at + k)[:, None]), sums)
    tl.store(
        out + row[None, :] * out_stride + column[:, None],
        sums.to(out.dtype.element_ty),
        mask=(column < N)[:, None] & (row < rows)[None, :],
    )
