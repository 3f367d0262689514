"""RMSNorm of the gated mixer output (equation in ../README.md).

Plain torch: inside vLLM's compiled graph Inductor makes one kernel of it and of its neighbours.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Division(NamedTuple):
    """What is left of an RMS norm to be done behind a linear map.

    Attributes:
        sums: [rows, any]; each row adds up to the sum of squares of what is normalised, or of this rank's part.
        channels: of that on all ranks together.
        eps: of the norm.
    """

    sums: torch.Tensor
    channels: int
    eps: float

    def check(self, rows: int) -> None:
        """Raise ValueError if a kernel would misread the sums of so many rows."""
        if len(self.sums) != rows or self.sums.stride(1) != 1:
            raise ValueError(f"sums {tuple(self.sums.shape)} must have {rows} rows, each without gaps")


def kernel_arguments(division: Division | None) -> tuple[torch.Tensor | None, int, int, float, float]:
    """The sums, a row's stride and columns, 1 / channels and eps; of no division nothing, and zeros."""
    if division is None:
        return None, 0, 0, 0.0, 0.0
    sums, channels, eps = division
    return sums, sums.stride(0), sums.shape[1], 1 / channels, eps


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    channels: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Normalise x * silu(gate) over all `channels` of the mixer.

    Args:
        x: [tokens, local channels], this rank's part of the mixer's output.
        gate: like x.
        weight: [local channels].
        channels: channels on all ranks together.
        sum_over_ranks: adds up fp32 [tokens, 1] over the ranks.

    Returns:
        [tokens, local channels] in x's dtype; computed in fp32.
    """
    gated = x.float() * F.silu(gate.float())
    mean_square = sum_over_ranks(gated.square().sum(-1, keepdim=True)) / channels
    return weight * (gated * torch.rsqrt(mean_square + eps)).to(x.dtype)


def gate_for_later(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """All of the norm but its division: weight * x * silu(gate), and what the division needs.

    Args:
        x, gate: [tokens, channels]; their rows may be parts of longer ones.
        weight: [channels].
        out: [tokens, channels + sums], at least two columns of sums. They add up to the sum of squares of
            x * silu(gate), in two numbers, so that a low precision holds it.
    """
    from vllm_bamba.ops.gated_norm.kernels import gate_kernel  # needs Triton

    tokens, channels = x.shape
    sums = out.shape[1] - channels
    if gate.shape != x.shape or weight.shape != (channels,) or len(out) != tokens or not 2 <= sums <= channels:
        raise ValueError(f"x {tuple(x.shape)}, gate {tuple(gate.shape)} and out {tuple(out.shape)} do not fit")
    block = 1 << (channels - 1).bit_length()
    gate_kernel[(tokens,)](
        *(x, gate, weight, out, x.stride(0), gate.stride(0), out.stride(0)), channels, sums, block, num_warps=8
    )


def divide_later(
    y: torch.Tensor, division: Division, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The norm's division, behind a linear map of what `gate_for_later` or `mixer_step` gave.

    A row's factor passes through the map, so y may be its result: [tokens, any], on every rank the sum of all ranks'.

    Args:
        y: what to divide.
        division: by what.
        sum_over_ranks: as for `gated_rms_norm`.
    """
    mean_square = sum_over_ranks(division.sums.float().sum(-1, keepdim=True)) / division.channels
    return (y * torch.rsqrt(mean_square + division.eps)).to(y.dtype)
