"""RMSNorm of a sum, whose one part may still have to be divided by another norm."""

import torch
import triton

from vllm_bamba.ops.add_rms_norm.kernels import add_rms_norm_kernel
from vllm_bamba.ops.gated_norm import Division, kernel_arguments


def add_rms_norm(
    y: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, division: Division | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, divided where that is left to do, plus residual; and weight * that, normalised.

    Args:
        y, residual: [tokens, channels], contiguous.
        weight: [channels], of the norm that reads the sum.
        eps: of that norm.
        division: what is left of an earlier norm, on y.

    Returns:
        The sum, rounded, and it normalised: both like y.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    tokens, channels = y.shape
    fit = residual.shape == y.shape and weight.shape == (channels,)
    if not fit or not all(given.is_contiguous() for given in (y, residual, weight)):
        shapes = [tuple(given.shape) for given in (y, residual, weight)]
        raise ValueError("y {}, residual {} and weight {} do not fit, or have gaps".format(*shapes))
    if division is not None:
        division.check(tokens)
    total, normed = torch.empty_like(y), torch.empty_like(y)
    sums, stride, columns, share, earlier = kernel_arguments(division)
    if tokens:
        add_rms_norm_kernel[(tokens,)](
            y, residual, weight, sums, total, normed, stride, share, earlier, eps,
            CHANNELS=channels, BLOCK=triton.next_power_of_2(channels), SUMS=columns,
            SUMS_BLOCK=triton.next_power_of_2(columns), num_warps=8,
        )  # fmt: skip
    return total, normed
