"""RMSNorm of a sum, one program a row."""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    y, residual, weight, sums, total, normed, sums_stride, share, earlier_eps, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, SUMS_BLOCK: tl.constexpr,
):  # fmt: skip
    """`share` times the sum of `sums`' SUMS columns is the mean square by which y is divided first."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < CHANNELS
    here = row * CHANNELS + c
    added = tl.load(y + here, mask=inside, other=0).to(tl.float32)
    before = tl.load(residual + here, mask=inside, other=0).to(tl.float32)
    if SUMS:
        s = tl.arange(0, SUMS_BLOCK)
        parts = tl.load(sums + row * sums_stride + s, mask=s < SUMS, other=0).to(tl.float32)
        added *= tl.rsqrt(tl.sum(parts, 0) * share + earlier_eps)
    rounded = (added + before).to(total.dtype.element_ty)
    tl.store(total + here, rounded, mask=inside)
    z = rounded.to(tl.float32)
    z *= tl.rsqrt(tl.sum(z * z, 0) / CHANNELS + eps)
    z *= tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    tl.store(normed + here, z.to(normed.dtype.element_ty), mask=inside)
