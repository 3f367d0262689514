"""A linear map of few rows: decode steps of small batches, which wait for nothing but weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_bamba.ops.gated_norm import Division, kernel_arguments
from vllm_bamba.ops.skinny_linear.kernels import SUMMED, linear_kernel
from vllm_bamba.ops.skinny_linear.tuning import Launch, first_for, fitting, launches_for
from vllm_bamba.warm_up import Call


class Sum(NamedTuple):
    """A residual that a linear map was added to, for a linear map behind an RMS norm.

    Attributes:
        total: [rows, N], the sum.
        weighted: like it, times the norm's weights.
        squares: fp32 [rows, N / 32]; each row adds up to the sum of squares of `total`.
    """

    total: torch.Tensor
    weighted: torch.Tensor
    squares: torch.Tensor


def squares_of(columns: int) -> int:
    """Columns of `Sum.squares`."""
    return -(-columns // SUMMED.value)


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
    _check(x, weight)
    launch = first_for(launches_for(weight) if launches is None else launches, *x.shape)
    plain = x.dtype != torch.bfloat16 or x.stride(1) != 1 or not weight.is_contiguous()
    if launch is None or plain or not len(x):
        return F.linear(x, weight)
    out = x.new_empty(len(x), len(weight))
    _run(x, weight, launch, out)
    return out


def divided_linear(
    x: torch.Tensor, division: Division | None, weight: torch.Tensor, launches: Sequence[Launch], gated: bool = False
) -> torch.Tensor:
    """A linear map of what is still to be divided, by an RMS norm.

    Args:
        x: bf16 [rows, K], what is normalised times the norm's weights; its rows may be parts of longer ones.
        division: by what each row is divided; None where that is done.
        weight: bf16 [N, K], contiguous; gated, it is [2N, K].
        launches: from which to choose, in ascending order of rows.
        gated: have silu(first half) * second half of the map.

    Returns:
        bf16 [rows, N].

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or no launch serves them.
    """
    _check_all(x, weight, division)
    out = x.new_empty(len(x), len(weight) // 2 if gated else len(weight))
    _run(x, weight, _serving(launches, x), out, division, gated)
    return out


def added_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    launches: Sequence[Launch],
    division: Division | None = None,
) -> Sum:
    """A linear map of x, divided where that is still to be done, plus a residual, for whoever reads that normalised.

    Args:
        x: bf16 [rows, K]; its rows may be parts of longer ones.
        weight: bf16 [N, K], contiguous.
        residual: bf16 [rows, N], contiguous.
        norm: [N], the weights of the RMS norm that reads the sum.
        launches: from which to choose, in ascending order of rows.
        division: by what each row of the map is divided first.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or no launch serves them.
    """
    _check_all(x, weight, division)
    shapes = residual.shape == (len(x), len(weight)) and norm.shape == weight.shape[:1]
    if not shapes or not residual.is_contiguous() or not norm.is_contiguous():
        raise ValueError(f"residual {tuple(residual.shape)} and norm {tuple(norm.shape)} do not fit, or have gaps")
    squares = x.new_empty(len(x), squares_of(len(weight)), dtype=torch.float32)
    made = Sum(torch.empty_like(residual), torch.empty_like(residual), squares)
    addition = (residual, norm, made.weighted, made.squares)
    _run(x, weight, _serving(launches, x), made.total, division, addition=addition)
    return made


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} of {x.dtype} and weight {tuple(weight.shape)} of {weight.dtype} do not fit"
        )


def _check_all(x: torch.Tensor, weight: torch.Tensor, division: Division | None) -> None:
    _check(x, weight)
    if x.dtype != torch.bfloat16 or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x and weight of {x.dtype} must be of bfloat16, rows and weights without gaps")
    if division is not None:
        division.check(len(x))


def _serving(launches: Sequence[Launch], x: torch.Tensor) -> Launch:
    launch = first_for(launches, *x.shape)
    if launch is None:
        raise ValueError(f"x {tuple(x.shape)} is served by none of {launches}")
    return launch


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    launch: Launch,
    out: torch.Tensor,
    division: Division | None = None,
    gated: bool = False,
    addition: tuple[torch.Tensor | None, ...] = (None, None, None, None),
) -> None:
    rows, depth = x.shape
    columns = out.shape[1]
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
    sums, sums_stride, width, share, eps = kernel_arguments(division)
    linear_kernel[(triton.cdiv(columns, launch.columns),)](
        *read, out, sums, *addition, rows, stride, out.stride(0), sums_stride, share, eps,
        N=columns, K=depth, ROWS=launch.rows, COLUMNS=launch.columns, DEPTH=launch.depth,
        STAGES=launch.num_stages, DESCRIBED=described, SUMS=width, GATED=gated, ADDED=addition[0] is not None,
        num_warps=launch.num_warps,
    )  # fmt: skip


def skinny_warm_ups(weight: torch.Tensor) -> list[Call]:
    """What has the kernels made that serve a weight [N, K], for rows of x that lie a multiple of 16 numbers apart.

    So do all of the released models on up to 16 ranks. Weights that divide alike by 16 share kernels.
    """
    return [partial(_multiply, weight, launch) for launch in launches_for(weight)]


def divided_warm_ups(weight: torch.Tensor, columns: int, launches: Sequence[Launch], gated: bool) -> list[Call]:
    """The same of `divided_linear`, with so many columns of fp32 sums, or none."""
    return [partial(_divide, weight, columns, launch, gated) for launch in fitting(launches, weight.shape[1])]


def added_warm_ups(weight: torch.Tensor, columns: int, launches: Sequence[Launch]) -> list[Call]:
    """The same of `added_linear`, with so many columns of sums behind x, or none."""
    return [partial(_add, weight, columns, launch) for launch in launches]


def _multiply(weight: torch.Tensor, launch: Launch) -> None:
    skinny_linear(weight.new_zeros(launch.rows, weight.shape[1]), weight, [launch])


def _divide(weight: torch.Tensor, columns: int, launch: Launch, gated: bool) -> None:
    x = weight.new_zeros(launch.rows, weight.shape[1])
    sums = x.new_ones(launch.rows, columns, dtype=torch.float32)
    divided_linear(x, Division(sums, 1, 0.0) if columns else None, weight, [launch], gated)


def _add(weight: torch.Tensor, columns: int, launch: Launch) -> None:
    outputs, depth = weight.shape
    x, sums = weight.new_ones(launch.rows, depth + columns).split([depth, columns], 1)
    division = Division(sums, 1, 0.0) if columns else None
    added_linear(x, weight, x.new_zeros(launch.rows, outputs), x.new_zeros(outputs), [launch], division)
