"""RMSNorm of a sum, whose one part may still have to be divided by another norm."""

import torch
import triton

from vllm_bamba.ops.add_rms_norm.kernels import add_rms_norm_kernel
from vllm_bamba.ops.gated_norm import Division


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
        ValueError: shapes do not fit each other.
    """
    tokens, channels = y.shape
    if residual.shape != y.shape or weight.shape != (channels,) or not (y.is_contiguous() and residual.is_contiguous()):
        raise ValueError(
            f"y {tuple(y.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)} do not fit"
        )
    total, normed = torch.empty_like(y), torch.empty_like(y)
    sums, stride, columns, share, earlier = None, 0, 0, 0.0, 0.0
    if division is not None:
        sums, stride, columns = division.sums, division.sums.stride(0), division.sums.shape[1]
        share, earlier = 1 / division.channels, division.eps
    if tokens:
        add_rms_norm_kernel[(tokens,)](
            y, residual, weight, sums, total, normed, stride, share, earlier, eps,
            CHANNELS=channels, BLOCK=triton.next_power_of_2(channels), SUMS=columns,
            SUMS_BLOCK=triton.next_power_of_2(columns), num_warps=8,
        )  # fmt: skip
    return total, normed
