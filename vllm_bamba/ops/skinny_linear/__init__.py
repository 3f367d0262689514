"""A linear map of few rows: decode steps of small batches, which wait for nothing but weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_bamba.ops.skinny_linear.kernels import linear_kernel
from vllm_bamba.ops.skinny_linear.tuning import Launch, launches_for


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, launches: Sequence[Launch] | None = None) -> torch.Tensor:
    """x times weight transposed; what no launch serves goes to PyTorch's product.

    Args:
        x: [rows, K]; its rows may be parts of longer ones.
        weight: [N, K], of x's dtype.
        launches: from which to choose, in ascending order of rows; by default what is tuned for the GPU. None of them
            serves more rows than it says, another dtype than bf16, a K that its depth does not divide, or a weight that
            is not contiguous.

    Returns:
        [rows, N] in x's dtype, summed in fp32.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    rows, depth = x.shape
    if weight.shape[1] != depth or weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} of {x.dtype} and weight {tuple(weight.shape)} of {weight.dtype} do not fit"
        )
    if launches is None:
        launches = launches_for(weight)
    launch = next((o for o in launches if rows <= o.rows and depth % o.depth == 0), None)
    plain = x.dtype != torch.bfloat16 or x.stride(1) != 1 or not weight.is_contiguous()
    if launch is None or plain or rows == 0:
        return F.linear(x, weight)
    out = x.new_empty(rows, len(weight))
    stride = x.stride(0) if rows > 1 else depth  # that of a single row means nothing
    aligned = stride >= depth and stride % 8 == 0 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    described = launch.described and aligned  # descriptors are of rows at multiples of 16 bytes
    read: tuple[Any, Any] = (x, weight)
    if described:
        read = (
            TensorDescriptor(x, [rows, depth], [stride, 1], [launch.rows, launch.depth]),
            TensorDescriptor(weight, [*weight.shape], [depth, 1], [launch.columns, launch.depth]),
        )
        stride = depth  # of no use to the kernel, which would be compiled again for others
    linear_kernel[(triton.cdiv(len(weight), launch.columns),)](
        *read, out, rows, stride, out.stride(0),
        N=len(weight), K=depth, ROWS=launch.rows, COLUMNS=launch.columns, DEPTH=launch.depth,
        STAGES=launch.num_stages, DESCRIBED=described, num_warps=launch.num_warps,
    )  # fmt: skip
    return out


def warm_up(weight: torch.Tensor) -> None:
    """Have the kernels made that serve a weight [N, K], for rows of x that lie a multiple of 16 numbers apart.

    So do all of the released models on up to 16 ranks. Weights that divide alike by 16 share kernels.
    """
    for launch in launches_for(weight):
        skinny_linear(weight.new_zeros(launch.rows, weight.shape[1]), weight, [launch])
