"""The gate and the sum of squares of a gated norm whose division comes later, one program a row."""

import triton
import triton.language as tl

from vllm_bamba.ops.mixer_step.kernels import in_two, silu


@triton.jit
def gate_kernel(
    x, gate, weight, out, x_stride, gate_stride, out_stride,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < COLUMNS
    z = tl.load(x + row * x_stride + c, mask=inside, other=0).to(tl.float32)
    z *= silu(tl.load(gate + row * gate_stride + c, mask=inside, other=0).to(tl.float32))
    out += row * out_stride
    tl.store(out + c, (z * tl.load(weight + c, mask=inside, other=0).to(tl.float32)).to(out.dtype.element_ty), inside)
    high, low = in_two(tl.sum(z * z, 0), out.dtype.element_ty)
    tl.store(out + COLUMNS + c, tl.where(c == 0, high, tl.where(c == 1, low, 0.0)).to(out.dtype.element_ty), c < SUMS)
